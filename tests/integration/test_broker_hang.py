# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A file that does not answer, and clients that do not read, hold up nobody but themselves."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import time

import pytest
from broker_tools import Served, descriptors
from fake_fuse import StoppedFuse
from oracle import is_bound, wait_until

import loopdev

ALL = '[[rule]]\nuid = "all"\n'


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path, ALL) as broker:
        yield broker


HANGING = """
import sys
import loopdev
client = loopdev.LoopClient(sys.argv[1])
with open(sys.argv[2], "r+b", buffering=0) as file:
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        client.attach(file.fileno())
    except loopdev.LoopdevError as exc:
        print(type(exc).__name__, flush=True)
    else:
        print("attached", flush=True)
"""


class Hanging:
    """A client whose request waits for a FUSE server that does not answer.

    It is a process: who has such a file open can start none, since the child would close it.
    """

    def __init__(self, path: str, file: os.PathLike[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", HANGING, path, file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == "ready\n"

    def start(self) -> None:
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def hangs(self) -> bool:
        return not select.select([self._process.stdout], [], [], 0)[0]

    def end(self) -> str:
        """Return what became of the request."""
        outcome = self._process.stdout.readline().strip()
        self._process.stdin.close()
        self._process.stdout.close()
        # Whoever made it hang may be gone before it could close its file.
        self._process.kill()
        self._process.wait(20)
        return outcome


def cycles(path: str, image: os.PathLike[str], count: int) -> float:
    """Return the longest of some attachments, in seconds."""
    longest = 0.0
    with loopdev.LoopClient(path) as client, open(image, "r+b") as file:
        for _ in range(count):
            started = time.monotonic()
            client.attach(file.fileno()).detach()
            longest = max(longest, time.monotonic() - started)
    return longest


@pytest.mark.parametrize("how", ["stop", "mute"])
def test_file_that_hangs(served, tmp_path, image, how):
    """More clients hang than there are workers without need; another one is served."""
    with StoppedFuse(tmp_path / "fuse") as fuse:
        hanging = [Hanging(served.path, fuse.file) for _ in range(5)]
        getattr(fuse, how)()
        for client in hanging:
            client.start()
        try:
            wait_until(lambda: len(served.workers()) >= 5)
            assert cycles(served.path, image, 20) < 5
            assert all(client.hangs() for client in hanging)
        finally:
            if how == "mute":
                fuse.kill()
            else:
                fuse.resume()
            outcomes = {client.end() for client in hanging}
        assert len(outcomes) == 1
        assert outcomes <= {"attached", "BackingFileError", "KernelError"}
    wait_until(lambda: len(served.workers()) <= max(2, os.cpu_count()))


def test_kill_of_a_broker_with_a_hanging_worker(tmp_path, image):
    """What hangs has nothing of the others: their devices are free at once."""
    served = Served(tmp_path, ALL).start()
    with StoppedFuse(tmp_path / "fuse") as fuse:
        hanging = Hanging(served.path, fuse.file)
        try:
            with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
                number = client.attach(file.fileno()).number
                fuse.mute()
                hanging.start()
                wait_until(lambda: any(waits_for_fuse(pid) for pid in served.workers()))
                served.kill()
                wait_until(lambda: not is_bound(number))
                with pytest.raises(loopdev.BrokerError):
                    client.hello()
            # The next one starts while the other's worker still hangs.
            with Served(tmp_path, ALL) as again:
                assert cycles(again.path, image, 3) < 5
        finally:
            fuse.kill()
            outcome = hanging.end()
    assert outcome == "BrokerError"


def waits_for_fuse(pid: int) -> bool:
    with open(f"/proc/{pid}/wchan") as file:
        return "request_wait_answer" in file.read()


def test_stop_with_a_hanging_worker(tmp_path, image):
    """An end takes its time, but comes."""
    with StoppedFuse(tmp_path / "fuse") as fuse:
        try:
            with loopdev.LoopServer(tmp_path / "s") as server:
                hanging = Hanging(server.path, fuse.file)
                fuse.mute()
                hanging.start()
                assert cycles(server.path, image, 1) < 5
        finally:
            fuse.kill()
            outcome = hanging.end()
    assert outcome == "BrokerError"


def test_client_that_reads_no_answers(served, image):
    """It is cut off when its answers do not fit; nobody else notices."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf:
        deaf.connect(served.path)
        deaf.settimeout(10)
        with pytest.raises((BrokenPipeError, ConnectionError)):
            for _ in range(100_000):
                deaf.send(b'{"v":1,"op":"hello"}')
    assert cycles(served.path, image, 3) < 5
    assert "cut off" in served.log()


def test_silent_clients(served, image):
    before = descriptors(served.process.pid)
    silent = []
    for _ in range(200):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(served.path)
        silent.append(sock)
    assert cycles(served.path, image, 5) < 5
    for sock in silent:
        sock.close()
    wait_until(lambda: descriptors(served.process.pid) <= before)


def test_half_closed(served, image):
    """Who will send no more has given everything back; who will read no more, too."""
    for how in (socket.SHUT_WR, socket.SHUT_RD):
        with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
            number = client.attach(file.fileno()).number
            raw = socket.socket(fileno=os.dup(client.fileno()))
            with raw:
                raw.shutdown(how)
                if how == socket.SHUT_RD:
                    with pytest.raises(OSError):
                        for _ in range(10):
                            raw.send(b'{"v":1,"op":"hello"}')
                            time.sleep(0.01)
                wait_until(lambda number=number: not is_bound(number))


def test_request_with_the_connection_closed_behind_it(served, image):
    """Descriptors that nobody has received are closed, and nothing is bound."""
    before = descriptors(served.process.pid)
    with open(image, "r+b") as file:
        for _ in range(50):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
                raw.connect(served.path)
                for _ in range(5):
                    socket.send_fds(raw, [b'{"v":1,"op":"attach"}'], [file.fileno()])
    wait_until(lambda: descriptors(served.process.pid) <= before)
    wait_until(lambda: "loop" not in "".join(bound(image)))


def bound(image: os.PathLike[str]) -> list[str]:
    return [device.path for device in loopdev.find(image)]


def test_many_requests_at_once(served, image):
    """They are answered in their order, one after the other."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw, open(image, "r+b") as file:
        raw.connect(served.path)
        for _ in range(10):
            socket.send_fds(raw, [b'{"v":1,"op":"attach"}'], [file.fileno()])
            raw.send(b'{"v":1,"op":"list"}')
        for count in range(1, 11):
            assert b'"number"' in raw.recv(10000)
            assert raw.recv(10000).count(b'"diskseq"') == count
    wait_until(lambda: bound(image) == [])
