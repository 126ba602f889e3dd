# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Listing 1000 devices as JSON, beside losetup."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import Row, make_image, pairs, timed

from loopdev.loop import Loop, LoopControl

COUNT = 1000
FIRST = 20000


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the row."""
    image = make_image(directory / "disk.img", 16 << 20)
    command = str(Path(sys.executable).with_name("loopdev"))

    def runs(*words: str) -> float:
        return timed(lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL))

    backing = os.open(image, os.O_RDWR)
    loops: list[Loop] = []
    with LoopControl() as control:
        try:
            for number in range(FIRST, FIRST + COUNT):
                control.add(number)
                loops.append(Loop(number))
                loops[-1].configure(backing, autoclear=True)
            mine, others, ratios = pairs(
                lambda: runs(command, "list", "--json"),
                lambda: runs("losetup", "--list", "--json"),
                rounds,
            )
        finally:
            for loop in loops:
                loop.close()
            os.close(backing)
            # One takes 40 ms, but they wait side by side.
            with ThreadPoolExecutor(64) as pool:
                list(pool.map(control.remove, range(FIRST, FIRST + len(loops))))
    version = subprocess.run(["losetup", "--version"], capture_output=True, text=True).stdout
    return [
        Row(
            f"list {COUNT} devices, JSON",
            version.strip().replace(" from", ","),
            f"{statistics.median(mine) * 1e3:.0f} ms",
            f"{statistics.median(others) * 1e3:.0f} ms",
            ratios,
            2,
            at_most=True,
        )
    ]
