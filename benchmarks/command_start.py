# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev attach`` and ``loopdev detach``, beside starting the interpreter twice."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

from measure import Row, make_image, pairs, timed


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the row; each figure is the median of three pairs of commands."""
    image = str(make_image(directory / "disk.img", 64 << 20))
    command = str(Path(sys.executable).with_name("loopdev"))

    def attach_detach() -> None:
        found = subprocess.run([command, "attach", image], check=True, capture_output=True)
        subprocess.run([command, "detach", found.stdout.strip()], check=True, capture_output=True)

    def nothing_twice() -> None:
        for _ in range(2):
            subprocess.run([sys.executable, "-c", "pass"], check=True, capture_output=True)

    mine, others, ratios = pairs(
        lambda: statistics.median(timed(attach_detach) for _ in range(3)),
        lambda: statistics.median(timed(nothing_twice) for _ in range(3)),
        rounds,
    )
    return [
        Row(
            "loopdev attach, loopdev detach",
            "python3 -c pass, twice",
            f"{statistics.median(mine) * 1e3:.1f} ms",
            f"{statistics.median(others) * 1e3:.1f} ms",
            ratios,
            1.4,
            at_most=True,
        )
    ]
