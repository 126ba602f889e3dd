# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Maps of a snapshot on a server: beside one in a directory, and over a link with a delay.

The server is that of the tests, on this machine, so it takes its share of the processors, and so
does what delays packets. Where that bounds the reads of full chunks, the row says what bare
processes reach, which do nothing but receive, check and decode the same chunks.

The disk has two halves. One is as disks are, of which a part was never written: of 8 chunks 5 are
full, 1 is nearly empty, and 2 are zeros. In the other one all are full. A full chunk is what those
of an ext4 filesystem with /usr of a Debian system are: encoded it has 1.5 MB (those 0.5 to 4.2, and
1.5 on average), and zstd takes longer for it than SHA-256 does.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

from measure import Row, pairs, timed

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from slow_link import SERVER_ADDRESS, SlowLink  # noqa: E402

HALF = 1 << 30
CHUNK = 4 << 20
ALL, FULL = 0, HALF  # where to begin: all is read from there to the end
UNIT = 64 << 10  # each has 19 KiB that do not compress
DELAY = 0.02  # seconds, in one direction of the two: that is the round trip
COMMAND = [str(Path(sys.executable).with_name("loopdev"))]
PASSWORD = "correct horse"  # of the test server
NAME = f"bench-{os.getpid()}"
IMAGE = "vm/100/2024-01-02T03:04:05Z/disk.img"
# Not much: memory that is fresh takes up to 10 ms for 4 MiB where a machine is a virtual one, whose
# host takes back what is free. So little is taken once, and then used again.
CACHE = ("--cache-limit", "128M")
# So many processes for so many bare reads at a time.
BARE = {16: (8, 2), 1: (1, 1)}


class Server:
    """The test server, in a namespace or not."""

    def __init__(self, store: Path, directory: Path, link: SlowLink | None = None) -> None:
        host = "127.0.0.1" if link is None else SERVER_ADDRESS
        program = [sys.executable, str(ROOT / "tests/pbs_server.py"), str(store), "--forks"]
        program += ["--host", host, "--directory", str(directory)]
        program += ["--congestion", "cubic"]  # as Linux comes, whatever this machine prefers
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
        command = [
            *COMMAND,
            "map",
            "--name",
            NAME,
            *CACHE,
            "--repository",
            self.repository,
            *options,
        ]
        return self._run(*command, IMAGE)

    def bare_reads(self, depth: int, numbers: list[int]) -> float:
        """Return how many chunks a second bare processes read."""
        program = [sys.executable, str(ROOT / "benchmarks/bare_reads.py"), self.repository, IMAGE]
        return float(self._run(*program, *map(str, (*BARE[depth], *numbers))))

    def _run(self, *command: str) -> str:
        words = [*command]
        if self._link is not None:
            words = self._link.command(self._link.client, *command)
        done = subprocess.run(
            words, env=self._environment, stdout=subprocess.PIPE, text=True, check=True
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
    command = [*COMMAND, "map", "--name", NAME, *CACHE, "--repository", str(store)]
    return subprocess.run(
        [*command, IMAGE], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def read(device: str, start: int) -> float:
    """Return how many bytes a second are read from there to the end, past the device's cache."""
    buffer = mmap.mmap(-1, 1 << 20)
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)

    def all_of_it() -> None:
        for offset in range(start, 2 * HALF, len(buffer)):
            os.preadv(fd, [buffer], offset)

    try:
        return (2 * HALF - start) / timed(all_of_it)
    finally:
        os.close(fd)


def some_chunks(start: int, count: int) -> list[int]:
    """Return the numbers of chunks from there to the end, at random."""
    return random.sample(range(start // CHUNK, 2 * HALF // CHUNK), count)


def random_reads(device: str, depth: int, numbers: list[int]) -> float:
    """Return how many reads of 4 KiB a second there are, each of another chunk."""
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
        return len(numbers) / timed(all_of_them)
    finally:
        os.close(fd)


def full_chunk(lines: list[bytes]) -> bytes:
    """Return a chunk as those in use are; none is twice the same."""
    parts = []
    for _ in range(CHUNK // UNIT):
        # A few lines are common, as in all that people and compilers write.
        text = b"".join(lines[int(random.paretovariate(0.5)) % len(lines)] for _ in range(1400))
        parts.append((os.urandom(19 << 10) + text)[:UNIT].ljust(UNIT))
    return b"".join(parts)


def chunks() -> Iterator[bytes]:
    """Yield the disk's chunks.

    The first one has a boot sector, a partition table and a loader in it, and is empty else. (To
    send 1.5 MB by a new TCP connection takes six round trips more, whoever asks for it.)
    """
    letters = b"etaoinshrdlu"
    lines = [bytes(random.choices(letters, k=random.randint(8, 80))) for _ in range(4000)]
    for number in range(HALF // CHUNK):
        if number % 8 < 2:
            yield b"" if number % 8 else os.urandom(64 << 10)
        else:
            yield b"" if number % 8 == 5 else full_chunk(lines)
    for _ in range(HALF // CHUNK):
        yield full_chunk(lines)


def make_store(directory: Path) -> Path:
    """Pack the disk."""
    image, store = directory / "disk.img", directory / "store"
    with open(image, "wb") as file:
        file.writelines(chunk.ljust(CHUNK, b"\0") for chunk in chunks())
    command = [*COMMAND, "pack", f"disk={image}", "--repository", str(store), "--id", "vm/100"]
    command += ["--time", "2024-01-02T03:04:05Z", "--create-store"]
    subprocess.run(command, check=True, capture_output=True)
    image.unlink()
    return store


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the rows."""
    rounds = min(rounds, 7)
    store = make_store(directory)
    rows = [_loopback(store, directory, rounds, start) for start in (ALL, FULL)]
    with SlowLink(f"h{os.getpid()}") as link:
        server = Server(store, directory, link)
        try:
            how = "netem" if link.netem else "TUN"
            rows += [_sequential(server, link, rounds, how, start) for start in (ALL, FULL)]
            rows.append(_random(server, link, rounds, how, ALL))
            rows += _random_full(server, link, rounds, how)
            rows.append(_first_byte(server, link, rounds, how))
        finally:
            server.close()
    return rows


def _figure(values: list[float]) -> str:
    return f"{median(values) / 1e6:.0f} MB/s"


def _what(text: str, start: int) -> str:
    return text + (", full chunks" if start == FULL else "")


def _loopback(store: Path, directory: Path, rounds: int, start: int) -> Row:
    server = Server(store, directory)

    def measured(device: str) -> float:
        try:
            return read(device, start)
        finally:
            unmap()

    try:
        mine, others, ratios = pairs(
            lambda: measured(server.map()), lambda: measured(map_local(store)), rounds
        )
    finally:
        server.close()
    what = _what("map from a server over loopback, sequential, cold", start)
    return Row(what, "of a directory", _figure(mine), _figure(others), ratios, 0.6, at_most=False)


def _mapped(server: Server, link: SlowLink, delay: float, use: Callable[[str], float]) -> float:
    # Before it connects: what TCP has learnt of a link should still be true.
    link.set(delay)
    device = server.map()
    try:
        return use(device)
    finally:
        link.set(0)
        unmap()


def _sequential(server: Server, link: SlowLink, rounds: int, how: str, start: int) -> Row:
    def measured(delay: float) -> float:
        return _mapped(server, link, delay, lambda device: read(device, start))

    mine, others, ratios = pairs(lambda: measured(DELAY / 2), lambda: measured(0), rounds)
    what = _what(f"map from a server, 20 ms away ({how}), sequential", start)
    return Row(what, "no delay", _figure(mine), _figure(others), ratios, 0.8, at_most=False)


def _per_second(values: list[float]) -> str:
    return f"{median(values):.0f}/s"


def _random_at(server: Server, link: SlowLink, depth: int, start: int) -> float:
    numbers = some_chunks(start, 192 if depth > 1 else 48)
    return _mapped(server, link, DELAY / 2, lambda device: random_reads(device, depth, numbers))


def _bare_at(server: Server, link: SlowLink, depth: int) -> float:
    link.set(DELAY / 2)
    try:
        return server.bare_reads(depth, some_chunks(FULL, 192 if depth > 1 else 48))
    finally:
        link.set(0)


def _random(server: Server, link: SlowLink, rounds: int, how: str, start: int) -> Row:
    mine, others, ratios = pairs(
        lambda: _random_at(server, link, 16, start),
        lambda: _random_at(server, link, 1, start),
        rounds,
    )
    what = _what(f"the same, random 4 KiB reads, depth 16 ({how})", start)
    figures = (_per_second(mine), _per_second(others))
    return Row(what, "depth 1", *figures, ratios, 10, at_most=False)


def _random_full(server: Server, link: SlowLink, rounds: int, how: str) -> list[Row]:
    """Return that row for full chunks, and how near the depth is to what can be had."""
    row = _random(server, link, rounds, how, FULL)
    *_, ratios = pairs(
        lambda: _bare_at(server, link, 16), lambda: _bare_at(server, link, 1), rounds
    )
    row = replace(row, peer=f"depth 1 (bare processes: {median(ratios):.1f})")
    mine, others, ratios = pairs(
        lambda: _random_at(server, link, 16, FULL), lambda: _bare_at(server, link, 16), rounds
    )
    figures = (_per_second(mine), _per_second(others))
    beside = Row(row.what, "bare processes, depth 16", *figures, ratios, 0.7, at_most=False)
    return [row, beside]


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
