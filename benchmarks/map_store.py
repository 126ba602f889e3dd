# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A snapshot in a datastore as a map: the first read of all of it, and the second.

The first is beside the decode limit: the same chunks are read, checked and decompressed by as
many bare processes as the map has workers, each into one buffer that it uses again and again. The
second is beside a map of the raw image. The datastore's files are in the page cache, always.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import zstandard
from maps import make_disk, mapped, packed, read
from measure import Row, pairs, timed

from loopdev.images import resolve

SIZE = 2 << 30
SECOND_SIZE = 512 << 20
# More than is read a second time: reading ahead does not know where we end.
SECOND_CACHE = 576 << 20
SNAPSHOT = "vm/1/latest/disk.img"
ROUNDS = 7


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return both rows; figures are bytes in a second."""
    image = make_disk(directory / "disk.img", SIZE)
    with packed(directory, image) as store:
        rows = [_first(store, min(rounds, ROUNDS)), _second(store, image, min(rounds, ROUNDS))]
    image.unlink()
    return rows


def _first(store: Path, rounds: int) -> Row:
    def ours() -> float:
        with mapped(SNAPSHOT, "--repository", store) as device:
            return read(device, SIZE)

    count = len(os.sched_getaffinity(0))
    figures = pairs(ours, lambda: SIZE / timed(lambda: decode(store, count)), rounds)
    peer = f"decoding bare, {count} processes, zstandard {zstandard.__version__}"
    return _row("map, datastore, first read", peer, figures, 0.8)


def _second(store: Path, image: Path, rounds: int) -> Row:
    cache = ("--repository", store, "--cache-limit", SECOND_CACHE)
    with mapped(SNAPSHOT, *cache) as ours, mapped(image) as theirs:
        read(ours, SECOND_SIZE)
        figures = pairs(lambda: read(ours, SECOND_SIZE), lambda: read(theirs, SECOND_SIZE), rounds)
    return _row("map, datastore, second read", "map, raw image", figures, 0.9)


def _row(
    what: str, peer: str, figures: tuple[list[float], list[float], tuple[float, ...]], reach: float
) -> Row:
    mine, others, ratios = figures
    ours, theirs = (f"{statistics.median(one) / 1e6:.0f} MB/s" for one in (mine, others))
    return Row(what, peer, ours, theirs, ratios, reach, at_most=False)


def decode(store: Path, count: int) -> None:
    """Decode all chunks once, by *count* processes."""
    source = resolve(SNAPSHOT, repository=str(store))
    children = []
    for first in range(count):
        pid = os.fork()
        if pid == 0:
            image = source.open()
            buffer = memoryview(bytearray(image.block_size))
            for offset in range(first * len(buffer), SIZE, count * len(buffer)):
                image.read_into(offset, buffer)
            os._exit(0)
        children.append(pid)
    if sum(os.waitpid(pid, 0)[1] != 0 for pid in children):
        raise SystemExit("map_store: a process failed")
