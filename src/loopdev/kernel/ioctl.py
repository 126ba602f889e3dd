# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The one place that issues ioctls, and gives their refusals a name."""

from __future__ import annotations

import errno
import fcntl
import struct
import sys

from loopdev.errors import KernelError, kernel_error
from loopdev.kernel import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_INT = struct.Struct("@i")
# Where lo_flags is in struct loop_info64.
FLAGS = 8


def ioctl(fd: int, request: int, path: str, arg: int | bytes | bytearray = 0) -> int:
    """Issue one ioctl and return its result; a bytearray is filled in place.

    (With bytes, which the kernel only reads, Python returns those: no result of ours is lost.)

    Args:
        fd: An open descriptor, borrowed.
        request: The request's number, from ``abi``.
        path: The device's name, for the error.
        arg: What the request takes.

    Raises:
        KernelError: or a subclass, by errno and request.
    """
    try:
        return fcntl.ioctl(fd, request, arg)  # type: ignore[return-value]
    except OSError as exc:
        raise kernel_error(exc, path, abi.request_name(request)) from exc


def get_int(fd: int, request: int, path: str) -> int:
    """Return what a request writes to an int (BLKSSZGET, BLKROGET)."""
    buffer = bytearray(_INT.size)
    ioctl(fd, request, path, buffer)
    value: int = _INT.unpack(buffer)[0]
    return value


def get_u64(fd: int, request: int, path: str) -> int:
    """Return what a request writes to a 64-bit integer (BLKGETSIZE64, BLKGETDISKSEQ)."""
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, request, buffer)
    except OSError as exc:
        raise kernel_error(exc, path, abi.request_name(request)) from exc
    return int.from_bytes(buffer, sys.byteorder)


def status_of(fd: int, path: str) -> tuple[Any, ...]:
    """Return the fields of struct loop_info64 (LOOP_GET_STATUS64); see abi.loop_info64.

    The kernel asks the backing file's filesystem, which may hang.
    """
    buffer = bytearray(abi.loop_info64.size)
    ioctl(fd, abi.LOOP_GET_STATUS64, path, buffer)
    return abi.loop_info64.unpack(buffer)


def diskseq_of(fd: int, path: str) -> int | None:
    """Return the number of this attachment; None before Linux 5.15."""
    try:
        return get_u64(fd, abi.BLKGETDISKSEQ, path)
    except KernelError as exc:
        if exc.errno not in (errno.ENOTTY, errno.EINVAL):
            raise
        return None
