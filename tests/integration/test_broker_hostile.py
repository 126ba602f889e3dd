# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Clients that try to harm the broker, or each other."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from broker_tools import (
    FIRST,
    USER,
    Served,
    as_user,
    descriptors,
    left_behind,
    open_to,
)
from fake_fuse import StoppedFuse
from oracle import is_bound, wait_until
from test_broker_hang import Hanging, cycles

import loopdev
from loopdev import Policy, Rule

MIB = 1 << 20
ALL = """
[[rule]]
uid = "all"
connections = 100000
devices = "unlimited"
requests_per_second = "unlimited"
"""


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path, ALL) as broker:
        yield broker


@pytest.fixture
def file(image):
    with open(image, "r+b") as opened:
        yield opened


def serving(directory: Path, **fields: object) -> loopdev.LoopServer:
    return loopdev.LoopServer(directory / "s", Policy(rules=(Rule(**fields),)))


# Names.


@pytest.fixture
def long_name(tmp_path):
    """A file whose path is as long as a path can be."""
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(14):
            os.mkdir("a" * 250)
            os.chdir("a" * 250)
        with open("b" * 250, "w+b") as file:
            file.truncate(MIB)
            yield file
    finally:
        os.chdir(here)


def test_many_devices_of_a_long_name(served, long_name):
    """A worker has a lot to tell of a client that it stayed with."""
    workers = served.workers()
    with loopdev.LoopClient(served.path) as client:
        for _ in range(500):
            client.attach(long_name.fileno()).detach()
    assert served.workers() == workers
    assert served.log().count("\nattach ") == served.log().count("\ndetach ") == 500


def test_list_of_long_names(served, long_name):
    """It takes more replies; root's is not cut off by what others have."""
    with loopdev.LoopClient(served.path) as client:
        devices = [client.attach(long_name.fileno()) for _ in range(60)]
        assert [found["number"] for found in client.devices()] == sorted(d.number for d in devices)


# Clients that go.


def test_clients_that_go_without_reading(served, image):
    """With requests on the connection, answered or not, and the answers unread."""
    workers = served.workers()
    end = time.monotonic() + 3
    turn = 0
    with open(image, "r+b") as file:
        while time.monotonic() < end:
            turn += 1
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
                raw.connect(served.path)
                with contextlib.suppress(OSError):
                    for _ in range(turn % 5):
                        raw.send(b'{"v":1,"op":"hello"}' if turn % 3 else b"nonsense")
                    if turn % 7 == 0:
                        socket.send_fds(raw, [b'{"v":1,"op":"attach"}'], [file.fileno()])
                        raw.send(b'{"v":1,"op":"detach","number":1000,"diskseq":1}')
                        raw.send(b'{"v":1,"op":"list"}')
                if turn % 11 == 0:
                    time.sleep(random.random() / 500)
    assert cycles(served.path, image, 3) < 5
    assert set(workers) <= set(served.workers())
    wait_until(lambda: descriptors(served.process.pid) < 50)


def test_client_that_goes_while_it_is_refused(tmp_path, image):
    """What is over the limit is taken back once, and from nobody else."""
    log: list[tuple[str, dict[str, object]]] = []
    policy = Policy(rules=(Rule(bytes=24 * MIB, requests_per_second=None),))
    message = b'{"v":1,"op":"attach"}'
    with (
        loopdev.LoopServer(tmp_path / "s", policy, log=lambda *event: log.append(event)) as server,
        loopdev.LoopClient(server.path) as watcher,
        open(image, "r+b") as file,
    ):
        for _ in range(60):
            raws = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(4)]
            for raw in raws:
                raw.connect(server.path)
            for raw in raws:
                socket.send_fds(raw, [message], [file.fileno()])
            answers = []
            for raw in raws:
                answers.append(json.loads(raw.recv(10000)))
                raw.close()
            assert sum("result" in answer for answer in answers) <= 2
        wait_until(lambda: watcher.hello()["used"] == {"devices": 0, "bytes": 0})
    events = [event for event, _ in log]
    assert events.count("attach") == events.count("detach") >= 60
    assert not {"lost", "problem"} & {*events}
    assert left_behind() == []


# Limits.


def test_rate_over_many_connections(tmp_path):
    """To come anew does not begin the count anew."""
    answered = 0
    with serving(tmp_path, requests_per_second=20) as server:
        started = time.monotonic()
        for _ in range(200):
            with (
                contextlib.suppress(loopdev.RefusedError),
                loopdev.LoopClient(server.path) as client,
            ):
                client.hello()
                answered += 1
        most = 20 * (time.monotonic() - started) + 25
    assert 10 <= answered <= most


def test_devices_that_are_kept_open_count(tmp_path, file):
    """A descriptor that outlives the lease is no way to have more than is allowed."""
    with serving(tmp_path, devices=3, bytes=48 * MIB) as server:
        with loopdev.LoopClient(server.path) as client:
            kept = [client.attach(file.fileno(), want_fd=True) for _ in range(2)]
        with loopdev.LoopClient(server.path) as client:
            device = client.attach(file.fileno())
            wait_until(lambda: client.hello()["used"]["devices"] == 1)
            with pytest.raises(loopdev.RefusedError) as caught:
                client.attach(file.fileno())
            assert caught.value.errno == errno.EDQUOT
            assert "2 that were given back are still open" in str(caught.value)
            for one in kept:
                one.close_fd()
            wait_until(lambda: not still_kept(client, file))
            device.detach()
    assert left_behind() == []


def still_kept(client: loopdev.LoopClient, file) -> bool:
    try:
        client.attach(file.fileno()).detach()
    except loopdev.RefusedError:
        return True
    return False


# Requests of a client to its own device.

_CLR_FD, _CHANGE_FD, _SET_CAPACITY, _SET_BLOCK_SIZE = 0x4C01, 0x4C06, 0x4C07, 0x4C09
_BLKRRPART, _BLKFLSBUF = 0x125F, 0x1261


@pytest.mark.parametrize("request_", [_CLR_FD, _CHANGE_FD, _SET_CAPACITY, _SET_BLOCK_SIZE, 0])
def test_requests_to_the_device_during_detach(served, image, tmp_path, request_):
    """Whatever a client does to its own device meanwhile: it ends, and nothing is left."""
    other = tmp_path / "other.img"
    with open(other, "wb") as made:
        made.truncate(16 * MIB)
    stop = threading.Event()
    fds: list[int] = []

    def play(swap: int) -> None:
        while not stop.is_set():
            for fd in fds:
                with contextlib.suppress(OSError):
                    if request_ == _CHANGE_FD:
                        fcntl.ioctl(fd, request_, swap)
                    elif request_ == _SET_BLOCK_SIZE:
                        fcntl.ioctl(fd, request_, random.choice((512, 4096)))
                    elif request_:
                        fcntl.ioctl(fd, request_, 0)
                    else:
                        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_EXCL))
            time.sleep(0.0005)

    with open(other, "r+b") as swap, open(image, "r+b") as file:
        thread = threading.Thread(target=play, args=(swap.fileno(),))
        thread.start()
        try:
            for turn in range(12):
                with loopdev.LoopClient(served.path) as client:
                    device = client.attach(file.fileno(), want_fd=True, read_only=turn % 4 == 3)
                    fds[:] = [os.open(f"/proc/self/fd/{device.fileno()}", os.O_RDONLY)]
                    time.sleep(random.random() / 100)
                    fd = fds.pop()
                    if turn % 2:
                        with contextlib.suppress(loopdev.LoopdevError):
                            device.detach(timeout=0.1)
                    device.close_fd()
                os.close(fd)
        finally:
            stop.set()
            thread.join()
    assert cycles(served.path, image, 3) < 5
    wait_until(lambda: loopdev.find(image) == [] and loopdev.find(other) == [])
    assert "lost" not in served.log()


# Files and directories that hang.


def test_many_files_that_hang(tmp_path, image):
    """Two dozen of one user: its other clients go on, and so does the end of it all."""
    with StoppedFuse(tmp_path / "fuse") as fuse, Served(tmp_path, ALL) as served:
        hanging = [Hanging(served.path, fuse.file) for _ in range(24)]
        fuse.mute()
        for client in hanging:
            client.start()
        try:
            wait_until(lambda: len(served.workers()) >= 24, 20)
            assert cycles(served.path, image, 20) < 5
            assert all(client.hangs() for client in hanging)
            served.process.terminate()
            started = time.monotonic()
            assert served.process.wait(20) == 0
            assert time.monotonic() - started < 15
        finally:
            fuse.kill()
            assert {client.end() for client in hanging} == {"BrokerError"}
        # Those that hung have ended by now, and left their numbers to the next start.
        with Served(tmp_path, ALL):
            wait_until(lambda: not any(int(name[4:]) >= FIRST for name in loops()))


def loops() -> list[str]:
    return [name for name in os.listdir("/sys/block") if name.startswith("loop")]


def test_killed_worker_that_hangs(served, tmp_path, image):
    """It is not waited for."""
    with StoppedFuse(tmp_path / "fuse") as fuse:
        hanging = Hanging(served.path, fuse.file)
        fuse.mute()
        before = set(served.workers())
        hanging.start()
        try:
            wait_until(hanging.hangs)
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: len(before & set(served.workers())) <= 1)  # but for the one
            assert cycles(served.path, image, 10) < 5
        finally:
            fuse.kill()
            assert hanging.end() != "attached"


def test_stopped_workers(served, image):
    """Whoever stops some of them, by the debugger or the freezer, holds up what these do alone."""
    workers = served.workers()
    with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
        kept = client.attach(file.fileno())
        os.kill(workers[0], signal.SIGSTOP)
        try:
            threads = [
                threading.Thread(target=cycles, args=(served.path, image, 3), daemon=True)
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            wait_until(lambda: sum(not thread.is_alive() for thread in threads) >= 3)
            client.hello()
        finally:
            os.kill(workers[0], signal.SIGCONT)
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        kept.detach()


@pytest.mark.parametrize("how", ["stop", "mute"])
def test_directory_that_hangs(served, tmp_path, image, how):
    """The nodes of one client cannot be made; its file and all others are free again."""
    place = tmp_path / "dev"
    place.mkdir()
    with StoppedFuse(place, directory=True) as fuse, open(image, "r+b") as file:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            raw.connect(served.path)
            getattr(fuse, how)()
            socket.send_fds(raw, [b'{"v":1,"op":"attach","directory":true}'], [file.fileno(), fd])
            raw.settimeout(0.5)
            with pytest.raises(TimeoutError):
                raw.recv(1000)
            assert cycles(served.path, image, 10) < 5
        finally:
            fuse.kill()
            raw.settimeout(20)
            answer = raw.recv(10000)
            raw.close()
            os.close(fd)
    assert b'"error"' in answer
    wait_until(lambda: loopdev.find(image) == [])


def test_directory_on_fuse_that_makes_nothing(served, tmp_path, file):
    place = tmp_path / "dev"
    place.mkdir()
    with StoppedFuse(place, directory=True), loopdev.LoopClient(served.path) as client:
        fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        with pytest.raises(loopdev.LoopdevError) as caught:
            client.attach(file.fileno(), directory=fd)
        os.close(fd)
        assert caught.value.errno == errno.ENOSYS
        assert client.hello()["used"]["devices"] == 0


# Directories.


@contextlib.contextmanager
def third_directory(place: Path, options: str):
    """Yield a directory in a mount namespace that is nobody's here, and what makes it read-only."""
    place.mkdir()
    remount = f"read line; mount -o remount,ro {place}; echo; read line"
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs {options} none {place}; echo; {remount}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as holder:
        holder.stdout.readline()
        fd = os.open(f"/proc/{holder.pid}/root{place}", os.O_RDONLY)

        def make_read_only() -> None:
            holder.stdin.write("now\n")
            holder.stdout.readline()

        try:
            yield fd, make_read_only
        finally:
            os.close(fd)
            holder.stdin.close()


def test_directory_that_takes_no_devices(served, file, tmp_path):
    """Each failure is cleaned up: no name there, no descriptor here."""
    with third_directory(tmp_path / "third", "-o nodev") as (fd, _):
        with loopdev.LoopClient(served.path) as client:
            counts = []
            for turn in range(12):
                with pytest.raises(loopdev.RefusedError, match="nodev"):
                    client.attach(file.fileno(), directory=fd)
                if turn % 6 == 5:
                    counts.append(sum(descriptors(pid) for pid in served.workers()))
        assert os.listdir(fd) == []
    assert counts[0] == counts[1]


@pytest.mark.parametrize("asked", [False, True])
def test_directory_that_becomes_read_only(tmp_path, image, file, asked):
    """The device ends; its number is not used again while there is a node that opens it."""
    with Served(tmp_path, ALL) as served:
        with third_directory(tmp_path / "third", "") as (fd, make_read_only):
            with loopdev.LoopClient(served.path) as client:
                device = client.attach(file.fileno(), directory=fd)
                make_read_only()
                if asked:
                    with pytest.raises(loopdev.KernelError) as caught:
                        device.detach()
                    assert caught.value.errno == errno.EROFS
                    assert is_bound(device.number)
                    device.sync()
            wait_until(lambda: not is_bound(device.number))
            assert loopdev.find(image) == []
            wait_until(lambda: "is not used again" in served.log())
            assert os.listdir(fd) == [device.name]
            with loopdev.LoopClient(served.path) as client:
                for _ in range(3):
                    numbers = {client.attach(file.fileno()).number for _ in range(3)}
                    assert device.number not in numbers
        served.stop()
        assert loops_of_broker() == [device.name]
        # With the namespace the node is gone, too.
        served.start()
        wait_until(lambda: loops_of_broker() == [])


def loops_of_broker() -> list[str]:
    return [name for name in loops() if int(name[4:]) >= FIRST]


ELSE = """
import json, os, sys
import loopdev
path, image, directory = sys.argv[1:]
fd = os.open(directory, os.O_RDONLY)
with loopdev.LoopClient(path) as client, open(image, "r+b") as file:
    try:
        client.attach(file.fileno(), directory=fd)
        print("attached", os.stat(f"{directory}/loop1000").st_rdev != 0)
    except loopdev.LoopdevError as exc:
        print(type(exc).__name__, exc.errno)
"""


def test_empty_file_of_somebody_else(served, image, tmp_path):
    """Nothing is mounted over a file that the client may not remove."""
    directory = tmp_path / "theirs"
    directory.mkdir(mode=0o755)
    open_to(USER, image)
    directory.chmod(0o755)
    names = [f"loop{number}" for number in range(FIRST, FIRST + 20)]
    for name in names:
        (directory / name).touch(mode=0o644)
    done = as_user(ELSE, served.path, image, directory)
    assert done.stdout.split()[1:] == [str(errno.EACCES)], done.stderr
    assert sorted(os.listdir(directory)) == sorted(names)


# Brokers.


def test_second_broker_with_another_state_file(served, tmp_path, image):
    with (
        pytest.raises(loopdev.BrokerError) as caught,
        loopdev.LoopServer(served.path, state=tmp_path / "other"),
    ):
        pass
    assert caught.value.errno == errno.EADDRINUSE
    assert cycles(served.path, image, 1) < 5
    assert not (tmp_path / "other").exists()


def test_storm_of_reloads(served, image):
    """Policies good and bad, many a second, while devices come and go."""
    bad = ["", "nonsense", "[[rule]]\nuid = 1\nx = 1", "first_number = 1", "[[rule]]\n" * 1000]
    stop = threading.Event()

    def reload() -> None:
        while not stop.is_set():
            temporary = served.policy.with_suffix(".new")
            temporary.write_text(random.choice([ALL, *bad]))
            os.rename(temporary, served.policy)
            for _ in range(20):
                served.process.send_signal(signal.SIGHUP)
            time.sleep(0.001)

    thread = threading.Thread(target=reload)
    thread.start()
    try:
        for _ in range(5):
            assert cycles(served.path, image, 100) < 5
    finally:
        stop.set()
        thread.join()
    assert "policy kept" in served.log()


def test_policy_that_is_a_pipe(served, image):
    served.policy.unlink()
    os.mkfifo(served.policy)
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "policy kept" in served.log())
    assert cycles(served.path, image, 1) < 5


COVERED = """
import json, os, subprocess, sys, time
import loopdev
path, image, directory, how = sys.argv[1:]
child = os.fork()
if child == 0:
    client = loopdev.LoopClient(path)
    with open(image, "r+b") as file:
        device = client.attach(file.fileno(), directory=os.open(directory, os.O_RDONLY))
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
    open(f"{directory}/{device.name}", "w").close()
    if how == "exit":
        os._exit(0)
    os.kill(os.getpid(), 9)
os.waitpid(child, 0)
end = time.monotonic() + 10
while loopdev.find(image) and time.monotonic() < end:
    time.sleep(0.01)
covered = os.listdir(directory)
subprocess.run(["umount", directory], check=True)
while os.listdir(directory) and time.monotonic() < end:
    time.sleep(0.01)
print(json.dumps({"covered": covered, "left": os.listdir(directory)}))
"""


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_directory_that_was_covered(served, image, tmp_path, how):
    """The client has gone, its namespace has not: nothing is left there, below a mount either."""
    directory = tmp_path / "dev"
    directory.mkdir()
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", COVERED, served.path, image, directory, how],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["left"] == []
    assert len(found["covered"]) == 1
    assert "problem" not in served.log()
