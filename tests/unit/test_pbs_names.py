# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Names: what can be one, where it is in a datastore, and how locks escape it."""

from __future__ import annotations

import calendar
import shutil
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pbs import VALUES

from loopdev.errors import InvalidValueError
from loopdev.images.pbs import names

TIME = "2024-01-02T03:04:05Z"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (TIME, 1704164645),
        ("1970-01-01T00:00:00Z", 0),
        ("2000-02-29T23:59:59Z", 951868799),
        ("2020-12-29T17:30:00Z", 1609263000),
        ("9999-12-31T23:59:59Z", 253402300799),
        ("1969-12-31T23:59:59Z", None),
        ("2023-02-29T00:00:00Z", None),
        ("2024-00-01T00:00:00Z", None),
        ("2024-13-01T00:00:00Z", None),
        ("2024-01-32T00:00:00Z", None),
        ("2024-01-01T24:00:00Z", None),
        ("2024-01-01T00:60:00Z", None),
        ("2024-01-01T00:00:60Z", None),
        ("2024-01-01 00:00:00Z", None),
        ("2024-01-01T00:00:00z", None),
        ("2024-01-01T00:00:00", None),
        ("2024-01-01T00:00:00ZZ", None),
        ("٢٠٢٤-01-01T00:00:00Z", None),
        ("2024-1-01T000:00:00Z", None),
        ("", None),
    ],
)
def test_times(text, seconds):
    assert names.parse_time(text) == seconds


@given(st.integers(0, 253402300799))
def test_every_second_has_a_name(seconds):
    text = names.format_time(seconds)
    assert names.parse_time(text) == seconds
    assert calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")) == seconds


@given(st.text(max_size=25))
def test_any_text_is_a_time_or_not(text):
    found = names.parse_time(text)
    assert found is None or names.format_time(found) == text


@pytest.mark.parametrize(
    "name", ["", "a", "a/b", "A.b-c_9", "_", "1/2/3/4/5/6/7", "a" * 256, "a/" + "b" * 254]
)
def test_namespaces(name):
    assert names.check_namespace(name) == name
    assert names.is_namespace(name)


@pytest.mark.parametrize(
    "name",
    [
        *("/", "a/", "/a", "a//b", ".", "..", "a/..", "-a", ".a", "a b", "ä", "a\n", "a\0"),
        *("1/2/3/4/5/6/7/8", "a" * 257, "a:b"),
    ],
)
def test_what_is_no_namespace(name):
    assert not names.is_namespace(name)
    with pytest.raises(InvalidValueError):
        names.check_namespace(name)


def test_paths():
    assert names.namespace_path("") == ""
    assert names.namespace_path("a/b") == "ns/a/ns/b"
    snapshot = names.parse_snapshot(f"ns/a/b/vm/100/{TIME}")
    assert snapshot.path == f"ns/a/ns/b/vm/100/{TIME}"
    assert snapshot.full_name == f"ns/a/b/vm/100/{TIME}"
    assert str(snapshot) == f"vm/100/{TIME}"
    assert str(snapshot.group) == "vm/100"
    assert names.parse_snapshot(f"host/a.b-c/{TIME}").path == f"host/a.b-c/{TIME}"
    assert names.parse_snapshot(f"host/a.b-c/{TIME}").full_name == f"host/a.b-c/{TIME}"


@pytest.mark.parametrize(
    ("text", "given_ns", "namespace", "when", "filename"),
    [
        (f"vm/100/{TIME}/d.img", "", "", 1704164645, "d.img"),
        (f"vm/100/{TIME}/d.img.fidx", "", "", 1704164645, "d.img.fidx"),
        (f"ns/a/vm/100/{TIME}/d.img", "", "a", 1704164645, "d.img"),
        (f"ns/a/b/vm/100/{TIME}/d.img", "a/b", "a/b", 1704164645, "d.img"),
        (f"ns/a/b/vm/100/{TIME}/d.img", "a", "a/b", 1704164645, "d.img"),
        (f"vm/100/{TIME}/d.img", "a/b", "a/b", 1704164645, "d.img"),
        ("ns/ns/vm/vm/latest/latest", "", "ns/vm", None, "latest"),
        ("ct/x/latest/root.pxar", "", "", None, "root.pxar"),
    ],
)
def test_archives(text, given_ns, namespace, when, filename):
    if text.startswith("ns/ns/vm/vm/"):
        text = text.replace("vm/vm/", "vm/vm/7/")
    found = names.parse_archive(text, given_ns)
    assert found.group.namespace == namespace
    assert (found.time, found.filename) == (when, filename)


@pytest.mark.parametrize(
    ("text", "given_ns"),
    [
        ("", ""),
        ("d.img", ""),
        (f"vm/100/{TIME}", ""),
        (f"vm/100/{TIME}/", ""),
        (f"vm/100/{TIME}/..", ""),
        (f"vm/100/{TIME}/d\0", ""),
        (f"vm/../{TIME}/d.img", ""),
        (f"vm/100/../{TIME}/d.img", ""),
        (f"VM/100/{TIME}/d.img", ""),
        ("vm/100/2024/d.img", ""),
        (f"/vm/100/{TIME}/d.img", ""),
        (f"x/vm/100/{TIME}/d.img", ""),
        (f"ns/vm/100/{TIME}/d.img", ""),
        (f"ns//vm/100/{TIME}/d.img", ""),
        (f"ns/../vm/100/{TIME}/d.img", ""),
        (f"ns/a/vm/100/{TIME}/d.img", "b"),
        (f"ns/ab/vm/100/{TIME}/d.img", "a"),
        (f"ns/a/vm/100/{TIME}/d.img", "a/b"),
        (f"vm/100/{TIME}/d.img", "../.."),
        (f"ns/1/2/3/4/5/6/7/8/vm/100/{TIME}/d.img", ""),
    ],
)
def test_what_is_no_archive(text, given_ns):
    with pytest.raises(InvalidValueError):
        names.parse_archive(text, given_ns)


@given(st.text(alphabet="vm/ns.10-aZ:T", max_size=60), st.text(alphabet="a/.", max_size=5))
def test_no_name_leads_out_of_the_store(text, namespace):
    for parse in (names.parse_archive, names.parse_snapshot, names.parse_group):
        try:
            found = parse(text, namespace)
        except InvalidValueError:
            continue
        group = found.group if isinstance(found, names.ArchiveName) else found
        assert ".." not in group.path.split("/")
        assert not group.path.startswith("/")


@pytest.mark.parametrize("case", VALUES["escape"] + VALUES["lock_path_escape"])
def test_escape_vectors(case):
    assert names.escape(case["in"]) == case["out"]
    assert names.escape_path(case["in"]) == case["out"]
    assert names.unescape(case["out"]) == case["in"]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [("", "-"), ("/", "-"), ("/a/b", "a-b"), (".a", "\\x2ea"), ("a.b", "a.b"), ("ü", "\\xc3\\xbc")],
)
def test_escape_path(text, escaped):
    assert names.escape_path(text) == escaped


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_escape_round_trip(text):
    escaped = names.escape(text)
    assert escaped.isascii()
    assert "/" not in escaped
    assert names.unescape(escaped) == text


@pytest.mark.skipif(not shutil.which("systemd-escape"), reason="there is no systemd-escape")
@pytest.mark.parametrize("text", ["a/b-c", ".x/.y", "vm/100/ä b"])
def test_escape_is_systemds(text):
    done = subprocess.run(["systemd-escape", "--", text], capture_output=True, text=True)
    assert names.escape(text) == done.stdout.rstrip("\n")


@given(st.text(alphabet="a\\x0f-", max_size=12))
def test_unescape_any_text(text):
    try:
        names.unescape(text)
    except ValueError:
        pass


@pytest.mark.parametrize("text", ["\\", "\\x", "\\x1", "\\xg0", "\\x 1", "\\n41", "a\\x+1"])
def test_what_was_not_escaped(text):
    with pytest.raises(ValueError):
        names.unescape(text)
