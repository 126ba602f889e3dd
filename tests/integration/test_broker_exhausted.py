# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A broker that has run out of something refuses what is new, and goes on with the rest."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from broker_tools import Served, descriptors, left_behind
from oracle import is_bound, wait_until

import loopdev

ALL = """
[[rule]]
uid = "all"
connections = 100000
devices = "unlimited"
requests_per_second = "unlimited"
"""


@pytest.fixture
def file(image):
    with open(image, "r+b") as opened:
        yield opened


def limit_descriptors(served: Served, most: int) -> None:
    _, hard = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (most, hard))


@pytest.fixture
def limited(tmp_path):
    """A broker that may have a hundred descriptors."""
    with Served(tmp_path, ALL, launcher=("prlimit", "--nofile=100:100")) as broker:
        yield broker


def test_descriptors_for_devices(limited, file):
    """One device too many is refused; the others stay, and when they go there is room again."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(loopdev.LoopClient(limited.path)) for _ in range(10)]
        devices = []
        with pytest.raises(loopdev.RefusedError, match="no descriptors left") as caught:
            for turn in range(100):
                options = {"want_fd": turn % 2 == 1}
                devices.append(clients[turn % 10].attach(file.fileno(), **options))
        assert caught.value.errno == errno.EMFILE
        assert len(devices) > 20
        assert all(is_bound(device.number) for device in devices)
        assert all(client.hello()["used"]["devices"] == len(devices) for client in clients)
        for device in devices:
            device.detach()
        clients[0].attach(file.fileno(), want_fd=True).detach()


def test_descriptors_for_connections(limited, file):
    """Who comes when there is no room waits; who is there is served."""
    waiting = []
    with loopdev.LoopClient(limited.path) as client:
        for _ in range(150):
            waiting.append(loopdev.LoopClient(limited.path))
            waiting[-1].fileno()
        wait_until(lambda: "accept: Too many open files" in limited.log())
        with pytest.raises(loopdev.RefusedError, match="no descriptors left"):
            client.attach(file.fileno())
        client.hello()
        for other in waiting:
            other.close()
        wait_until(lambda: descriptors(limited.process.pid) < 40)
        client.attach(file.fileno()).detach()
    assert limited.log().count("accept: Too many open files") < 5


def test_results_for_which_there_is_no_room(tmp_path, file):
    """A limit that was lowered below what there is: a client is cut off, nothing is left of it."""
    with Served(tmp_path, ALL) as served:
        with loopdev.LoopClient(served.path) as client, loopdev.LoopClient(served.path) as other:
            kept = other.attach(file.fileno())
            limit_descriptors(served, descriptors(served.process.pid))
            with pytest.raises(loopdev.LoopdevError):
                for _ in range(10):
                    client.attach(file.fileno(), want_fd=True)
            assert is_bound(kept.number)
            limit_descriptors(served, 1000)
            kept.detach()
            other.attach(file.fileno(), want_fd=True).detach()
        with loopdev.LoopClient(served.path) as client:
            client.attach(file.fileno(), want_fd=True).detach()


@pytest.fixture
def cgroup():
    """A control group that counts processes."""
    for root in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup"):
        place = Path(root, f"loopdev-test-{os.getpid()}")
        try:
            place.mkdir()
        except OSError:
            continue
        if (place / "pids.max").exists():
            break
        place.rmdir()
    else:
        pytest.skip("there is no control group that counts processes")
    yield place
    wait_until(lambda: (place / "cgroup.procs").read_text() == "")
    place.rmdir()


def test_processes(tmp_path, file, cgroup):
    """Without workers, and with no process to be started, requests wait for better times."""
    with Served(tmp_path, ALL) as served:
        (cgroup / "cgroup.procs").write_text(str(served.process.pid))
        (cgroup / "pids.max").write_text("1")
        for pid in served.workers():
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: served.workers() == [])
        with loopdev.LoopClient(served.path) as client, loopdev.LoopClient(served.path) as other:
            made: list[loopdev.LeasedDevice] = []
            thread = threading.Thread(target=lambda: made.append(client.attach(file.fileno())))
            thread.start()
            wait_until(lambda: int((cgroup / "pids.events").read_text().split()[1]) > 2)
            other.hello()
            assert made == []
            (cgroup / "pids.max").write_text("max")
            thread.join(10)
            assert is_bound(made[0].number)


@pytest.fixture
def small(tmp_path):
    """A filesystem of two pages."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def fill(place: Path) -> Path:
    """Use up a filesystem, and return what is to be removed for room."""
    path = place / "filler"
    with open(path, "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(64)):
            pass
    return path


def test_state_file_on_a_full_filesystem(tmp_path, small, file):
    """A number that cannot be written down is not used; what there is can be given back."""
    with loopdev.LoopServer(tmp_path / "s", state=small / "state") as server:
        with loopdev.LoopClient(server.path) as client, loopdev.LoopClient(server.path) as other:
            filler = fill(small)
            devices = []
            with pytest.raises(loopdev.RefusedError, match="cannot be written") as caught:
                devices.extend(client.attach(file.fileno()) for _ in range(200))
            assert caught.value.errno == errno.ENOSPC
            assert other.hello()["used"]["devices"] == len(devices)
            assert all(is_bound(device.number) for device in devices)
            for device in devices:
                device.detach()
            filler.unlink()
            client.attach(file.fileno()).detach()
            other.attach(file.fileno())
    assert left_behind() == []
    assert os.listdir(small) == []


def test_nodes_that_cannot_be_written_down(tmp_path, small, file):
    """What a SIGKILL would leave in a client's directory is not made."""
    nodes = tmp_path / "dev"
    nodes.mkdir()
    directory = os.open(nodes, os.O_RDONLY)
    with (
        loopdev.LoopServer(tmp_path / "s", state=small / "state") as server,
        loopdev.LoopClient(server.path) as client,
    ):
        client.attach(file.fileno()).detach()  # its number is used again
        fill(small)
        # What is left of the last page.
        with contextlib.suppress(loopdev.RefusedError):
            for _ in range(100):
                client.attach(file.fileno()).detach()
        before = client.hello()["used"]
        with pytest.raises(loopdev.RefusedError, match="cannot be written"):
            for _ in range(100):
                client.attach(file.fileno(), directory=directory).detach()
        assert os.listdir(nodes) == []
        assert client.hello()["used"] == before
    os.close(directory)
    assert left_behind() == []
