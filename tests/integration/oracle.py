# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What others say of loop devices: sysfs and util-linux, never the code under test."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import time
from pathlib import Path

# How many times slower than usual this machine is: limits of time are so much longer.
SLOW = float(os.environ.get("LOOPDEV_TEST_SLOW", "1"))


def run(*command: object, **options) -> str:
    """Run a command that must succeed and return its output."""
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True, **options).stdout


def sysfs(number: int, attribute: str) -> str | None:
    """Return an attribute below /sys/block/loopN, None where there is none."""
    try:
        raw = Path(f"/sys/block/loop{number}/{attribute}").read_bytes()
    except OSError:
        return None
    return os.fsdecode(raw).removesuffix("\n")


def losetup(path: str) -> dict[str, object] | None:
    """Return what losetup(8) says of a device, None when it is not bound."""
    columns = "NAME,SIZELIMIT,OFFSET,AUTOCLEAR,RO,BACK-FILE,DIO,LOG-SEC,BACK-INO,PARTSCAN"
    out = subprocess.run(
        ["losetup", "--list", "--json", "-O", columns, path], capture_output=True, text=True
    ).stdout
    found = json.loads(out)["loopdevices"] if out.strip() else []
    return found[0] if found and found[0]["back-file"] else None


def is_bound(number: int) -> bool:
    return sysfs(number, "loop/backing_file") is not None


def partitions(number: int) -> dict[int, tuple[int, int]]:
    """Return start and size in bytes of the kernel's partitions, by number."""
    found = {}
    for place in Path(f"/sys/block/loop{number}").glob(f"loop{number}p*"):
        found[int((place / "partition").read_text())] = (
            int((place / "start").read_text()) * 512,
            int((place / "size").read_text()) * 512,
        )
    return found


def wait_until(condition, timeout: float = 10.0) -> None:
    """Wait for something that another process or the kernel does."""
    deadline = time.monotonic() + timeout * SLOW
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def remove_device(number: int) -> None:
    """Remove an unbound loop device; udev, where it runs, may be looking at it."""

    def removed() -> bool:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(control, 0x4C81, number)  # LOOP_CTL_REMOVE
        except OSError as exc:
            if exc.errno not in (errno.EBUSY, errno.ENODEV):
                raise
            return exc.errno == errno.ENODEV
        finally:
            os.close(control)
        return True

    wait_until(removed)


def make_gpt(path: os.PathLike[str], script: str, sector_size: int = 512) -> None:
    """Write a partition table with fdisk's library, whatever the sector size."""
    if sector_size == 512:
        run("sfdisk", "-q", path, input=script)
        return
    # sfdisk of Debian 12 cannot be told a sector size, fdisk can, and reads the same scripts.
    table = Path(f"{path}.table")
    table.write_text(script)
    run("fdisk", "-b", sector_size, path, input=f"g\nI\n{table}\nw\n")
    table.unlink()
