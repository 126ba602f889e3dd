# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Device nodes, where /dev is no devtmpfs and nobody makes them."""

from __future__ import annotations

import os
import stat

from loopdev.errors import kernel_error


def kernel_makes_them(directory: str = "/dev") -> bool:
    """Return whether a directory is a devtmpfs: a node that is missing there is just being made."""
    with open("/proc/self/mountinfo", "rb") as file:
        mounts = [line.split() for line in file]
    # The last one on a mount point is the one that is seen.
    kinds = [mount[mount.index(b"-") + 1] for mount in mounts if mount[4] == directory.encode()]
    return kinds[-1:] == [b"devtmpfs"]


def is_node(path: str, rdev: int, dir_fd: int | None = None) -> bool:
    """Return whether *path* is a block device node of this number."""
    try:
        status = os.stat(path, dir_fd=dir_fd)
    except FileNotFoundError:
        return False
    return stat.S_ISBLK(status.st_mode) and status.st_rdev == rdev


def ensure(path: str, rdev: int, mode: int = 0o660, dir_fd: int | None = None) -> bool:
    """Make the block device node *path* if it is missing, or is another device's.

    Returns:
        Whether it was made here; then its maker removes it.

    Raises:
        KernelError: EEXIST where a file that is no block device is in the way; EPERM without
            CAP_MKNOD.
    """
    if is_node(path, rdev, dir_fd):
        return False
    try:
        if _is_block_device(path, dir_fd):
            os.unlink(path, dir_fd=dir_fd)  # left by an earlier user of the name
        os.mknod(path, stat.S_IFBLK | mode, rdev, dir_fd=dir_fd)
    except FileExistsError as exc:
        if is_node(path, rdev, dir_fd):
            return False  # the kernel or udev was quicker
        raise kernel_error(exc, path, "mknod") from exc
    except OSError as exc:
        raise kernel_error(exc, path, "mknod") from exc
    return True


def discard(path: str, rdev: int, dir_fd: int | None = None) -> None:
    """Remove the node *path* if it still is of this device; a missing one is no error."""
    if not is_node(path, rdev, dir_fd):
        return
    try:
        os.unlink(path, dir_fd=dir_fd)
    except FileNotFoundError:
        pass


def _is_block_device(path: str, dir_fd: int | None) -> bool:
    try:
        return stat.S_ISBLK(os.lstat(path, dir_fd=dir_fd).st_mode)
    except FileNotFoundError:
        return False
