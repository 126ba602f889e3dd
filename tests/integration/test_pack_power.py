# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The power fails when pack has returned: what reached the disk is a store with all snapshots.

The disk is a loop device without the page cache below it, and its backing file is copied while the
filesystem is mounted: the copy has what was written to the device, and nothing that was not.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from oracle import run

import loopdev

sys.path.append(str(Path(__file__).resolve().parent.parent / "unit"))
from pbs_reader import CHUNK, read_image, snapshots


@contextmanager
def mounted(disk: Path, where: Path, options: str = "defaults"):
    where.mkdir()
    with loopdev.attach(str(disk)) as device:
        subprocess.run(["mount", "-o", options, device.path, where], check=True)
        try:
            yield where
        finally:
            subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize(
    ("make", "options"), [("mkfs.ext4", "defaults"), ("mkfs.xfs", "nouuid")], ids=["ext4", "xfs"]
)
def test_all_is_on_the_disk(tmp_path, make, options):
    disk, image = tmp_path / "disk.img", tmp_path / "data.img"
    with open(disk, "wb") as file:
        file.truncate(400 << 20)
    run(make, "-q", disk)
    data = random.Random(1).randbytes(3 * CHUNK) + b"end"
    image.write_bytes(data)
    with mounted(disk, tmp_path / "one") as one:
        (one / "store/.chunks").mkdir(parents=True)
        for _ in range(2):
            loopdev.pack([str(image)], str(one / "store"), "vm/100", namespace="a")
            image.write_bytes(data := data[CHUNK:] + b"more")
        (one / "unsynced").write_bytes(b"x" * CHUNK)
        shutil.copyfile(disk, tmp_path / "copy.img")
    with mounted(tmp_path / "copy.img", tmp_path / "two", options) as two:
        names = snapshots(two / "store")
        assert len(names) == 2
        first, second = (read_image(two / "store", name, "data.img") for name in names)
        assert second == first[CHUNK:] + b"more"
        assert first == random.Random(1).randbytes(3 * CHUNK) + b"end"
        # So a sync that is missing would have been seen.
        left = two / "unsynced"
        assert not left.exists() or left.read_bytes() != b"x" * CHUNK
