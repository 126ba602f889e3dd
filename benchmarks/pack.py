# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Packing an image into a datastore, beside the same chunking, hashing and compressing bare.

The bare processes, as many as there are processors, read 4 MiB at a time, take SHA-256 of it, make
a zstd frame of level 1, and take CRC-32 of that. One peer then throws the frame away; the other
writes it to a file, without a sync. We also look whether the datastore has the chunk, write it,
sync, and rename it: when pack() returns, a power failure takes nothing away. The image is in the
page cache.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import statistics
import zlib
from collections.abc import Callable
from pathlib import Path

import zstandard
from measure import Row, pairs, timed

import loopdev

SIZE = 1 << 30
CHUNK = 4 << 20
ROUNDS = 7


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return a row for each peer; figures are bytes of the image in a second."""
    image = make_disk(directory / "disk.img")
    store, files = directory / "store", directory / "files"
    files.mkdir()
    # The warm-up makes the datastore.
    ours = rate(lambda: loopdev.pack([str(image)], str(store), "vm/1", create_store=True), store)
    nothing = rate(lambda: bare(image, None), files)
    written = rate(lambda: bare(image, files), files)
    found = []
    for name, theirs in (("nothing written", nothing), ("files written", written)):
        mine, others, ratios = pairs(ours, theirs, min(rounds, ROUNDS))
        found.append(
            Row(
                "pack, all chunks new",
                f"zstandard {zstandard.__version__} and hashlib bare, {name}",
                f"{statistics.median(mine) / 1e6:.0f} MB/s",
                f"{statistics.median(others) / 1e6:.0f} MB/s",
                ratios,
                0.8,
                at_most=False,
            )
        )
    # 65536 directories, which Python takes ten times as long to remove.
    os.system(f"rm -rf {store}")
    return found


def make_disk(path: Path) -> Path:
    """Make an image that compresses to about a half, the same each time, without equal chunks."""
    source = random.Random(1)
    with open(path, "wb") as file:
        for start in range(0, SIZE, 8192):
            lines = b"".join(b"%016d is a line\n" % (start + i) for i in range(158))
            file.write((source.randbytes(4096) + lines)[:8192])
        file.flush()
        os.fsync(file.fileno())
    return path


def rate(call: Callable[[], object], output: Path) -> Callable[[], float]:
    """Return what measures a call that starts with nothing of its output on the disk."""

    def run() -> float:
        for path in itertools.chain(output.glob(".chunks/*/?*"), output.glob("?" * 64)):
            path.unlink()
        shutil.rmtree(output / "vm", ignore_errors=True)
        os.sync()
        return SIZE / timed(call)

    return run


def bare(image: Path, files: Path | None) -> None:
    """Do what must be done, with a process for each processor."""
    count = len(os.sched_getaffinity(0))
    fork = multiprocessing.get_context("fork")
    counter = fork.Value("q", 0)
    workers = [fork.Process(target=work, args=(image, files, counter)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0


def work(image: Path, files: Path | None, counter) -> None:
    """Take one chunk after the other."""
    compressor = zstandard.ZstdCompressor(level=1)
    buffer = bytearray(CHUNK)
    with open(image, "rb", buffering=0) as file:
        while True:
            with counter.get_lock():
                offset = counter.value
                counter.value += CHUNK
            if offset >= SIZE:
                return
            os.preadv(file.fileno(), [buffer], offset)
            digest = hashlib.sha256(buffer).hexdigest()
            frame = compressor.compress(buffer)
            header = b"%012d" % zlib.crc32(frame)
            if files is not None:
                with open(files / digest, "xb", buffering=0) as chunk:
                    os.writev(chunk.fileno(), [header, frame])
