# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""From ``loopdev map`` to the first bytes of the disk, beside starting the interpreter."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from maps import COMMAND, MIB, make_disk, packed, run
from measure import Row, pairs, timed


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the row; each figure is the median of three."""
    image = make_disk(directory / "disk.img", 64 * MIB)
    with packed(directory, image) as store:

        def first_bytes() -> float:
            words = ("vm/1/latest/disk.img", "--repository", store)
            devices: list[str] = []

            def read() -> None:
                devices.append(run(COMMAND, "map", *words))
                with open(devices[0], "rb", buffering=0) as disk:
                    assert disk.read(4096) == expected

            seconds = timed(read)
            run(COMMAND, "unmap", devices[0])
            return seconds

        def nothing() -> float:
            command = [sys.executable, "-c", "pass"]
            return timed(lambda: subprocess.run(command, check=True, capture_output=True))

        with open(image, "rb") as file:
            expected = os.pread(file.fileno(), 4096, 0)
        mine, others, ratios = pairs(
            lambda: statistics.median(first_bytes() for _ in range(3)),
            lambda: statistics.median(nothing() for _ in range(3)),
            rounds,
        )
    image.unlink()
    return [
        Row(
            "loopdev map, to the first bytes",
            "python3 -c pass",
            f"{statistics.median(mine) * 1e3:.1f} ms",
            f"{statistics.median(others) * 1e3:.1f} ms",
            ratios,
            4,
            at_most=True,
        )
    ]
