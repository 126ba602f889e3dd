# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of the table, and how a pair of things is timed."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: What was measured.
        peer: Beside what, with its version.
        ours: Our median, with its unit.
        theirs: The peer's.
        ratios: One for each pair of runs; the median counts.
        reach: The bound.
        at_most: Whether the bound is an upper one.
    """

    what: str
    peer: str
    ours: str
    theirs: str
    ratios: tuple[float, ...]
    reach: float
    at_most: bool

    @property
    def ratio(self) -> float:
        """The median of all pairs."""
        return statistics.median(self.ratios)

    @property
    def reached(self) -> bool:
        """Whether the ratio is within its bound."""
        return self.ratio <= self.reach if self.at_most else self.ratio >= self.reach


def timed(call: Callable[[], object]) -> float:
    """Return how long a call takes, in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pairs(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int
) -> tuple[list[float], list[float], tuple[float, ...]]:
    """Measure two things in turn, first one then the other first, after a warm-up.

    Returns:
        Our figures, theirs, and the ratio of each pair.
    """
    ours(), theirs()
    mine, others = [], []
    for turn in range(rounds):
        for one, figures in ((ours, mine), (theirs, others))[:: 1 if turn % 2 else -1]:
            figures.append(one())
    return mine, others, tuple(a / b for a, b in zip(mine, others, strict=True))


def make_image(path: Path, size: int, random: bool = False) -> Path:
    """Make an image: sparse, or with contents that are on the disk."""
    with open(path, "wb") as file:
        if random:
            file.writelines(os.urandom(1 << 20) for _ in range(size >> 20))
            file.flush()
            os.fsync(file.fileno())
        else:
            file.truncate(size)
    return path


def print_rows(rows: list[Row]) -> None:
    """Print the table."""
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    print(f"{system}, {os.cpu_count()} processors; ratio: median of pairs (least to greatest)")
    titles = ("what", "peer", "loopdev", "peer", "ratio", "", "to reach", "")
    lines = [titles]
    for row in rows:
        spread = f"({min(row.ratios):.2f} to {max(row.ratios):.2f})"
        bound = f"{'<=' if row.at_most else '>='} {row.reach:g}"
        verdict = "ok" if row.reached else "short"
        lines.append(
            (row.what, row.peer, row.ours, row.theirs, f"{row.ratio:.2f}", spread, bound, verdict)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
