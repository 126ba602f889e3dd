# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The directories of maps: names, states, locks, and what is left of those that died."""

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopdev.errors import InvalidValueError, KernelError, NameTakenError, NotMappedError
from loopdev.mapping import _end, _registry
from loopdev.mapping._maps import find_map
from loopdev.mapping._registry import Entry, State, check_name, discard_begun, entries, entry_of

STATE = State(
    name="x",
    source='/a "b"\n\u00fc/disk.img',
    identity="raw:1:2",
    device="/dev/loop7",
    number=7,
    diskseq=99,
    size=1 << 50,
    connection=44,
    supervisor=4711,
    workers=3,
    started=1_700_000_000,
)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """A registry of its own."""
    place = tmp_path / "maps"
    monkeypatch.setattr(_registry, "ROOT", str(place))
    return place


@pytest.fixture
def made(root):
    """A map's directory, and its lock."""
    entry, lock = Entry.create("x")
    yield entry, lock
    lock.close()


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "9a", "_", "x" * 64, "vm-100-2026-01-02"])
def test_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "-a", "7", "123", "a/b", "a b", "a\n", "\u00e4", "\u0661", "x" * 65],
)
def test_no_names(name):
    with pytest.raises(InvalidValueError):
        check_name(name)


def test_state(made):
    entry, _ = made
    assert entry.state() is None
    entry.write_state(STATE)
    assert entry.state() == STATE
    assert not os.path.exists(f"{entry.path}/state.json.new")


def test_state_of_a_kernel_without_diskseq(made):
    entry, _ = made
    old = State(**{**STATE.as_dict(), "diskseq": None})
    entry.write_state(old)
    assert entry.state() == old


@given(st.text(st.characters(codec="utf-8")), st.integers(0, 1 << 62))
def test_any_state(source, size):
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        entry = Entry("x")
        entry.path = place
        state = State(**{**STATE.as_dict(), "source": source, "size": size})
        entry.write_state(state)
        assert entry.state() == state


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"name": "x"}', b'{"other": 1}'],
)
def test_damaged_state(made, data):
    entry, _ = made
    with open(f"{entry.path}/state.json", "wb") as file:
        file.write(data)
    assert entry.state() is None
    assert entry.devices() == []


def test_create(root, made):
    entry, lock = made
    assert sorted(os.listdir(root)) == ["x"]
    assert sorted(os.listdir(root / "x")) == ["image", "lock"]
    assert (root.stat().st_mode & 0o777, (root / "x").stat().st_mode & 0o777) == (0o700, 0o700)
    assert entry.is_locked()
    assert not entry.is_locked("supervisor")
    with pytest.raises(NameTakenError, match="named x already"):
        Entry.create("x")
    assert sorted(os.listdir(root)) == ["x"]
    lock.close()
    assert not entry.is_locked()


def test_a_lock_is_held_by_any_copy(made):
    entry, lock = made
    child = subprocess.Popen(["sleep", "99"], pass_fds=[lock.fileno()])
    lock.close()
    assert entry.is_locked()
    child.kill()
    child.wait()
    assert not entry.is_locked()


def test_who_looks_does_not_disturb(made):
    """Two that ask at once are not taken for the map."""
    entry, lock = made
    lock.close()
    with open(f"{entry.path}/lock") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH)
        assert not entry.is_locked()


def test_a_map_that_cannot_be_looked_at_is_not_dead(made, monkeypatch):
    """Else gc would end a living one, when descriptors are short."""
    import resource

    entry, _ = made
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(KernelError, match="EMFILE"):
            entry.is_locked()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_discard(root, made):
    entry, _ = made
    entry.write_state(STATE)
    entry.fail("for a reason")
    assert entry.failure() == "for a reason"
    entry.discard()
    assert os.listdir(root) == []
    entry.discard()
    assert entry.failure() is None


def test_discard_leaves_what_is_not_ours(root, made):
    entry, _ = made
    (root / "x/notes").touch()
    entry.discard()
    assert os.listdir(root / "x") == ["notes"]


def test_discard_leaves_a_successor(root, made):
    """By its name, one could meet the next map's directory."""
    entry, lock = made
    old = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY)
    entry.discard()
    lock.close()
    again, lock = Entry.create("x")
    _registry.discard(old, entry.path)
    assert sorted(os.listdir(root / "x")) == ["image", "lock"]
    assert again.is_locked()
    os.close(old)
    lock.close()


def test_begun(root, made):
    """Directories without a name yet: removed, but not while another map is being made."""
    (root / ".new-a").mkdir()
    (root / ".new-b").mkdir()
    (root / ".new-b/lock").touch()
    making = _registry._root_held()
    assert discard_begun() == []
    making.close()
    assert discard_begun() == [".new-a", ".new-b"]
    assert os.listdir(root) == ["x"]
    assert [entry.name for entry in entries()] == ["x"]


def test_no_registry(root):
    assert list(entries()) == []
    assert discard_begun() == []
    assert not Entry("x").exists


def test_entry_of(root):
    assert entry_of(f"{root}/a/image").name == "a"
    for path in (None, "", "/", f"{root}/a", f"{root}/a/other", f"{root}/a/b/image", "/a/image"):
        assert entry_of(path) is None


@pytest.mark.parametrize("what", ["", ".", "..", "a/b", ".new-x", "../x", "y"])
def test_find_map(made, what):
    assert find_map("x").name == "x"
    with pytest.raises(NotMappedError):
        find_map(what)


def test_the_end_of_a_directory(root, made):
    """What is neither mounted nor has a device is gone at once, when nobody lives."""
    entry, lock = made
    lock.close()
    _end.end(entry)
    assert os.listdir(root) == []
    with pytest.raises(NotMappedError):
        _end.end(entry)


def test_who_only_waits_is_not_killed(root, made):
    """Who has the lock is killed when he does not end; not who waits for that, or looks."""
    entry, lock = made
    holder = subprocess.Popen(["sleep", "99"], pass_fds=[lock.fileno()])
    waiter = subprocess.Popen(["flock", "-s", f"{entry.path}/lock", "true"])
    lock.close()
    _end.end(entry)
    assert holder.wait(5) == -9
    assert waiter.wait(5) == 0
    assert os.listdir(root) == []
