# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""membarrier(2): a memory barrier in all threads of all processes that asked for it."""

from __future__ import annotations

import errno
import os
import sys

from loopdev.errors import KernelError, kernel_error
from loopdev.kernel import libc

# <linux/membarrier.h>, Linux 4.16
_GLOBAL_EXPEDITED = 2
_REGISTER_GLOBAL_EXPEDITED = 4
# The C library has no function for it.
_NUMBERS = {
    "x86_64": 324,
    "aarch64": 283,
    "riscv64": 283,
    "loongarch64": 283,
    "ppc64le": 365,
    "s390x": 356,
}


def register() -> None:
    """Let :func:`barrier`, whoever calls it, act upon the threads of this process.

    It is quick as long as the process has one thread only.

    Raises:
        KernelError: ENOSYS where the kernel has no membarrier(2), EPERM where a filter forbids it.
    """
    _call(_REGISTER_GLOBAL_EXPEDITED)


def barrier() -> None:
    """Execute a full memory barrier in all running threads of registered processes, and here.

    Each of them executes it somewhere between the begin and the end of this call; those that do
    not run are past one anyway. It takes about a microsecond.
    """
    _call(_GLOBAL_EXPEDITED)


def _call(command: int) -> None:
    # A 32-bit process has other numbers, also on a 64-bit kernel.
    number = _NUMBERS.get(os.uname().machine) if sys.maxsize > 1 << 32 else None
    try:
        if number is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        libc.call("syscall", number, command, 0, 0)
    except OSError as exc:
        if exc.errno != errno.ENOSYS:
            raise kernel_error(exc, "the cache", "membarrier") from exc
        reason = "there is no membarrier(2) here, which the cache needs"
        raise KernelError(errno.ENOSYS, "the cache", "membarrier", reason) from exc
