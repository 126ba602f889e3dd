# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Parts of the broker that need no device: its state, its accounts, and systemd's side."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from loopdev import BrokerError, RefusedError, Rule
from loopdev.broker import _systemd
from loopdev.broker._jobs import Connection, Fds, Inbox, send
from loopdev.broker._lease import Account, Stock, cgroup_of, client_of
from loopdev.broker._poll import Poller
from loopdev.broker._state import State
from loopdev.errors import RemoteProtocolError

# The state file.


def test_state_is_what_was_put(tmp_path):
    path = str(tmp_path / "state")
    state = State.open(path)
    state.use(["/dev/.loopdev-0a"])
    state.put(1000)
    state.put(1001, device={"diskseq": 5})
    state.put(1000, device={"diskseq": 6})
    state.drop(1001)
    state.close()
    again = State.open(path)
    assert again.live == {1000: {"device": {"diskseq": 6}}}
    assert again.directories == ["/dev/.loopdev-0a"]
    again.drop(1000)
    again.use([])
    again.close()
    assert not os.path.exists(path)


def test_state_of_a_killed_broker(tmp_path):
    """The last line may be cut anywhere."""
    path = tmp_path / "state"
    state = State.open(str(path))
    state.put(1000, device={"diskseq": 5})
    state.put(1001, device={"diskseq": 7})
    whole = path.read_bytes()
    state._fd.close()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        again = State.open(str(path))
        assert again.live.get(1000) == {"device": {"diskseq": 5}}
        assert set(again.live) <= {1000, 1001}
        again._fd.close()


def test_state_of_another_boot(tmp_path):
    path = tmp_path / "state"
    path.write_text('{"boot":"another","directories":["/etc"]}\n{"number":1000}\n')
    state = State.open(str(path))
    assert (state.live, state.directories) == ({}, [])
    state.close()


@pytest.mark.parametrize("junk", [b"", b"\0" * 100, b"[]\n3\n", b'{"number":1}\n', b"\xff\n"])
def test_state_that_is_none(tmp_path, junk):
    path = tmp_path / "state"
    path.write_bytes(junk)
    state = State.open(str(path))
    assert state.live == {}
    state.close()


def test_state_is_locked(tmp_path):
    path = str(tmp_path / "state")
    first = State.open(path)
    for _ in range(2):
        with pytest.raises(BrokerError) as caught:
            State.open(path)
        assert caught.value.errno == errno.EADDRINUSE
        first._rewrite()  # another file, and locked as well
    first.close()
    State.open(path).close()


def test_state_does_not_grow_for_ever(tmp_path):
    path = tmp_path / "state"
    state = State.open(str(path))
    for turn in range(5000):
        state.put(1000 + turn % 3, device={"diskseq": turn})
    assert path.stat().st_size < 100_000
    assert path.stat().st_mode & 0o777 == 0o600
    state.close()
    again = State.open(str(path))
    assert {entry["device"]["diskseq"] for entry in again.live.values()} == {4997, 4998, 4999}
    for number in list(again.live):
        again.drop(number)
    again.close()


def test_state_is_no_symbolic_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "state").symlink_to(victim)
    with pytest.raises(BrokerError):
        State.open(str(tmp_path / "state"))
    assert victim.read_text() == "mine"


# Accounts and numbers.


def test_rate(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    account, rule = Account(5), Rule(requests_per_second=10)
    for _ in range(10):
        account.charge(rule)
    with pytest.raises(RefusedError) as caught:
        account.charge(rule)
    assert caught.value.errno == errno.EAGAIN
    now[0] += 0.25
    account.charge(rule)
    account.charge(rule)
    with pytest.raises(RefusedError):
        account.charge(rule)
    now[0] += 100  # no more than a second's worth at once
    for _ in range(10):
        account.charge(rule)
    with pytest.raises(RefusedError):
        account.charge(rule)


def test_rate_of_nothing():
    with pytest.raises(RefusedError):
        Account(5).charge(Rule(requests_per_second=0))
    Account(5).charge(Rule(requests_per_second=None))


def test_room():
    account = Account(5)
    account.devices = 3
    account.check_room(Rule(devices=4))
    account.check_room(Rule(devices=None))
    with pytest.raises(RefusedError):
        account.check_room(Rule(devices=3))
    account.bytes = 10
    assert account.bytes_left(Rule(bytes=15)) == 5
    assert account.bytes_left(Rule(bytes=5)) == 0
    assert account.bytes_left(Rule(bytes=None)) is None


def test_stock_gives_a_number_to_its_user_alone():
    stock = Stock(5000)
    assert stock.take(1) is None
    assert stock.new() == 5000
    assert stock.new() == 5001
    assert stock.give(1, 5000)
    assert stock.take(2) is None
    assert stock.take(1) == 5000
    assert stock.take(1) is None
    assert not stock
    stock.give(1, 5000)
    stock.give(2, 5001)
    assert sorted(stock.clear()) == [5000, 5001]
    assert not stock


def test_stock_is_bounded():
    stock = Stock(5000)
    assert [stock.give(1, number) for number in range(300)].count(True) == 256


def test_client_is_who_the_kernel_says():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        found = client_of(ours)
    assert (found["uid"], found["gid"], found["pid"]) == (os.getuid(), os.getgid(), os.getpid())
    assert set(found["groups"]) == set(os.getgroups())


def test_cgroup():
    assert cgroup_of(os.getpid()).startswith("/")
    assert cgroup_of(1 << 30) == ""


# Messages to workers.


def test_descriptors_of_a_message():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    inbox = Inbox(1000, most=2)
    with ours, theirs, open("/dev/null") as null:
        send(ours, {"a": 1}, [null.fileno()])
        message, fds = inbox.message(theirs)
        with fds:
            assert message == {"a": 1}
            assert os.fstat(fds[0]).st_rdev == os.fstat(null.fileno()).st_rdev
            assert not os.get_inheritable(fds[0])
        send(ours, {"a": 1}, [null.fileno()] * 5)
        _, fds, cut = inbox.raw(theirs)
        assert (len(fds), cut) == (2, True)
        fds.close()
        fds.close()
        for count in (0, 1, 3):
            send(ours, {}, [null.fileno()] * count)
            with (
                Connection(os.dup(theirs.fileno())) as connection,
                pytest.raises(RemoteProtocolError, match="needs 2 descriptors"),
            ):
                connection.receive_descriptors(2)
        ours.close()
        assert inbox.message(theirs) is None


def test_fds_that_were_taken_stay_open():
    reader, writer = os.pipe()
    with Fds([reader, writer]) as fds:
        assert fds.take(writer) == writer
        assert list(fds) == [reader]
    os.close(writer)
    with pytest.raises(OSError):
        os.close(reader)


def test_poller():
    poller = Poller()
    seen = []
    reader, writer = os.pipe()
    poller.watch(reader, lambda _: seen.append(os.read(reader, 10)))
    poller.later(0.02, lambda: seen.append("later"))
    poller.later(0.01, lambda: seen.append("sooner"))
    poller.later(0.03, poller.stop)
    poller.on_wake = lambda: seen.append("woken")
    os.write(writer, b"x")
    poller.wake()
    poller.run()
    assert set(map(str, seen[:2])) == {"woken", "b'x'"}
    assert seen[2:] == ["sooner", "later"]
    poller.forget(reader)
    poller.forget(reader)
    poller.close()
    os.close(reader)
    os.close(writer)


# systemd.


def test_nothing_without_systemd(monkeypatch):
    for name in ("LISTEN_PID", "LISTEN_FDS", "NOTIFY_SOCKET", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    assert _systemd.listening_socket() is None
    assert _systemd.watchdog_interval() is None
    _systemd.notify("READY=1")


def test_sockets_of_somebody_else(monkeypatch):
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    assert _systemd.listening_socket() is None
    assert "LISTEN_FDS" not in os.environ


PASSED = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
from loopdev.broker import _systemd
try:
    found = _systemd.listening_socket()
    print("ok", found.getsockname(), os.get_inheritable(3))
except Exception as exc:
    print(type(exc).__name__, exc)
"""


def passed(fd: int, count: str = "1") -> str:
    """Return what a process says to a descriptor 3 that it was given."""
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.dup2({fd}, 3)\n{PASSED}"],
        pass_fds=[fd],
        env={**os.environ, "LISTEN_FDS": count},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_socket_activation(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as right:
        right.bind(str(tmp_path / "s"))
        assert "ListenSequentialPacket" in passed(right.fileno())  # it does not listen
        right.listen()
        assert passed(right.fileno()) == f"ok {tmp_path / 's'} False"
        assert "2 sockets were passed" in passed(right.fileno(), "2")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wrong:
        wrong.bind(str(tmp_path / "t"))
        wrong.listen()
        assert "ListenSequentialPacket" in passed(wrong.fileno())
    with open("/dev/null") as null:
        assert "is no socket" in passed(null.fileno())


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path, monkeypatch, abstract):
    name = f"loopdev-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        _systemd.notify("READY=1\nSTATUS=x")
        assert listener.recv(100) == b"READY=1\nSTATUS=x"


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [("3000000", None, 1.5), ("3000000", "own", 1.5), ("3000000", "1", None), ("x", None, None)],
)
def test_watchdog(monkeypatch, usec, pid, seconds):
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert _systemd.watchdog_interval() == seconds
    called = []
    _systemd.watch(lambda interval, call: called.append(interval))
    assert called == ([] if seconds is None else [seconds])


def test_log_to_standard_error(capsys):
    _systemd.EventLog()("attach", {"uid": 5, "backing_file": "a b\n", "number": None})
    assert capsys.readouterr().err == "attach uid=5 backing_file='a b\\n'\n"


def test_log_to_the_journal(tmp_path, monkeypatch, capfd):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        monkeypatch.setattr(_systemd, "_JOURNAL", str(tmp_path / "journal"))
        status = os.fstat(2)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log = _systemd.EventLog()
        log("refused", {"uid": 5, "pid": 7, "cgroup": "/a", "reason": "two\nlines"})
        data = journal.recv(10000)
        log._journal.close()
    assert b"PRIORITY=4\n" in data
    assert b"LOOPDEV_UID=5\nLOOPDEV_PID=7\nLOOPDEV_CGROUP=/a\n" in data
    assert b"LOOPDEV_REASON\n" + (9).to_bytes(8, "little") + b"two\nlines\n" in data
    assert capfd.readouterr().err == ""


def test_entries_are_json(tmp_path):
    path = tmp_path / "state"
    state = State.open(str(path))
    state.put(1000, device={"backing_file": "a\nb\udcff"})
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
    state.drop(1000)
    state.close()
