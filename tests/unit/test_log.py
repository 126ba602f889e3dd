# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Where a map's messages go, and that writing them never hurts the map."""

from __future__ import annotations

import array
import calendar
import fcntl
import os
import re
import resource
import select
import signal
import socket
import stat
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopdev.errors import KernelError, NotPermittedError
from loopdev.mapping import _log
from loopdev.mapping._log import ERROR, INFO, open_log

LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) (\S+): (.*)")


def parsed(entry: bytes) -> dict[str, bytes]:
    """Read the journal's format as its documentation has it."""
    fields = {}
    while entry:
        line, _, entry = entry.partition(b"\n")
        key, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(entry[:8], "little")
            value, entry = entry[8 : 8 + length], entry[8 + length :]
            assert entry[:1] == b"\n"
            entry = entry[1:]
        fields[key.decode()] = value
    return fields


class Journal:
    """A journal: the socket, and what arrives there."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(5)
        self._socket.bind(path)

    def receive(self) -> dict[str, bytes]:
        data, rights, flags, _ = self._socket.recvmsg(1 << 20, socket.CMSG_SPACE(4))
        assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
        if not rights:
            return parsed(data)
        fd = array.array("i", rights[0][2])[0]
        try:
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == seals
            assert data == b""
            return parsed(os.pread(fd, os.fstat(fd).st_size, 0))
        finally:
            os.close(fd)

    def is_empty(self) -> bool:
        return not select.select([self._socket], [], [], 0)[0]

    def close(self) -> None:
        self._socket.close()
        os.unlink(self._path)


@pytest.fixture
def journal(tmp_path, monkeypatch):
    path = str(tmp_path / "journal.socket")
    monkeypatch.setattr(_log, "JOURNAL", path)
    journal = Journal(path)
    yield journal
    journal.close()


@pytest.fixture
def no_journal(tmp_path, monkeypatch):
    monkeypatch.setattr(_log, "JOURNAL", str(tmp_path / "there is none"))


@pytest.fixture
def opened():
    logs = []

    def opened(*args):
        logs.append(open_log(*args))
        return logs[-1]

    yield opened
    for log in logs:
        log.close()


@pytest.mark.parametrize("target", [None, "journal"])
def test_journal(journal, opened, tmp_path, target):
    fallback = tmp_path / "a" / "file"
    log = opened(target, "disk.img", str(fallback))
    log.log("one: bücher=☃", ERROR)
    assert journal.receive() == {
        "MESSAGE": "one: bücher=☃".encode(),
        "PRIORITY": b"3",
        "SYSLOG_IDENTIFIER": b"loopdev",
        "LOOPDEV_MAP": b"disk.img",
    }
    log.log("two\nlines=of text\n")
    entry = journal.receive()
    assert entry["MESSAGE"] == b"two\nlines=of text\n"
    assert entry["PRIORITY"] == b"6"
    assert not fallback.parent.exists()


@given(st.text())
def test_journal_entries_have_what_was_put_in(text):
    entry = parsed(_log._entry(MESSAGE=text, PRIORITY="6"))
    assert entry == {"MESSAGE": text.encode(errors="backslashreplace"), "PRIORITY": b"6"}


def test_a_long_message_is_handed_over_as_a_sealed_file(journal, opened):
    log = opened("journal", "map", "")
    text = "0123456789\n" * 22000  # more than a datagram can be
    log.log(text)
    assert journal.receive()["MESSAGE"] == text.encode()
    log.log("x" * (1 << 20))
    assert len(journal.receive()["MESSAGE"]) == 256 << 10


def test_a_journal_that_is_full_is_not_waited_for(journal, opened, monkeypatch):
    monkeypatch.setattr(_log, "_RATE", 10**6)
    log = opened("journal", "map", "")
    with open("/proc/sys/net/unix/max_dgram_qlen") as file:
        length = int(file.read())
    for number in range(length + 100):
        log.log(str(number))
    assert [journal.receive()["MESSAGE"] for _ in range(length)][-1] == str(length - 1).encode()


def test_a_journal_that_is_gone_and_comes_back(journal, opened):
    log = opened("journal", "map", "")
    journal.close()
    log.log("nobody hears it")
    journal.__init__(journal._path)
    log.log("hello")
    assert journal.receive()["MESSAGE"] == b"hello"
    assert journal.is_empty()


def test_a_journal_that_was_asked_for_must_be_there(no_journal):
    with pytest.raises(KernelError, match=r"there is none: .*ENOENT"):
        open_log("journal", "map", "")


def test_fallback(no_journal, opened, tmp_path):
    fallback = tmp_path / "var" / "log" / "map.log"
    begin = int(time.time()) - 1  # seconds come from a coarser clock
    log = opened(None, "map", str(fallback))
    assert log.filenos() == ()
    assert not fallback.parent.exists()
    log.log("hello")
    assert len(log.filenos()) == 1
    date, name, text = LINE.fullmatch(fallback.read_text().removesuffix("\n")).groups()
    assert (name, text) == ("map", "hello")
    assert begin <= calendar.timegm(time.strptime(date, "%Y-%m-%dT%H:%M:%SZ")) <= time.time()
    assert fallback.stat().st_mode & 0o777 & ~0o640 == 0


def test_a_file_is_appended_to(opened, tmp_path):
    path = tmp_path / "log"
    path.write_text("before\n")
    first, second = (opened(str(path), name, "") for name in ("a", "b"))
    for number in range(5):
        first.log(f"{number}")
        second.log(f"{number}")
    lines = path.read_text().splitlines()
    assert lines[0] == "before"
    expected = [(name, str(number)) for number in range(5) for name in "ab"]
    assert [LINE.fullmatch(line).groups()[1:] for line in lines[1:]] == expected


def test_a_file_stays_bounded(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(_log, "_LARGEST_FILE", 100)
    path = tmp_path / "log"
    log = opened(str(path), "map", "")
    for number in range(10):
        log.log(f"{number:050}")
    assert len(path.read_text().splitlines()) == 2
    os.truncate(path, 0)
    log.log("room again")
    assert path.read_text().endswith("room again\n")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("two\nlines\n", "two\n    lines"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\rb", "a\\rb"),
        (os.fsdecode(b"\xff"), "\\udcff"),
        ("bücher\n\0", "bücher\n    \\x00"),
        ("", ""),
    ],
)
def test_messages_are_printable(opened, tmp_path, message, text):
    path = tmp_path / "log"
    opened(str(path), "map", "").log(message)
    assert path.read_text().partition(" map: ")[2] == text + "\n"


@given(st.text())
def test_no_message_passes_for_another_line(text):
    first, *others = _log._printable(text).split("\n")
    assert first.isprintable()
    assert all(line.startswith("    ") and line.isprintable() for line in others)


def test_no_more_than_so_many_a_second(opened, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(_log.time, "monotonic", lambda: now[0])
    path = tmp_path / "log"
    log = opened(str(path), "map", "")
    for number in range(100):
        log.log(f"{number}")
    assert len(path.read_text().splitlines()) == 20
    now[0] += 1
    log.log("again")
    log.log("and again")
    texts = [LINE.fullmatch(line)[3] for line in path.read_text().splitlines()]
    expected = ["80 messages more were not written", "again", "and again"]
    assert texts[19:] == ["19", *expected]


def test_a_full_disk(opened):
    opened("/dev/full", "map", "").log("lost")


def test_a_file_that_may_not_grow(opened, tmp_path):
    """EFBIG comes with a signal, which Python ignores."""
    path = tmp_path / "log"
    log = opened(str(path), "map", "")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        log.log("lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b""


def test_a_pipe_that_nobody_empties(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(_log, "_RATE", 10**6)
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        log = opened(str(path), "map", "")
        for _ in range(100):
            log.log("x" * 4000)
    finally:
        os.close(reader)
    log.log("nobody")


def test_closed(journal, opened, tmp_path):
    for target in ("journal", str(tmp_path / "log")):
        log = opened(target, "map", "")
        log.close()
        log.close()
        log.log("lost")
    assert journal.is_empty()
    assert (tmp_path / "log").read_bytes() == b""


def test_the_descriptors_that_a_log_needs(journal, opened, tmp_path):
    (fd,) = opened("journal", "map", "").filenos()
    assert stat.S_ISSOCK(os.fstat(fd).st_mode)
    (fd,) = opened(str(tmp_path / "log"), "map", "").filenos()
    assert os.path.samestat(os.fstat(fd), os.stat(tmp_path / "log"))
    assert opened("stderr", "map", "").filenos() == (2,)


def test_stderr(opened, capfd):
    log = opened("stderr", "map", "")
    log.log("hello\nworld")
    log.log("x" * 10000)
    expected = ["loopdev: map: hello", "    world", "loopdev: map: " + "x" * 10000]
    assert capfd.readouterr().err.splitlines()[:3] == expected


def test_a_terminal_that_was_stopped(opened):
    """Here it is a pipe that nobody reads: more than it holds is lost, and not waited for."""
    end, kept = os.pipe(), os.dup(2)
    log = opened("stderr", "map", "")
    os.dup2(end[1], 2)
    signal.alarm(30)  # it would be for ever
    try:
        for _ in range(20):
            log.log("x" * 10000, INFO)
    finally:
        signal.alarm(0)
        os.dup2(kept, 2)
        for fd in (kept, *end):
            os.close(fd)


def test_places_that_cannot_be(no_journal, tmp_path):
    with pytest.raises(KernelError, match="ENOENT"):
        open_log(str(tmp_path / "no" / "log"), "map", "")
    with pytest.raises(KernelError, match="EISDIR"):
        open_log(str(tmp_path), "map", "")
    log = open_log(None, "map", "/dev/null/log")
    log.log("nobody asked for a log")
    log.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_places_that_may_not_be(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(NotPermittedError):
        open_log(str(tmp_path / "log"), "map", "")
