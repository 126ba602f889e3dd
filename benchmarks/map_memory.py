# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The memory of a map's processes beside the cache, after reading, for a small and a huge image.

It is the sum of Pss_Anon and Pss_File in /proc/PID/smaps_rollup over the supervisor and the
workers, so what they share counts once, and by how much Shmem in /proc/meminfo has grown: the
index, the tables and the cache, whose limit is subtracted where the cache is full. (Pages that no
process has in its page tables any more, such as those of the index, are in no Pss.)
"""

from __future__ import annotations

import re
from pathlib import Path

from maps import MIB, make_disk, mapped, packed, processes, read, run
from measure import Row

SIZE = 1 << 30
HUGE = 15 << 40  # all zeros; a file cannot be larger in ext4
CACHE = 256 * MIB
ALLOWED = 64


def measure(directory: Path, rounds: int) -> list[Row]:  # noqa: ARG001 - the same each time
    """Return a row for each image; figures are bytes for each process."""
    rows = []
    image = make_disk(directory / "disk.img", SIZE)
    for size, what in ((SIZE, "1 GiB"), (HUGE, "15 TiB")):
        if size == HUGE:
            image.unlink()
            with open(image, "wb") as file:
                file.truncate(HUGE)
        with packed(directory, image) as store:
            options = ("--repository", store, "--cache-limit", CACHE)
            before = shared()
            with mapped("vm/1/latest/disk.img", *options) as device:
                read(device, SIZE)
                run("dd", f"if={device}", "of=/dev/null", "bs=1M", f"skip={size // MIB - 100}")
                pids = processes(device)
                # Zeros are in no cache.
                cached = CACHE if size == SIZE else 0
                used = private(pids) + shared() - before - cached
        mib = used / len(pids) / MIB
        rows.append(
            Row(
                f"memory of a map beside its cache, {what}",
                f"{ALLOWED} MiB per process",
                f"{mib:.0f} MiB",
                f"{ALLOWED} MiB",
                (mib / ALLOWED,),
                1,
                at_most=True,
            )
        )
    image.unlink()
    return rows


def private(pids: tuple[int, ...]) -> int:
    """Return the memory of processes that is in no shared memory, in bytes."""
    total = 0
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += sum(int(size) << 10 for size in re.findall(r"Pss_(?:Anon|File): +(\d+)", text))
    return total


def shared() -> int:
    """Return all the shared memory of the system, in bytes; also what no process has touched."""
    found = re.search(r"Shmem: +(\d+)", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) << 10
