# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the rows about maps have in common."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import timed

COMMAND = str(Path(sys.executable).with_name("loopdev"))
MIB = 1 << 20
_numbers = itertools.count()


def run(*words: object) -> str:
    """Return what a command prints."""
    command = [str(word) for word in words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def mapped(source: object, *options: object) -> Iterator[str]:
    """Map an image with the command, as anybody would; yields the device."""
    name = f"bench-{os.getpid()}-{next(_numbers)}"
    device = run(COMMAND, "map", source, "--name", name, *options)
    try:
        yield device
    finally:
        run(COMMAND, "unmap", device)


def processes(device: str) -> tuple[int, ...]:
    """Return the supervisor and the workers behind a device."""
    maps = json.loads(run(COMMAND, "maps", "--json"))
    (found,) = (one for one in maps if one["device"] == device)
    return found["supervisor"], *found["workers"]


def read(path: str, size: int) -> float:
    """Return how many bytes in a second are read from the first *size*, by direct 1 MiB reads."""
    command = ["dd", f"if={path}", "of=/dev/null", "bs=1M", f"count={size // MIB}", "iflag=direct"]
    return size / timed(lambda: subprocess.run([*command, "status=none"], check=True))


def make_disk(path: Path, size: int) -> Path:
    """Make an image that compresses to two thirds; half of each 128 KiB is text."""
    source = random.Random(7)
    words = [bytes(source.choices(b"etaoinshrdlu", k=source.randint(2, 9))) for _ in range(4000)]
    text = b" ".join(source.choices(words, k=1 << 19))
    with open(path, "wb") as file:
        for _ in range(size // (128 << 10)):
            start = source.randrange(len(text) - (64 << 10))
            file.write(text[start : start + (64 << 10)] + source.randbytes(64 << 10))
    return path


@contextmanager
def packed(directory: Path, image: Path) -> Iterator[Path]:
    """Pack an image into a datastore of its own, all of which is in the page cache then."""
    store = directory / "store"
    run(COMMAND, "pack", image, "--repository", store, "--create-store", "--id", "vm/1")
    try:
        yield store
    finally:
        run("rm", "-rf", store)  # 65536 directories, which Python takes ten times as long to remove
