# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The broker: one cycle beside the same call in process, a storm of clients, idle leases."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from measure import Row, make_image, pairs

import loopdev

CYCLES = 200
CLIENTS = 200
CYCLES_OF_CLIENT = 20
LEASES = 10_000
DEVICES = 500
KIB = 1024
# Descriptors that a process needs beside its connections.
SPARE = 300

CLIENT = """
import os, sys
import loopdev
with loopdev.LoopClient(sys.argv[1]) as client, open(sys.argv[2], "r+b") as file:
    print("ready", flush=True)
    sys.stdin.read()
    for _ in range(int(sys.argv[3])):
        client.attach(file.fileno()).detach(timeout=60)
"""


@contextlib.contextmanager
def broker(directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a broker in a process of its own, as it runs as a service."""
    path = directory / "broker.sock"
    command = Path(sys.executable).with_name("loopdev")
    with open(directory / "broker.log", "wb") as log:
        process = subprocess.Popen([command, "serve", "--socket", path], stderr=log)
    try:
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.3)  # its workers start
        yield process
    finally:
        process.terminate()
        if process.wait(30) != 0:
            raise SystemExit((directory / "broker.log").read_text())


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the rows; each figure of a cycle is the median of 200."""
    rows = []
    image = make_image(directory / "disk.img", 64 << 20)
    path = str(directory / "broker.sock")
    with broker(directory) as process:
        # First of all, while no memory that others have given back could be used for it.
        rows.append(_idle_with_devices(process.pid, path, str(image)))
        rows.append(_idle(process.pid, path))
        rows.append(_cycle(path, str(image), rounds))
        rows.append(_storm(process.pid, path, directory, rounds))
    return rows


def _cycle(path: str, image: str, rounds: int) -> Row:
    fd = os.open(image, os.O_RDWR)
    try:
        with loopdev.LoopClient(path) as client:

            def ours() -> float:
                return _median(lambda: client.attach(fd).detach())

            def theirs() -> float:
                return _median(lambda: loopdev.attach(fd).detach())

            mine, others, ratios = pairs(ours, theirs, rounds)
    finally:
        os.close(fd)
    return Row(
        "attach + detach by the broker",
        "in process",
        f"{statistics.median(mine) * 1e6:.0f} us",
        f"{statistics.median(others) * 1e6:.0f} us",
        ratios,
        3,
        at_most=True,
    )


def _median(call) -> float:
    times = []
    for _ in range(CYCLES):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _storm(broker_pid: int, path: str, directory: Path, rounds: int) -> Row:
    """200 clients at once, 20 cycles each: all succeed, and nothing is left of them."""
    images = [str(make_image(directory / f"{i}.img", 16 << 20)) for i in range(8)]
    _run_clients(path, images, 20)  # so that all there is of code and buffers is there
    _settle(broker_pid)
    before = resident(broker_pid)
    descriptors, devices = _descriptors(broker_pid), _numbers()
    took = [_run_clients(path, images, CLIENTS) for _ in range(max(1, rounds // 5))]
    _settle(broker_pid)
    left = _numbers() - devices
    if left or _descriptors(broker_pid) > descriptors:
        raise SystemExit(f"broker: left behind: {left}, descriptors {_descriptors(broker_pid)}")
    grown = resident(broker_pid) - before
    rate = CLIENTS * CYCLES_OF_CLIENT / statistics.median(took)
    return Row(
        f"broker: {CLIENTS} clients x {CYCLES_OF_CLIENT} cycles, memory kept",
        f"10 MiB; {rate:.0f} cycles/s",
        f"{grown / KIB:.0f} KiB",
        "10240 KiB",
        (max(0, grown) / (10 << 20),),
        1,
        at_most=True,
    )


def _run_clients(path: str, images: list[str], count: int) -> float:
    """Return how long it takes until the last has done its cycles."""
    words = [sys.executable, "-c", CLIENT, path]
    clients = [
        subprocess.Popen(
            [*words, images[index % len(images)], str(CYCLES_OF_CLIENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for index in range(count)
    ]
    for client in clients:
        client.stdout.readline()
    start = time.perf_counter()
    for client in clients:
        client.stdin.close()
    failed = sum(client.wait() != 0 for client in clients)
    took = time.perf_counter() - start
    for client in clients:
        client.stdout.close()
    if failed:
        raise SystemExit(f"broker: {failed} of {count} clients failed")
    return took


def _settle(pid: int) -> None:
    """Wait until the broker has removed what it had kept to be used again."""
    deadline = time.monotonic() + 120
    few = max(2, os.cpu_count() or 1)
    while any(number >= 1000 for number in _numbers()) or len(_family(pid)) > few + 1:
        if time.monotonic() > deadline:
            raise SystemExit("broker: it does not come to rest")
        time.sleep(0.1)


def _quiet(pid: int) -> None:
    """Wait until there are no more workers than without need."""
    while len(_family(pid)) > max(2, os.cpu_count() or 1) + 1:
        time.sleep(0.1)


def _idle(broker_pid: int, path: str) -> Row:
    """Leases that do nothing, as many as descriptors allow, held by one other process."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = min(LEASES, hard - SPARE)
    before = resident(broker_pid)
    connections = []
    try:
        for _ in range(count):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect(path)
            connections.append(connection)
        for connection in connections:
            connection.send(b'{"v":1,"op":"hello"}')
            connection.recv(10000)
        each = (resident(broker_pid) - before) / count
    finally:
        for connection in connections:
            connection.close()
    return _memory(f"broker: {count} idle leases, memory of each", each)


def _idle_with_devices(broker_pid: int, path: str, image: str) -> Row:
    """The same with a device each; fewer, since removing those takes the kernel 40 ms."""
    before = resident(broker_pid)
    clients = []
    try:
        with open(image, "r+b") as file:
            for _ in range(DEVICES):
                clients.append(loopdev.LoopClient(path))
                clients[-1].attach(file.fileno())
        _quiet(broker_pid)
        each = (resident(broker_pid) - before) / DEVICES
    finally:
        for client in clients:
            client.close()
    _settle(broker_pid)
    return _memory(f"broker: {DEVICES} leases with a device, memory of each", each)


def _memory(what: str, each: float) -> Row:
    return Row(
        what,
        "20 KiB",
        f"{each / KIB:.2f} KiB",
        "20 KiB",
        (each / (20 * KIB),),
        1,
        at_most=True,
    )


def resident(pid: int) -> int:
    """Return the resident memory of a broker and its workers, in bytes."""
    total = 0
    for each in _family(pid):
        with open(f"/proc/{each}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * KIB
    return total


def _family(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    return [pid, *map(int, found.split())]


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _numbers() -> set[int]:
    return {int(name[4:]) for name in os.listdir("/sys/block") if name.startswith("loop")}
