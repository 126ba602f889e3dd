# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the command prints: nothing that harms a terminal or a program that reads it."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopdev._value import Value
from loopdev.cli._output import human_size, print_json, print_table, printable

# What a file can be called.
names = st.one_of(st.binary(), st.text().map(os.fsencode)).map(os.fsdecode)


class Sample(Value):
    name: str
    parts: tuple[object, ...] = ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("/tmp/disk image.img", "/tmp/disk image.img"),
        ("bücher ☃ 日本", "bücher ☃ 日本"),
        ("a\nb\tc\rd", "a\\x0ab\\x09c\\x0dd"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x00\x7f", "\\x00\\x7f"),
        (os.fsdecode(b"\xff\xfe"), "\\xff\\xfe"),
        ("\x9b31m", "\\xc2\\x9b31m"),
        ("a\u202eb", "a\\xe2\\x80\\xaeb"),
        ("a\u2028b", "a\\xe2\\x80\\xa8b"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected


@given(names)
def test_printable_text_is_printable(name):
    text = printable(name)
    assert text.isprintable()
    text.encode("utf-8")
    assert len(text.splitlines()) <= 1
    if name.isprintable():
        assert text == name


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0B"),
        (1, "1B"),
        (512, "512B"),
        (1023, "1023B"),
        (1024, "1K"),
        (1536, "1.5K"),
        (4096, "4K"),
        (1 << 20, "1M"),
        (3 << 19, "1.5M"),
        (1 << 30, "1G"),
        (10 << 30, "10G"),
        (1 << 40, "1T"),
        (1 << 50, "1P"),
        (1 << 60, "1024P"),
    ],
)
def test_human_size(count, expected):
    assert human_size(count) == expected


@given(st.integers(0, (1 << 63) - 1))
def test_human_size_is_close(count):
    text = human_size(count)
    unit = 1024 ** "BKMGTP".index(text[-1])
    # One decimal, so at most half of it is lost.
    assert abs(float(text[:-1]) * unit - count) <= 0.051 * unit


def test_table(capsys):
    print_table(("NAME", ">SIZE", "FILE"), [("a", "1", "x"), ("long", "1000", ""), ("b", "", "y")])
    assert capsys.readouterr().out.split("\n") == [
        "NAME  SIZE  FILE",
        "a        1  x",
        "long  1000",
        "b           y",
        "",
    ]


def test_table_without_rows(capsys):
    print_table(("A", ">B"), [])
    assert capsys.readouterr().out == "A  B\n"


@given(st.lists(st.tuples(names, names, names), max_size=5))
def test_table_has_a_line_for_each_row(rows):
    lines = _printed(print_table, ("ONE", ">TWO", "THREE"), rows).split("\n")
    assert len(lines) == len(rows) + 2
    assert all(line.isprintable() and line == line.rstrip() for line in lines)
    # Columns keep their places: what precedes the last one is equally long everywhere.
    wide = [max([3, *(len(printable(row[i])) for row in rows)]) for i in (0, 1)]
    start = wide[0] + wide[1] + 4
    for row, line in zip(rows, lines[1:], strict=False):
        assert line[start:] == printable(row[2]).rstrip()


@given(names)
def test_json_keeps_names(name):
    value = [Sample(name=name, parts=(Sample(name="inner"), 1, None, True)), {"path": name}]
    text = _printed(print_json, value)
    assert text.isascii()
    sample, plain = json.loads(text)
    assert list(sample) == ["name", "parts"]
    assert sample["parts"] == [{"name": "inner", "parts": []}, 1, None, True]
    for found in (sample["name"], plain["path"]):
        assert os.fsencode(found) == os.fsencode(name)


def test_json_of_nothing(capsys):
    print_json([])
    assert capsys.readouterr().out == "[]\n"


def _printed(function, *args: object) -> str:
    # Not capsys: hypothesis runs many examples in one test.
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        function(*args)
    return out.getvalue()
