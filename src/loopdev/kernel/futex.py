# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""futex(2) on memory that processes share: to sleep until somebody says that it has changed."""

from __future__ import annotations

import errno
import os
import struct

from loopdev.kernel import libc

# <linux/futex.h>; not private: the processes differ
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_ALL = 0x7FFFFFFF
_timespec = struct.Struct("@qq")
# The C library has no function for it.
_NUMBERS = {
    "x86_64": 202,
    "aarch64": 98,
    "riscv64": 98,
    "loongarch64": 98,
    "ppc64le": 221,
    "s390x": 238,
}
_number = _NUMBERS.get(os.uname().machine, 0)
# After these there is nothing to wait for, or somebody woke us for another reason.
_EARLY = frozenset((errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT))


def wait(address: int, value: int, seconds: float) -> None:
    """Sleep until :func:`wake`, for *seconds* at most; not if there is another value by now.

    Args:
        address: Of 4 bytes in shared memory, aligned.
        value: What was seen there.
        seconds: It may return earlier, for no reason.
    """
    timeout = _timespec.pack(int(seconds), int(seconds % 1 * 1e9))
    try:
        libc.call("syscall", _number, address, _FUTEX_WAIT, value, timeout)
    except OSError as exc:
        if exc.errno not in _EARLY:
            raise


def wake(address: int) -> None:
    """Wake all who wait at an address."""
    libc.call("syscall", _number, address, _FUTEX_WAKE, _ALL)
