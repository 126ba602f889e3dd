# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""32 processes that attach and detach 50 times each, beside one that does as many."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from pathlib import Path

from measure import Row, make_image, pairs

import loopdev

PROCESSES = 32
CYCLES = 50


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the row; figures are cycles in a second."""
    images = [str(make_image(directory / f"{i}.img", 16 << 20)) for i in range(PROCESSES)]
    # So that all modules are loaded before there are 32 of us.
    loopdev.attach(images[0], partscan=True).detach()
    before = sorted(os.listdir("/sys/block"))
    mine, others, ratios = pairs(
        lambda: throughput(images, CYCLES),
        lambda: throughput(images[:1], CYCLES * PROCESSES),
        rounds,
    )
    left = set(os.listdir("/sys/block")) - set(before)
    if left:
        raise SystemExit(f"storm: devices left behind: {left}")
    return [
        Row(
            f"storm of {PROCESSES} processes",
            "one process",
            f"{statistics.median(mine):.0f}/s",
            f"{statistics.median(others):.0f}/s",
            ratios,
            0.8,
            at_most=False,
        )
    ]


def throughput(images: list[str], cycles: int) -> float:
    """Return the cycles in a second of one process for each image, until the last has ended."""
    gate, opener = os.pipe()
    children = []
    for image in images:
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            os.read(gate, 1)  # until all are there
            try:
                for _ in range(cycles):
                    loopdev.attach(image).detach(timeout=60)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    os.close(gate)
    start = time.perf_counter()
    os.close(opener)
    failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in children)
    seconds = time.perf_counter() - start
    if failed:
        raise SystemExit(f"storm: {failed} of {len(images)} processes failed")
    return len(images) * cycles / seconds
