# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Parts of the broker where something is full, gone, foreign or of the wrong kind."""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

import loopdev
from loopdev import BrokerError, PolicyError, RefusedError, Rule
from loopdev.broker import _systemd, messages
from loopdev.broker._answers import drop
from loopdev.broker._jobs import Connection, Inbox, send
from loopdev.broker._lease import Account, Lease, Stock, client_of
from loopdev.broker._poll import HUP, Poller
from loopdev.broker._pool import Job, Pool
from loopdev.broker._state import State
from loopdev.broker.policy import PolicyFile
from loopdev.kernel import sysfs


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


# The state file.


@pytest.fixture
def file_size():
    """Limit the size of files: what is more is written in part, as on a full filesystem."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_state_that_cannot_be_written(tmp_path, file_size):
    """Nothing is taken for written that was not; when there is room again, all is."""
    path = tmp_path / "state"
    state = State.open(str(path))
    state.put(1000, device={"diskseq": 5})
    file_size(path.stat().st_size + 10)
    with pytest.raises(BrokerError, match="cannot be written"):
        state.put(1001, device={"diskseq": 6})
    file_size(40)
    with pytest.raises(BrokerError):
        state.drop(1000)
    assert os.listdir(tmp_path) == ["state"]
    file_size(1 << 20)
    state.put(1002)
    assert state.live == {1001: {"device": {"diskseq": 6}}, 1002: {}}
    state._fd.close()
    again = State.open(str(path))
    assert again.live == state.live
    again._fd.close()


def test_state_after_half_a_line(tmp_path, file_size):
    """Who reads the file then finds what was written before that line."""
    path = tmp_path / "state"
    state = State.open(str(path))
    state.put(1000, device={"diskseq": 5})
    file_size(path.stat().st_size + 10)
    with pytest.raises(BrokerError):
        state.put(1001)
    state._fd.close()
    file_size(1 << 20)
    again = State.open(str(path))
    assert again.live == {1000: {"device": {"diskseq": 5}}}
    again._fd.close()


def test_state_file_that_was_removed(tmp_path):
    """It is made again with what was in it, when its turn comes."""
    place = tmp_path / "run"
    place.mkdir()
    state = State.open(str(place / "state"))
    state.put(1000)
    os.unlink(place / "state")
    os.rmdir(place)
    for _ in range(3000):
        state.put(1001)  # in the file that has no name
    place.mkdir()
    for _ in range(2000):
        state.put(1001)
    assert (place / "state").exists()
    state.drop(1000)
    state.drop(1001)
    os.unlink(place / "state")
    state.close()


@pytest.mark.parametrize("kind", ["pipe", "directory", "null"])
def test_state_of_another_kind(tmp_path, kind):
    path = tmp_path / "state"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path = Path("/dev/null")
    with pytest.raises(BrokerError, match=r"regular|cannot be opened|another user"):
        State.open(str(path))


def test_state_names_no_directory_but_ours(tmp_path):
    """A damaged file has nothing removed that is not a broker's."""
    path = tmp_path / "state"
    state = State.open(str(path))
    ours = "/dev/.loopdev-0123456789abcdef"
    state.use([ours, "/etc", "/dev/.loopdev-/../../etc", "/dev/.loopdev-0a/x"])
    state._fd.close()
    again = State.open(str(path))
    assert again.directories == [ours]
    again._fd.close()


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"number":true}', '{"number":-1}', '{"number":1e9}']
)
def test_state_with_a_foreign_line(tmp_path, line):
    path = tmp_path / "state"
    state = State.open(str(path))
    state.put(1000)
    state._fd.close()
    with open(path, "a") as file:
        file.write(line + "\n")
    again = State.open(str(path))
    assert again.live == {1000: {}}
    again._fd.close()


# Numbers and accounts.


def test_numbers_begin_again():
    """A broker that runs for years does not run out of numbers."""
    end = sysfs.end_of_numbers()
    assert 1 << 12 <= end <= 1 << 20
    stock = Stock(end - 3)
    assert [stock.new({end - 2}) for _ in range(4)] == [end - 3, end - 1, end - 3, end - 1]


def test_numbers_that_are_all_taken():
    end = sysfs.end_of_numbers()
    with pytest.raises(RefusedError) as caught:
        Stock(end - 3).new(range(end - 3, end))
    assert caught.value.errno == errno.ENOSPC


def test_what_somebody_keeps_counts():
    account = Account(5)
    account.devices, account.bytes = 1, 10
    account.others, account.others_bytes = 2, 20
    with pytest.raises(RefusedError):
        account.check_room(Rule(devices=3))
    account.check_room(Rule(devices=4))
    assert account.bytes_left(Rule(bytes=35)) == 5


def test_rested(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    account = Account(5)
    account.charge(Rule(requests_per_second=10))
    assert not account.is_rested()
    now[0] += 1
    assert account.is_rested()


# Connections and workers.


def test_number_of_a_closed_descriptor(tmp_path):
    """An event of what was closed in the same round is not taken for one of what came after."""
    poller, seen = Poller(), []
    first, second = pair(), pair()

    def exchange(_: int) -> None:
        for ours, theirs in (first, second):
            poller.forget(ours.fileno())
            number = ours.fileno()
            ours.close()
            theirs.close()
            new, other = pair()
            assert number in (new.fileno(), other.fileno())
            news.extend((new, other))
            for sock in (new, other):
                poller.watch(sock.fileno(), seen.append)
        poller.stop()

    news: list[socket.socket] = []
    for ours, theirs in (first, second):
        poller.watch(ours.fileno(), exchange)
        theirs.shutdown(socket.SHUT_RDWR)
    poller.run()
    assert [events for events in seen if events & HUP] == []
    poller.close()
    for sock in news:
        sock.close()


def gone_without_reading() -> socket.socket:
    """Return a connection with a request, whose client has gone and left an answer unread."""
    ours, theirs = pair()
    ours.send(b"an answer")
    theirs.send(b"a request")
    theirs.close()
    return ours


def test_client_that_goes_without_reading():
    """Between the look at its request and taking that off: an error that must end nothing else."""
    with gone_without_reading() as ours:
        lease = Lease(ours, client_of(ours), "", Rule(), Account(5))
        drop(lease)
        assert lease.ended
    with gone_without_reading() as ours, Connection(os.dup(ours.fileno())) as connection:
        connection.drop()


def test_descriptors_for_which_there_is_no_room():
    ours, theirs = pair()
    with ours, theirs, open("/dev/null") as null:
        send(ours, {"a": 1}, [null.fileno()] * 3)
        found, fds = Inbox(1000, most=2).message(theirs)
        with fds:
            assert found == {"cut": True}
            assert len(fds) == 2


def run_until(poller: Poller, condition) -> None:
    end = time.monotonic() + 10

    def look() -> None:
        if condition() or time.monotonic() > end:
            poller.stop()
        else:
            poller.later(0.01, look)

    look()
    poller.run()
    assert condition()


def test_jobs_wait_when_no_worker_can_be_started(monkeypatch):
    poller, results = Poller(), []
    pool = Pool(poller, 2)
    python = sys.executable
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    for number in range(3):
        job = Job(number, {"job": "bury"}, lambda *result: results.append(result))
        pool.submit(job)
    ended = time.monotonic() + 0.2
    run_until(poller, lambda: time.monotonic() > ended)
    assert (results, pool.pids()) == ([], [])
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(sys, "executable", python)
    run_until(poller, lambda: len(results) == 3)
    assert all(result is not None for result, _ in results)
    pool.close()
    poller.close()


# What is read and written.


def test_a_page_fits_a_reply():
    longest = {"backing_file": "\udcff" * 4095}
    found = messages.page([longest] * messages.PAGE)
    assert 1 <= len(found) < messages.PAGE
    assert len(messages.encode_result({"devices": found})) < messages.MAX_REPLY
    assert messages.page([{"backing_file": "x" * 200_000}, longest]) != []
    assert len(messages.page([{"number": 1}] * messages.PAGE)) == messages.PAGE


@pytest.mark.parametrize("kind", ["pipe", "directory", "zero", "socket", "large", "symlink"])
def test_policy_of_another_kind(tmp_path, kind):
    """The broker waits for none of them, and keeps what counted."""
    path = tmp_path / "policy"
    path.write_text("[[rule]]\nuid = 5\n")
    file = PolicyFile(path)
    before = file.policy, file.identity
    path.unlink()
    sock = socket.socket(socket.AF_UNIX)
    with sock:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "directory":
            path.mkdir()
        elif kind == "socket":
            sock.bind(str(path))
        elif kind == "large":
            path.write_text("#" * (2 << 20))
        else:
            path.symlink_to("/dev/zero" if kind == "zero" else path)
        with pytest.raises(PolicyError):
            file.reload()
    assert (file.policy, file.identity) == before


@pytest.mark.parametrize(
    "line",
    [
        "devices = " + "9" * 5000,
        "requests_per_second = " + "9" * 400,
        'bytes = "' + "9" * 5000 + 'GiB"',
        'bytes = "9999999999PiB"',
        "connections = 9223372036854775808",
    ],
)
def test_policy_with_a_huge_number(tmp_path, line):
    path = tmp_path / "policy"
    path.write_text(f"[[rule]]\nuid = 5\n{line}\n")
    with pytest.raises(PolicyError):
        PolicyFile(path)


def test_log_that_is_full(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        log = _systemd.EventLog()
        log("attach", {"uid": 5})
        log("attach", {"uid": 5})
        monkeypatch.undo()
        with pytest.raises(OSError):
            full.close()


def test_log_that_nobody_reads(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    pipe = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stderr", pipe)
    _systemd.EventLog()("attach", {"uid": 5})
    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        pipe.close()


def test_socket_without_a_path_needs_a_state_file():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0loopdev-test-{os.getpid()}-{threading.get_ident()}")
        listener.listen()
        with pytest.raises(BrokerError, match="state="):
            loopdev.LoopServer(listener)
