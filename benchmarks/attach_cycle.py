# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""attach() and detach() in one process, beside the same system calls in C."""

from __future__ import annotations

import statistics
import subprocess
import time
from pathlib import Path

from measure import Row, make_image, pairs

import loopdev

CYCLES = 200
SOURCE = Path(__file__).with_name("cycle.c")


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the row; each figure is the median of 200 cycles."""
    image = str(make_image(directory / "disk.img", 64 << 20))
    program = directory / "cycle"
    subprocess.run(["gcc", "-O2", "-o", program, SOURCE], check=True)

    def ours() -> float:
        times = []
        for _ in range(CYCLES):
            start = time.perf_counter_ns()
            loopdev.attach(image).detach()
            times.append(time.perf_counter_ns() - start)
        return statistics.median(times)

    def theirs() -> float:
        command = [program, image, str(CYCLES)]
        return float(subprocess.run(command, check=True, capture_output=True).stdout)

    mine, others, ratios = pairs(ours, theirs, rounds)
    version = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True).stdout.strip()
    return [
        Row(
            "attach + detach in process",
            f"C, gcc {version}",
            f"{statistics.median(mine) / 1e3:.0f} us",
            f"{statistics.median(others) / 1e3:.0f} us",
            ratios,
            1.25,
            at_most=True,
        )
    ]
