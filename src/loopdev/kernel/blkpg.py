# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""BLKPG: add, remove and resize one partition node of a block device.

It works without a partition parser in the kernel and without LO_FLAGS_PARTSCAN, and needs
CAP_SYS_ADMIN. Source: blkpg_do_ioctl() in block/ioctl.c.
"""

from __future__ import annotations

from loopdev.kernel import abi, ioctl


def add(fd: int, path: str, number: int, start: int, size: int) -> None:
    """Add partition *number*, *start* and *size* in bytes.

    Raises:
        DeviceBusyError: There is one of this number, or it overlaps another.
        KernelError: EINVAL when it is not aligned to the sector size or passes the end.
    """
    _request(fd, path, abi.BLKPG_ADD_PARTITION, number, start, size)


def delete(fd: int, path: str, number: int) -> None:
    """Remove partition *number*.

    Raises:
        DeviceBusyError: It is open or mounted.
        NotBoundError: There is none (ENXIO).
    """
    _request(fd, path, abi.BLKPG_DEL_PARTITION, number, 0, 0)


def resize(fd: int, path: str, number: int, start: int, size: int) -> None:
    """Give partition *number* another size; *start* must be what it is. Works while it is open."""
    _request(fd, path, abi.BLKPG_RESIZE_PARTITION, number, start, size)


def _request(fd: int, path: str, op: int, number: int, start: int, size: int) -> None:
    from array import array  # here, because it imports collections.abc

    partition = array("B", abi.blkpg_partition.pack(start, size, number, b"", b""))
    address, length = partition.buffer_info()
    arg = abi.blkpg_ioctl_arg.pack(op, 0, length, address)
    ioctl.ioctl(fd, abi.BLKPG, f"{path}p{number}", arg)
