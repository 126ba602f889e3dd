# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Maps of a snapshot on a server: beside one in a directory, and over a link with a delay.

The server is that of the tests, on this machine, so it takes its share of the processors.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median

from measure import Row, pairs, timed

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from slow_link import SERVER_ADDRESS, SlowLink  # noqa: E402

SIZE = 1 << 30
CHUNK = 4 << 20
DELAY = 0.02  # seconds, in one direction of the two: that is the round trip
COMMAND = [str(Path(sys.executable).with_name("loopdev"))]
PASSWORD = "correct horse"  # of the test server
NAME = f"bench-{os.getpid()}"


class Server:
    """The test server, in a namespace or not."""

    def __init__(self, store: Path, directory: Path, link: SlowLink | None = None) -> None:
        host = "127.0.0.1" if link is None else SERVER_ADDRESS
        program = [sys.executable, str(ROOT / "tests/pbs_server.py"), str(store), "--forks"]
        program += ["--host", host, "--directory", str(directory)]
        self._link = link
        command = program if link is None else link.command(link.server, *program)
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        port, fingerprint = self._process.stdout.readline().split()
        self.repository = f"backup@pbs@{host}:{port}:store1"
        self._environment = {
            **os.environ,
            "PBS_PASSWORD": PASSWORD,
            "PBS_FINGERPRINT": fingerprint,
        }

    def map(self, *options: str) -> str:
        """Map the image, and return the device."""
        command = [*COMMAND, "map", "--name", NAME, "--repository", self.repository, *options]
        command.append("vm/100/2024-01-02T03:04:05Z/disk.img")
        if self._link is not None:
            command = self._link.command(self._link.client, *command)
        done = subprocess.run(
            command, env=self._environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.strip()

    def close(self) -> None:
        """End it, and the processes of its connections."""
        os.killpg(self._process.pid, 15)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def unmap() -> None:
    subprocess.run([*COMMAND, "unmap", "--force", NAME], check=True)


def map_local(store: Path) -> str:
    command = [*COMMAND, "map", "--name", NAME, "--repository", str(store)]
    command.append("vm/100/2024-01-02T03:04:05Z/disk.img")
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def read(device: str, size: int = SIZE) -> float:
    """Return how many bytes of a device are read in a second, from its start, past its cache."""
    buffer = mmap.mmap(-1, 1 << 20)
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)

    def all_of_it() -> None:
        for offset in range(0, size, len(buffer)):
            os.preadv(fd, [buffer], offset)

    try:
        return size / timed(all_of_it)
    finally:
        os.close(fd)


def random_reads(device: str, depth: int, count: int) -> float:
    """Return how many reads of 4 KiB a second there are, each of another chunk."""
    numbers = random.sample(range(SIZE // CHUNK), count)
    offsets = iter([n * CHUNK + random.randrange(CHUNK // 4096) * 4096 for n in numbers])
    lock = threading.Lock()
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)

    def work() -> None:
        buffer = mmap.mmap(-1, 4096)
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            os.preadv(fd, [buffer], offset)

    threads = [threading.Thread(target=work) for _ in range(depth)]

    def all_of_them() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    try:
        return count / timed(all_of_them)
    finally:
        os.close(fd)


def make_store(directory: Path) -> Path:
    """Pack an image as disks are: half of it compresses, and none of it twice the same.

    The first chunk has a boot sector, a partition table and a loader in it, and is empty else. (To
    send 2 MiB by a new TCP connection takes six round trips more, whoever asks for it.)
    """
    image, store = directory / "disk.img", directory / "store"
    with open(image, "wb") as file:
        file.write(os.urandom(64 << 10).ljust(CHUNK, b"\0"))
        for _ in range((SIZE - CHUNK) >> 16):
            half = os.urandom(32 << 10)
            file.write(half + bytes(32 << 10))
    command = [*COMMAND, "pack", f"disk={image}", "--repository", str(store), "--id", "vm/100"]
    command += ["--time", "2024-01-02T03:04:05Z", "--create-store"]
    subprocess.run(command, check=True, capture_output=True)
    image.unlink()
    return store


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the rows."""
    rounds = min(rounds, 7)
    store = make_store(directory)
    rows = [_loopback(store, directory, rounds)]
    with SlowLink(f"h{os.getpid()}") as link:
        server = Server(store, directory, link)
        try:
            how = "netem" if link.netem else "TUN"
            rows += [
                _sequential(server, link, rounds, how),
                _random(server, link, rounds, how),
                _first_byte(server, link, rounds, how),
            ]
        finally:
            server.close()
    return rows


def _figure(values: list[float]) -> str:
    return f"{median(values) / 1e6:.0f} MB/s"


def _loopback(store: Path, directory: Path, rounds: int) -> Row:
    server = Server(store, directory)

    def measured(device: str) -> float:
        try:
            return read(device)
        finally:
            unmap()

    try:
        mine, others, ratios = pairs(
            lambda: measured(server.map()), lambda: measured(map_local(store)), rounds
        )
    finally:
        server.close()
    what = "map from a server over loopback, sequential, cold"
    return Row(what, "of a directory", _figure(mine), _figure(others), ratios, 0.6, at_most=False)


def _sequential(server: Server, link: SlowLink, rounds: int, how: str) -> Row:
    def measured(delay: float) -> float:
        link.set(delay)
        device = server.map()
        try:
            return read(device)
        finally:
            link.set(0)
            unmap()

    mine, others, ratios = pairs(lambda: measured(DELAY / 2), lambda: measured(0), rounds)
    what = f"map from a server, 20 ms away ({how}), sequential"
    return Row(what, "no delay", _figure(mine), _figure(others), ratios, 0.8, at_most=False)


def _random(server: Server, link: SlowLink, rounds: int, how: str) -> Row:
    def measured(depth: int, count: int) -> float:
        # Before it connects: what TCP has learnt of a link should still be true.
        link.set(DELAY / 2)
        device = server.map()
        try:
            return random_reads(device, depth, count)
        finally:
            link.set(0)
            unmap()

    mine, others, ratios = pairs(lambda: measured(16, 192), lambda: measured(1, 32), rounds)
    what = f"the same, random 4 KiB reads, depth 16 ({how})"
    figures = (f"{median(mine):.0f}/s", f"{median(others):.0f}/s")
    return Row(what, "depth 1", *figures, ratios, 10, at_most=False)


def _first_byte(server: Server, link: SlowLink, rounds: int, how: str) -> Row:
    def measured(delay: float) -> float:
        link.set(delay)
        begin = time.perf_counter()
        try:
            device = server.map()
            with open(device, "rb", buffering=0) as file:
                file.read(512)
            return time.perf_counter() - begin
        finally:
            link.set(0)
            unmap()

    mine, others, _ = pairs(lambda: measured(DELAY / 2), lambda: measured(0), rounds)
    trips = tuple((a - b) / DELAY for a, b in zip(mine, others, strict=True))
    what = f"round trips to the first byte, 20 ms ({how})"
    figures = (f"{median(mine) * 1e3:.0f} ms", f"{median(others) * 1e3:.0f} ms")
    return Row(what, "no delay", *figures, trips, 8, at_most=True)
