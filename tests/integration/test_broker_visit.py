# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A worker that stays with a client: nobody can tell, but by the time that it takes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest
from broker_tools import FIRST, Served, left_behind
from oracle import SLOW, is_bound, losetup, partitions, run, wait_until

import loopdev
from loopdev.kernel import sysfs

ALL = """
[[rule]]
uid = "all"
devices = "unlimited"
requests_per_second = "unlimited"
want_fd = true
partscan = true
"""


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path, ALL) as broker:
        yield broker


@pytest.fixture
def client(served):
    with loopdev.LoopClient(served.path) as connection:
        yield connection


@pytest.fixture
def file(image):
    with open(image, "r+b") as opened:
        yield opened


def events(served: Served, number: int) -> list[str]:
    """Return what the log says of a device, in order."""
    found = re.findall(rf"^(attach|detach) .*number={number}\b", served.log(), re.MULTILINE)
    return list(found)


def test_every_device_is_in_the_log(served, client, file):
    numbers = set()
    for _ in range(300):
        device = client.attach(file.fileno())
        numbers.add(device.number)
        device.detach()
    (number,) = numbers
    wait_until(lambda: events(served, number) == ["attach", "detach"] * 300)
    assert f"pid={os.getpid()}" in served.log()


def test_others_see_at_once_what_was_answered(served, client, file):
    with loopdev.LoopClient(served.path) as other:
        for _ in range(50):
            device = client.attach(file.fileno())
            (entry,) = other.devices()
            assert (entry["number"], entry["diskseq"]) == (device.number, device.lease.diskseq)
            assert other.hello()["used"]["devices"] == 1
            device.detach()
            assert other.devices() == []
            assert other.hello()["used"]["devices"] == 0


def test_it_is_the_device_that_it_says(client, file, image):
    """The oracle sees each one, and the file is free when detach() returns."""
    for size in (4 << 20, 8 << 20, 4 << 20):
        os.truncate(image, size)
        device = client.attach(file.fileno(), read_only=True)
        found = losetup(f"/dev/loop{device.number}")
        assert (found["back-file"], found["ro"]) == (str(image), True)
        assert device.lease.size == size
        device.detach()
        assert not is_bound(device.number)


def test_several_devices_of_one_connection(client, file):
    """The second one is more than a worker keeps for its client."""
    for _ in range(10):
        first = client.attach(file.fileno(), read_only=True)
        second = client.attach(file.fileno(), read_only=True)
        assert first.number != second.number
        first.detach()
        third = client.attach(file.fileno(), read_only=True)
        with pytest.raises(loopdev.NotBoundError):
            first.detach()
        second.detach()
        third.detach()


def test_what_needs_more_goes_another_way(client, image, file, tmp_path):
    """Each request finds the device of the one before, whoever has answered that."""
    nodes = os.open(tmp_path, os.O_RDONLY)
    try:
        for options in ({"want_fd": True}, {"partscan": True}, {"directory": nodes}):
            client.attach(file.fileno()).detach()
            with client.attach(file.fileno()) as device:
                device.sync()
                assert client.hello()["version"] == 1
                assert device.resize() == os.path.getsize(image)
            with client.attach(file.fileno(), **options):
                pass
    finally:
        os.close(nodes)


def test_errors_in_between(client, file):
    for _ in range(3):
        device = client.attach(file.fileno())
        with pytest.raises(loopdev.InvalidValueError):
            client.attach(file.fileno(), sector_size=3)
        device.detach()
        client.attach(file.fileno()).detach()
        reader, writer = os.pipe()
        with pytest.raises(loopdev.BackingFileError):
            client.attach(reader)
        os.close(reader)
        os.close(writer)
        with pytest.raises(loopdev.NotBoundError):
            device.detach()


def test_partitions_that_somebody_has_added(client, file):
    """Not those of a table, and not there when it was attached: they go with the device."""
    device = client.attach(file.fileno())
    run("addpart", f"/dev/{device.name}", "1", "8", "16")
    assert partitions(device.number) == {1: (4096, 8192)}
    assert sysfs.has_partitions(device.number)
    device.detach()
    assert not is_bound(device.number)
    assert partitions(device.number) == {}
    with client.attach(file.fileno()) as again:
        assert not sysfs.has_partitions(again.number)


def test_a_busy_device_stays(client, file):
    client.attach(file.fileno()).detach()
    device = client.attach(file.fileno())
    with open(f"/dev/loop{device.number}", "rb"):
        with pytest.raises(loopdev.DeviceBusyError) as caught:
            device.detach(timeout=0.05)
        assert [holder.pid for holder in caught.value.holders] == [os.getpid()]
    assert is_bound(device.number)
    device.detach()
    assert not is_bound(device.number)


@pytest.mark.parametrize(
    "message",
    [b"{", b"", b'{"v":1,"op":"detach","number":1}', b'{"v":2,"op":"attach"}', b"x" * 20000],
)
def test_nonsense_in_between(served, image, message):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(served.path)
        with open(image, "r+b") as file:
            socket.send_fds(connection, [b'{"v":1,"op":"attach"}'], [file.fileno()])
        device = json.loads(connection.recv(10000))["result"]
        connection.send(message)
        reply = connection.recv(10000)
        if message:
            assert json.loads(reply)["error"]["type"] in ("LocalProtocolError", "NotBoundError")
        else:
            assert reply == b""  # taken for the end
    wait_until(lambda: not is_bound(device["number"]))


def test_descriptors_with_a_detach_are_refused(served, image):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(served.path)
        with open(image, "r+b") as file:
            socket.send_fds(connection, [b'{"v":1,"op":"attach"}'], [file.fileno()])
            device = json.loads(connection.recv(10000))["result"]
            request = {"v": 1, "op": "detach"}
            request |= {name: device[name] for name in ("number", "diskseq")}
            socket.send_fds(connection, [json.dumps(request).encode()], [file.fileno()])
        assert "no descriptor belongs" in connection.recv(10000).decode()
        assert is_bound(device["number"])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_the_worker_ends(served, image, end):
    """Its client loses its lease; the device is freed when the worker is."""
    before = set(served.workers())
    with loopdev.LoopClient(served.path, timeout=2 * SLOW) as client, open(image, "r+b") as file:
        client.attach(file.fileno()).detach()
        device = client.attach(file.fileno())
        for pid in before:
            os.kill(pid, end)
        with pytest.raises((loopdev.BrokerError, loopdev.WaitTimeoutError)):
            client.hello()
    for pid in before:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_bound(device.number))
    wait_until(lambda: len(set(served.workers()) - before) >= 1)
    with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
        client.attach(file.fileno()).detach()


def test_more_clients_than_workers(served, image):
    """Who comes gets a worker that stays with another."""
    failures = []

    def cycles() -> None:
        try:
            with loopdev.LoopClient(served.path) as client, open(image, "rb") as file:
                for _ in range(40):
                    client.attach(file.fileno()).detach(timeout=30)
        except loopdev.LoopdevError as exc:
            failures.append(exc)

    threads = [threading.Thread(target=cycles) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    wait_until(lambda: served.log().count("\nattach ") == 12 * 40)


def test_a_client_that_is_killed(served, image):
    script = (
        "import sys, loopdev\n"
        "with loopdev.LoopClient(sys.argv[1]) as client, open(sys.argv[2], 'rb') as file:\n"
        "    client.attach(file.fileno()).detach()\n"
        "    print(client.attach(file.fileno()).number, flush=True)\n"
        "    input()\n"
    )
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, served.path, image],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        number = int(process.stdout.readline())
        process.kill()
        process.communicate()
        wait_until(lambda number=number: not is_bound(number))


def test_limits_count_what_a_worker_allowed(tmp_path, file):
    """No more requests than the policy has, and none of them lost."""
    policy = loopdev.Policy(rules=(loopdev.Rule(requests_per_second=50),))
    with (
        loopdev.LoopServer(tmp_path / "s", policy) as server,
        loopdev.LoopClient(server.path) as client,
    ):
        done, began = 0, time.monotonic()
        with pytest.raises(loopdev.RefusedError) as caught:
            for _ in range(1000):
                client.attach(file.fileno()).detach()
                done += 1
        assert caught.value.errno == errno.EAGAIN
        allowed = 50 * (1 + time.monotonic() - began)
        assert 50 <= 2 * done + 1 <= allowed + 1  # two requests each


def test_a_new_policy_counts_at_once(served, client, file):
    client.attach(file.fileno()).detach()
    served.policy.write_text('[[rule]]\nuid = "all"\nread_only = true\n')
    served.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload" in served.log() or "policy" in served.log())
    with pytest.raises(loopdev.RefusedError, match="only read-only"):
        client.attach(file.fileno())


def test_a_stop_does_not_wait_for_a_visit(tmp_path, image):
    with Served(tmp_path, ALL) as served:
        client = loopdev.LoopClient(served.path)
        with open(image, "rb") as file:
            client.attach(file.fileno()).detach()
            client.attach(file.fileno())
        served.stop()
        client.close()
    assert not is_bound(FIRST)
    assert left_behind() == []


def test_workers_have_died_when_a_request_comes(served, image):
    """That they have is heard of together with the request, which goes to another one."""
    for _ in range(5):
        with loopdev.LoopClient(served.path, timeout=10 * SLOW) as client, open(image) as file:
            client.hello()
            workers = served.workers()
            served.process.send_signal(signal.SIGSTOP)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
                wait_until(lambda pid=pid: Path(f"/proc/{pid}/cmdline").read_bytes() == b"")
            asking = threading.Thread(target=lambda: client.attach(file.fileno()).detach())
            asking.start()
            wait_until(lambda: waits_for_an_answer(client.fileno()))
            served.process.send_signal(signal.SIGCONT)
            asking.join(10 * SLOW)
            assert served.log().count("lost") == 0


def waits_for_an_answer(fd: int) -> bool:
    """Return whether what was sent on a connection is still there."""
    return struct.unpack("i", fcntl.ioctl(fd, termios.TIOCOUTQ, bytes(4)))[0] > 0


def test_a_lock_that_somebody_has_for_a_moment(client, file):
    """As udev has one when it looks at a device that was just detached."""
    device = client.attach(file.fileno())
    device.detach()
    other = os.open(f"/dev/{device.name}", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    closing = threading.Timer(0.3, os.close, [other])
    closing.start()
    began = time.monotonic()
    with client.attach(file.fileno(), lock=True) as again:
        assert again.number == device.number
        assert time.monotonic() - began > 0.2
    closing.join()
