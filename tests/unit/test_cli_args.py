# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The two ways to read the command's arguments agree, and values are what people mean."""

from __future__ import annotations

import contextlib
import functools
import io

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loopdev.cli import COMMANDS, _full
from loopdev.cli._args import Args, load, number, on_off, quick_parse, seconds, size

OPTIONS = sorted({name for command in COMMANDS for o in load(command).OPTIONS for name in o.names})
VALUES = [
    *(
        "0",
        "1",
        "512",
        "4096",
        "1K",
        "1KiB",
        "1MB",
        "-1",
        "-512",
        "1.5K",
        "x",
        "",
        " ",
        "nan",
        "inf",
    ),
    *("on", "off", "loop3", "/dev/loop3", "3", "0.5", "1e3", "text with spaces", "a=b", "-x", "é"),
    *("99999999999999999999", "--", "-", "bash", "zsh", "tcsh", "\udcff", "-1e5", "_", "1_0"),
]
OPERANDS = ["disk.img", "/dev/loop0", "7", "bash", "fish", "-", "--", "", "-1", "a b", "on", "\n"]
ODD = ["-h", "--help", "--version", "--frobnicate", "-x", "--off", "-Pr", "-rP", "-PrJ", "-", "---"]

make_parser = functools.cache(_full.make_parser)

option_names = st.sampled_from(OPTIONS)
values = st.sampled_from(VALUES)
words = st.one_of(
    st.sampled_from(OPERANDS),
    option_names,
    values,
    st.builds("{}={}".format, option_names, values),
    st.builds("{}{}".format, option_names.filter(lambda name: len(name) == 2), values),
    st.sampled_from(ODD),
    st.text(max_size=3),
)


@st.composite
def sensible(draw) -> list[str]:
    """Arguments of which most are right: the command's own options, with values."""
    name = draw(st.sampled_from(COMMANDS))
    command = load(name)
    argv: list[list[str]] = []
    for option in draw(
        st.lists(st.sampled_from(command.OPTIONS), max_size=5) if command.OPTIONS else st.just([])
    ):
        spelt = draw(st.sampled_from(option.names))
        value = draw(values)
        if option.convert is None:
            argv.append([spelt])
        else:
            argv.append(
                draw(
                    st.sampled_from(
                        [[spelt, value], [f"{spelt}={value}"], [spelt + value], [spelt]]
                    )
                )
            )
    argv += [[operand] for operand in draw(st.lists(st.sampled_from(OPERANDS), max_size=3))]
    return [name, *(word for group in draw(st.permutations(argv)) for word in group)]


def full_parse(argv: list[str]) -> tuple[object, Args] | int:
    """Return what argparse makes of it, or its exit code."""
    with (
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(_full, "make_parser", make_parser)
        try:
            return _full.full_parse(argv)
        except SystemExit as exit_:
            return exit_.code


def check(argv: list[str]) -> bool:
    """Check that the quick way is right or silent, and return whether it answered."""
    command = load(argv[0])
    quick = quick_parse(command, argv[1:])
    if quick is None:
        return False
    assert full_parse(argv) == (command, quick)
    return True


@settings(deadline=None, max_examples=1000)
@given(sensible())
@example(["detach", "1", "--lazy", "2"])
@example(["list", "1", "--json", "2"])
@example(["attach", "--direct-io", "off", "disk.img"])
def test_quick_parse_agrees(argv):
    check(argv)


@settings(deadline=None, max_examples=1000)
@given(st.sampled_from(COMMANDS), st.lists(words, max_size=6))
@example("detach", ["1", "-J", "2"])
def test_quick_parse_agrees_on_anything(name, rest):
    check([name, *rest])


def test_quick_parse_answers_what_is_written_correctly():
    """Else the two would agree because one never says anything."""
    for argv in (
        ["attach", "disk.img"],
        ["attach", "-P", "-r", "--offset", "1MiB", "--sector-size=4096", "disk.img"],
        ["attach", "disk.img", "--direct-io", "--json"],
        ["attach", "--direct-io=off", "-n", "3", "--timeout", "0.5", "--loop-ref=-x", "disk.img"],
        ["detach", "--lazy", "/dev/loop3", "disk.img"],
        ["detach", "--timeout=1", "3"],
        ["list"],
        ["list", "--json", "3"],
        ["info", "-J", "3"],
        ["holders", "3"],
        ["resize", "3"],
        ["rescan", "3", "--json"],
        ["remove", "3", "4"],
        ["completion", "bash"],
    ):
        assert check(argv), argv


@pytest.mark.parametrize(
    "argv",
    [
        ["attach"],
        ["attach", "one", "two"],
        ["attach", "-o", "x", "disk.img"],
        ["attach", "-o"],
        ["attach", "--json=1", "disk.img"],
        ["attach", "--frobnicate", "disk.img"],
        ["attach", "--off", "1", "disk.img"],
        ["attach", "-n", "-1", "disk.img"],
        ["attach", "--direct-io", "off", "disk.img"],
        ["detach"],
        ["completion"],
        ["completion", "tcsh"],
    ],
    ids=" ".join,
)
def test_mistakes(argv):
    assert full_parse(argv) == 2
    assert quick_parse(load(argv[0]), argv[1:]) is None


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_left_to_argparse(name, word):
    assert quick_parse(load(name), [word]) is None
    assert full_parse([name, word]) == 0


@pytest.mark.parametrize("word", ["-r", "--json", "--direct-io", "--version", "--"])
def test_operand_after_two_dashes(word):
    """It is a file, whatever it looks like."""
    command, args = full_parse(["attach", "--", word])
    assert (command, args.file) == (load("attach"), word)


@pytest.mark.parametrize("word", ["--direct-io", "x"])
def test_value_of_another_option(word):
    _, args = full_parse(["attach", f"--loop-ref={word}", "disk.img"])
    assert args.loop_ref == word


def test_commands_are_complete():
    for name in COMMANDS:
        command = load(name)
        assert command.HELP
        assert f"loopdev {name}" in command.EXAMPLES
        assert callable(command.run)


# Values.


@pytest.mark.parametrize(
    ("text", "expected"),
    # losetup(8): "The size argument may be followed by the multiplicative suffixes KiB (=1024),
    # MiB (=1024*1024), and so on for GiB, TiB, PiB, EiB, ZiB and YiB (the "iB" is optional, e.g.
    # "K" has the same meaning as "KiB") or the suffixes KB (=1000), MB (=1000*1000), and so on."
    [
        *(("0", 0), ("1", 1), ("512", 512), ("9" * 30, int("9" * 30))),
        *((f"1{unit}", 1024**power) for power, unit in enumerate("KMGTPEZY", 1)),
        *((f"1{unit}iB", 1024**power) for power, unit in enumerate("KMGTPEZY", 1)),
        *((f"1{unit}B", 1000**power) for power, unit in enumerate("KMGTPEZY", 1)),
        *((f"1{unit}", 1024**power) for power, unit in enumerate("kmgtpezy", 1)),
        *(("10M", 10 << 20), ("3KiB", 3072), ("2kB", 2000), ("0G", 0)),
        # These are no part of the manual, but losetup takes them.
        *(("0x200", 512), ("0X1f", 31), ("0x200K", 512 << 10), ("0x2MiB", 2 << 20)),
        *(("1.5K", 1536), ("0.5MiB", 512 << 10), ("1.25MB", 1250000)),
    ],
)
def test_size(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "K", "KiB", "B", "1B", "1iB", "1Ki", "1KK", "1KBB", "1KiBB", "1 K", "1K ", " 1"),
        *(
            "-1",
            "+1",
            "1.5",
            ".5K",
            "1.K",
            "1.2.3K",
            "1,5K",
            "0x",
            "0xg",
            "0x1_0",
            "0x10KK",
            "1e3",
            "1_000",
            "1X",
            "x",
            "\u0661",
            "\u00b2",
            "1\n",
            "1K\n",
        ),
    ],
)
def test_no_size(text):
    with pytest.raises(ValueError):
        size(text)


@given(st.text(max_size=8))
def test_size_is_a_number_or_an_error(text):
    try:
        assert size(text) >= 0
    except ValueError:
        pass


@pytest.mark.parametrize("text", ["3", "loop3", "/dev/loop3", "03"])
def test_number(text):
    assert number(text) == 3


@pytest.mark.parametrize(
    "text",
    [
        *("", "-1", "loop", "/dev/loop", "/dev/", "3p1", "loop3p1", "/dev/loop3p1", "/dev/null"),
        *("1.0", "+3", " 3", "3 ", "0x3", "\u00b2", "\u0663", "looploop3", "/loop3", "1_0"),
    ],
)
def test_no_number(text):
    with pytest.raises(ValueError):
        number(text)


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("5", 5), ("0.5", 0.5), ("1e3", 1000)])
def test_seconds(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "-1", "-0.1", "nan", "inf", "-inf", "1e9", "5s", "soon"])
def test_no_seconds(text):
    with pytest.raises(ValueError):
        seconds(text)


def test_on_off():
    assert on_off("on") is True
    assert on_off("off") is False


@pytest.mark.parametrize("text", ["", "On", "OFF", "yes", "1", "true", " on"])
def test_not_on_or_off(text):
    with pytest.raises(ValueError):
        on_off(text)
