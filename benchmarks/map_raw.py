# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A raw image as a map, beside QEMU's storage daemon and losetup, who do the same together."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from maps import MIB, make_disk, mapped, read, run
from measure import Row, pairs

SIZE = 1 << 30
ROUNDS = 7
SECONDS = 2


def measure(directory: Path, rounds: int) -> list[Row]:
    """Return the rows; the image is in the page cache, both devices are there all the time."""
    image = make_disk(directory / "disk.img", SIZE)
    peer = run("qemu-storage-daemon", "--version").partition("(")[0].strip() + ", losetup"
    rounds = min(rounds, ROUNDS)
    with mapped(image) as ours, exported(directory, image) as theirs:
        figures = pairs(lambda: read(ours, SIZE), lambda: read(theirs, SIZE), rounds)
        rows = [_row("map, raw, sequential", peer, figures, MIB, "MiB/s", 2)]
        for depth in (1, 16):
            figures = pairs(_random(ours, depth), _random(theirs, depth), rounds)
            what = f"map, raw, random 4 KiB, depth {depth}"
            rows.append(_row(what, peer, figures, 1000, "k/s", 1))
    image.unlink()
    return rows


def _row(
    what: str,
    peer: str,
    figures: tuple[list[float], list[float], tuple[float, ...]],
    unit: int,
    name: str,
    reach: float,
) -> Row:
    mine, others, ratios = figures
    ours, theirs = (f"{statistics.median(one) / unit:.0f} {name}" for one in (mine, others))
    return Row(what, peer, ours, theirs, ratios, reach, at_most=False)


def _random(path: str, depth: int) -> Callable[[], float]:
    """Return what measures how many random reads are done in a second."""

    def measure() -> float:
        report = run(
            *("fio", "--name=random", "--rw=randread", "--bs=4k", "--direct=1"),
            *("--ioengine=libaio", f"--iodepth={depth}", f"--filename={path}", "--time_based"),
            *(f"--runtime={SECONDS}", "--ramp_time=0.3", "--output-format=json"),
        )
        return float(json.loads(report)["jobs"][0]["read"]["iops"])

    return measure


@contextmanager
def exported(directory: Path, image: Path) -> Iterator[str]:
    """Have the daemon make a file of an image, and losetup a device of that; yields the device."""
    file = directory / "exported"
    file.touch()
    daemon = subprocess.Popen(
        [
            *("qemu-storage-daemon", "--blockdev"),
            f"driver=file,node-name=disk,filename={image},read-only=on",
            *("--export", f"type=fuse,id=disk,node-name=disk,mountpoint={file},writable=off"),
        ]
    )
    try:
        while os.stat(file).st_dev == os.stat(directory).st_dev:
            if daemon.poll() is not None:
                raise SystemExit("map_raw: the storage daemon ended")
            time.sleep(0.01)
        device = run("losetup", "--find", "--show", "--read-only", "--direct-io=on", file)
        try:
            assert os.stat(file).st_size == SIZE
            yield device
        finally:
            run("losetup", "--detach", device)
    finally:
        daemon.terminate()
        daemon.wait()
