# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What a process is to the kernel and to those who look at it with ps: prctl(2) and /proc/self."""

from __future__ import annotations

import os

from loopdev.kernel import libc

_PR_SET_IO_FLUSHER = 57  # <linux/prctl.h>, Linux 5.6
# In /proc/self/stat, counted from the state, which follows the last ")".
_ARG_START = 45
_ARG_END = 46


def set_io_flusher() -> bool:
    """Mark this process as one that memory reclaim may wait for, so that it never waits itself.

    Its allocations then start no I/O of block devices or filesystems, and it is not slowed down
    for the dirty pages of others: without it, a server of a block device can wait for itself.
    Children inherit it.

    Returns:
        Whether it is set; not before Linux 5.6 (EINVAL), nor without CAP_SYS_RESOURCE (EPERM).
    """
    try:
        libc.call("prctl", _PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    except OSError:
        return False
    return True


def protect_from_oom(score: int) -> bool:
    """Set how likely the kernel is to kill this process when memory is short. Children inherit it.

    Args:
        score: From -1000 (never) to 1000.

    Returns:
        Whether it is set; a lower value than now needs CAP_SYS_RESOURCE.
    """
    return _write("/proc/self/oom_score_adj", str(score).encode())


def set_title(text: str) -> bool:
    """Set what ps shows as the command line and, cut to 15 bytes, as the name of this process.

    The title takes the place of the arguments it was started with, and is cut to their length:
    more room would need CAP_SYS_RESOURCE, or take the environment's.

    Returns:
        Whether both are set.
    """
    title = text.encode(errors="replace").replace(b"\0", b" ")
    named = _write("/proc/self/comm", title[:15])
    try:
        start, end = _argument_area()
        # The last byte has to stay 0: else the kernel takes the environment for a part of it.
        room = end - start - 1
        _write_memory(start, title[:room].ljust(room + 1, b"\0"))
    except (OSError, ValueError):
        return False
    return named


def _argument_area() -> tuple[int, int]:
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
    if not 0 < start < end:
        raise ValueError("the arguments cannot be found")  # the kernel shows 0 to some
    return start, end


def _write_memory(address: int, data: bytes) -> None:
    fd = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(fd, data, address)
    finally:
        os.close(fd)


def _write(path: str, data: bytes) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True
