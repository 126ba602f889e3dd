# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Random reads of a map whose workers are killed all the time, beside one that is left alone.

Each read is compared with the image, so one that fails, or is wrong, ends the benchmark.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from maps import MIB, make_disk, mapped, packed, processes
from measure import Row, pairs

SIZE = 128 * MIB
SECONDS = 10.0
KILLS = 50  # in a second
READERS = 4
LENGTH = 16 << 10
TIMEOUT = 60.0  # of one read
ROUNDS = 1


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the row; figures are reads in a second."""
    image = make_disk(directory / "disk.img", SIZE)
    with (
        packed(directory, image) as store,
        mapped("vm/1/latest/disk.img", "--repository", store) as device,
    ):
        mine, others, ratios = pairs(
            lambda: reads(device, image, lambda: kill_for_a_while(device)),
            lambda: reads(device, image, lambda: time.sleep(SECONDS)),
            min(rounds, ROUNDS),
        )
    image.unlink()
    return [
        Row(
            f"random reads, {KILLS} kill -9 of workers a second",
            "nothing killed",
            f"{statistics.median(mine):.0f}/s",
            f"{statistics.median(others):.0f}/s",
            ratios,
            0.2,
            at_most=False,
        )
    ]


def reads(device: str, image: Path, meanwhile: Callable[[], None]) -> float:
    """Return how many reads are done in a second, and were right, while something happens."""
    expected = image.read_bytes()
    over = False

    def read() -> int:
        count, source = 0, random.Random()
        with open(device, "rb", buffering=0) as disk:
            while not over:
                offset = source.randrange(0, SIZE - LENGTH, 512)
                # Else all of it would soon be in the page cache.
                os.posix_fadvise(disk.fileno(), offset, LENGTH, os.POSIX_FADV_DONTNEED)
                data = os.pread(disk.fileno(), LENGTH, offset)
                if data != expected[offset : offset + LENGTH]:
                    raise SystemExit(f"map_kill: wrong data at {offset}")
                count += 1
        return count

    with ThreadPoolExecutor(READERS) as pool:
        start = time.perf_counter()
        readers = [pool.submit(read) for _ in range(READERS)]
        try:
            meanwhile()
        finally:
            over = True
        counts = [reader.result(TIMEOUT) for reader in readers]
        return sum(counts) / (time.perf_counter() - start)


def kill_for_a_while(device: str) -> None:
    """Kill any of the workers, 50 times a second."""
    supervisor, *_ = processes(device)
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children")
    begin, killed = time.monotonic(), 0
    while (now := time.monotonic()) < begin + SECONDS:
        workers = children.read_text().split()
        if workers:
            with suppress(ProcessLookupError):
                os.kill(int(random.choice(workers)), signal.SIGKILL)
                killed += 1
        time.sleep(max(0, begin + killed / KILLS - now))
    if killed < KILLS * SECONDS / 2:
        raise SystemExit(f"map_kill: only {killed} workers were killed")
