# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What a client may pass as a backing file: looked at by a worker, which may hang here.

Only the descriptor counts: the client opened it, with its own rights. Nothing is opened for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from loopdev.errors import BackingFileError, RefusedError
from loopdev.kernel import namespaces

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# What the file is called in errors, where its descriptor shows no name.
NAMELESS = "the backing file"
_F_GET_SEALS = 1034
_F_SEAL_WRITE = 8 | 16  # F_SEAL_WRITE, F_SEAL_FUTURE_WRITE
_ROOT = 0
_connections: int | None = None
_swap_list: int | None = None
_SWAPS_SIZE = 1 << 16


def name_of(fd: int) -> str:
    """Return the path of a descriptor, for errors alone: it is another namespace's."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return NAMELESS


def check_mode(fd: int, name: str, read_only: bool) -> bool:
    """Refuse a descriptor that cannot be used, and return whether the device is read-only.

    Raises:
        BackingFileError: O_PATH, O_APPEND, write-only, or sealed.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise BackingFileError(errno.EBADF, name, "the descriptor was opened with O_PATH")
    access = flags & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise BackingFileError(errno.EBADF, name, "the descriptor is write-only")
    if flags & os.O_APPEND:
        reason = "the descriptor is append-only (O_APPEND)"
        raise BackingFileError(errno.EINVAL, name, reason)
    read_only = read_only or access == os.O_RDONLY
    if not read_only and _seals(fd) & _F_SEAL_WRITE:
        raise BackingFileError(errno.EPERM, name, "is sealed against writing; attach it read-only")
    return read_only


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError:
        return 0  # EINVAL: only files in memory have seals


def check_filesystem(fd: int, name: str, uid: int) -> None:
    """Refuse a file on FUSE that somebody else than the client or root serves.

    Raises:
        RefusedError: It is such a file.
    """
    server = _fuse_server(fd)
    if server not in (None, uid, _ROOT):
        reason = f"{name} is on a FUSE filesystem that user {server} serves, who could stop it"
        raise RefusedError(errno.EPERM, reason)


def _fuse_server(fd: int) -> int | None:
    """Return the user who serves the FUSE filesystem of a file, None if it is on no such one.

    The server is not asked, since it may not answer: the kernel has a directory for each
    connection, named by its device number and owned by who mounted it.
    """
    global _connections  # noqa: PLW0603 - one mount for the life of this process
    if _connections is None:
        try:
            _connections = namespaces.mount_single(b"fusectl")
        except OSError as exc:
            if exc.errno != errno.ENODEV:
                raise
            return None  # nothing is on FUSE while the kernel does not have it
    major, minor = namespaces.filesystem_of(fd)
    try:
        return os.stat(str(major << 20 | minor), dir_fd=_connections).st_uid
    except FileNotFoundError:
        return None


def check_kind(
    fd: int, name: str, block_devices: bool, ours: Collection[tuple[int, int]]
) -> os.stat_result:
    """Refuse what is neither a regular file nor an allowed block device, or is in use by Linux.

    Args:
        fd: The descriptor.
        name: For errors.
        block_devices: Whether policy allows them.
        ours: st_dev and st_ino of the broker's own files.

    Raises:
        BackingFileError: A directory, pipe, socket, character device; a swap file.
        RefusedError: A block device, a file of the broker.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        if not block_devices:
            raise RefusedError(errno.EPERM, f"{name} is a block device")
    elif not stat.S_ISREG(status.st_mode):
        reason = f"is a {_kind(status.st_mode)}, not a regular file"
        code = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise BackingFileError(code, name, reason)
    if (status.st_dev, status.st_ino) in ours:
        raise RefusedError(errno.EPERM, f"{name} is the broker's own")
    if any(_is_same(status, swap) for swap in _swaps()):
        raise BackingFileError(errno.EBUSY, name, "is in use as swap space")
    return status


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "pipe",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
    }
    return kinds.get(stat.S_IFMT(mode), "descriptor of another kind")


def _is_same(one: os.stat_result, other: os.stat_result) -> bool:
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _swaps() -> Iterable[os.stat_result]:
    # Kept open: looking for swap is a part of every attach.
    global _swap_list  # noqa: PLW0603 - one descriptor for the life of this process
    if _swap_list is None:
        _swap_list = os.open("/proc/swaps", os.O_RDONLY | os.O_CLOEXEC)
    text = b""
    while more := os.pread(_swap_list, _SWAPS_SIZE, len(text)):
        text += more
    for line in text.split(b"\n")[1:-1]:
        path = line.split()[0].replace(b"\\040", b" ").replace(b"\\011", b"\t")
        try:
            yield os.stat(path.replace(b"\\012", b"\n").replace(b"\\134", b"\\"))
        except OSError:
            pass  # it was removed while in use, or is in another namespace
