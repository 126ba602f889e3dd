# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Reading an attached image from end to end, cold, beside a device that losetup attached."""

from __future__ import annotations

import os
import statistics
import subprocess
from pathlib import Path

from measure import Row, make_image, pairs, timed

import loopdev

SIZE = 1 << 30


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the row; figures are bytes in a second, by 1 MiB reads."""
    image = str(make_image(directory / "disk.img", SIZE, random=True))

    def ours() -> float:
        forget(image)
        with loopdev.attach(image) as device:
            return read(device.path)

    def theirs() -> float:
        forget(image)
        command = ["losetup", "--find", "--show", image]
        path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        try:
            return read(path)
        finally:
            subprocess.run(["losetup", "--detach", path], check=True)

    mine, others, ratios = pairs(ours, theirs, min(rounds, 7))
    os.unlink(image)
    version = subprocess.run(["losetup", "--version"], capture_output=True, text=True).stdout
    return [
        Row(
            "sequential read, cold",
            version.strip().replace(" from", ","),
            f"{statistics.median(mine) / 1e6:.0f} MB/s",
            f"{statistics.median(others) / 1e6:.0f} MB/s",
            ratios,
            3,
            at_most=False,
        )
    ]


def forget(image: str) -> None:
    """Drop the image from the page cache."""
    with open(image, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(path: str) -> float:
    """Return how many bytes of a device are read in a second."""

    def all_of_it() -> None:
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(1 << 20)
            while file.readinto(buffer):
                pass

    return SIZE / timed(all_of_it)
