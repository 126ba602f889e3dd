# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The file behind a loop device: opened, and known to be one that can be used."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from loopdev.errors import BackingFileError, InvalidValueError
from loopdev.kernel import abi
from loopdev.kernel.ioctl import get_int, get_u64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol, Self

    class HasFileno(Protocol):
        def fileno(self) -> int: ...

    BackingLike = str | bytes | os.PathLike[str] | os.PathLike[bytes] | int | HasFileno


_KINDS = {
    stat.S_IFDIR: (errno.EISDIR, "is a directory"),
    stat.S_IFIFO: (errno.EINVAL, "is a FIFO, not a regular file or block device"),
    stat.S_IFSOCK: (errno.EINVAL, "is a socket, not a regular file or block device"),
    stat.S_IFCHR: (errno.EINVAL, "is a character device, not a regular file or block device"),
}
_SECTOR = 512
_READ_ONLY = "is read-only; attach it read-only"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ETXTBSY)
# O_APPEND would send the writes of a kernel's buffered path to the end of the file; O_DIRECT
# switches direct I/O on even where it was refused.
_UNWANTED = os.O_APPEND | os.O_DIRECT


class Backing:
    """An open regular file or block device, and what it was when it was opened.

    Made by :meth:`open`. A descriptor that the caller gave is borrowed, all else is owned.

    Attributes:
        name: Its path, or "descriptor 7".
        status: Its stat_result; st_dev and st_ino name the file.
        size: Bytes.
    """

    __slots__ = ("_fd", "_owned", "name", "size", "status")

    def __init__(self, fd: int, owned: bool, name: str, status: os.stat_result, size: int) -> None:
        self._fd, self._owned = fd, owned
        self.name, self.status, self.size = name, status, size

    @classmethod
    def open(cls, source: BackingLike, read_only: bool) -> Self:
        """Open *source* as a backing file.

        Raises:
            BackingFileError: It is missing, unreadable, of another kind, or cannot be written.
        """
        if isinstance(source, str):
            if not source:
                raise BackingFileError(errno.ENOENT, "''", os.strerror(errno.ENOENT))
            name = source if source.startswith("/") else os.path.abspath(source)
            fd, owned = _open_path(name, read_only), True
        elif isinstance(source, int):
            fd, owned, name = source, False, _name_of(source)
        elif isinstance(source, (bytes, os.PathLike)):
            return cls.open(os.fsdecode(source), read_only)
        else:
            fd, owned = source.fileno(), False
            name = _name_of(fd)
        try:
            if not owned:
                _check_access(fd, name, read_only)
                if fcntl.fcntl(fd, fcntl.F_GETFL) & _UNWANTED:
                    fd, owned = _reopen(fd, name, read_only), True
            status = os.fstat(fd)
            _check_kind(status, name)
            size = status.st_size
            if stat.S_ISBLK(status.st_mode):
                size = get_u64(fd, abi.BLKGETSIZE64, name)
                # open() for writing succeeds all the same.
                if not read_only and get_int(fd, abi.BLKROGET, name):
                    raise BackingFileError(errno.EROFS, name, _READ_ONLY)
        except BaseException:
            if owned:
                os.close(fd)
            raise
        return cls(fd, owned, name, status, size)

    @property
    def is_loop(self) -> bool:
        """Whether it is a loop device itself."""
        status = self.status
        return stat.S_ISBLK(status.st_mode) and os.major(status.st_rdev) == abi.LOOP_MAJOR

    def read(self, offset: int, count: int) -> bytes:
        """Return up to *count* bytes from *offset* on; fewer at the end.

        Raises:
            BackingFileError: EIO, for one.
        """
        try:
            return os.pread(self._fd, count, offset)
        except OSError as exc:
            reason = f"cannot be read: {exc.strerror}"
            raise BackingFileError(exc.errno or errno.EIO, self.name, reason) from exc

    def length_of(self, offset: int, sizelimit: int, sector: int, force: bool) -> int:
        """Return how many bytes of the file a device is to show.

        Args:
            offset: Where they begin.
            sizelimit: How many are asked for; 0: all.
            sector: The device's sector size in bytes; 0: the kernel chooses.
            force: Part of a sector may be left at the end, which the device does not show.

        Raises:
            BackingFileError: EINVAL: there are too few, or too many for whole sectors.
            InvalidValueError: They are not all in the file.
        """
        if self.size == 0:
            reason = "is a loop device without a backing file" if self.is_loop else "is empty"
            raise BackingFileError(errno.EINVAL, self.name, reason)
        if offset >= self.size:
            reason = f"is past the end of {self.name} ({self.size})"
            raise InvalidValueError("offset", offset, reason)
        view = self.size - offset
        if sizelimit > view:
            reason = f"only {view} bytes of {self.name} follow the offset"
            raise InvalidValueError("sizelimit", sizelimit, reason)
        length = sizelimit or view
        sector = sector or _SECTOR
        if length < sector:
            reason = f"{length} bytes are less than one sector of {sector}"
            raise BackingFileError(errno.EINVAL, self.name, reason)
        if length % sector and not force:
            reason = f"{length} bytes are {length % sector} too many for sectors of {sector}"
            raise BackingFileError(errno.EINVAL, self.name, reason)
        return length

    def fileno(self) -> int:
        """Return the descriptor, which stays owned where it was."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor if it was opened here; doing so again is no error."""
        fd, owned, self._fd, self._owned = self._fd, self._owned, -1, False
        if owned:
            os.close(fd)


def _name_of(fd: int) -> str:
    """Return the path of a descriptor, after making sure that it is one."""
    if fd < 0:
        raise InvalidValueError("backing", fd, "must be an open descriptor")
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError as exc:
        # Closed, or there is no /proc.
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            reason = "is not an open descriptor"
            raise BackingFileError(errno.EBADF, f"descriptor {fd}", reason) from exc
        return f"descriptor {fd}"


def _open_path(path: str, read_only: bool) -> int:
    access = os.O_RDONLY if read_only else os.O_RDWR
    try:
        # Look before: opening a character device may do something, and a FIFO may wait.
        _check_kind(os.stat(path), path)
        return os.open(path, access | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError as exc:
        if isinstance(exc, BackingFileError):
            raise
        raise _refusal(exc, path, read_only) from exc
    except ValueError as exc:
        raise InvalidValueError("backing", repr(path), str(exc)) from exc


def _refusal(exc: OSError, path: str, read_only: bool) -> BackingFileError:
    code = exc.errno or errno.EIO
    reason = exc.strerror or os.strerror(code)
    if not read_only and code in _NOT_WRITABLE and os.access(path, os.R_OK):
        reason = f"cannot be opened for writing ({reason}); attach it read-only"
    return BackingFileError(code, path, reason)


def _check_kind(status: os.stat_result, name: str) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        code, reason = _KINDS.get(kind, (errno.EINVAL, "is not a regular file or block device"))
        raise BackingFileError(code, name, reason)


def _check_access(fd: int, name: str, read_only: bool) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise BackingFileError(errno.EBADF, name, "the descriptor was opened with O_PATH")
    access = flags & os.O_ACCMODE
    if access == os.O_WRONLY:
        raise BackingFileError(errno.EBADF, name, "the descriptor is write-only")
    if access == os.O_RDONLY and not read_only:
        reason = "the descriptor is read-only; attach it read-only"
        raise BackingFileError(errno.EACCES, name, reason)


def _reopen(fd: int, name: str, read_only: bool) -> int:
    """Open the file of a descriptor once more, without the flags that would change its use."""
    access = os.O_RDONLY if read_only else os.O_RDWR
    try:
        return os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC)
    except OSError as exc:
        raise _refusal(exc, name, read_only) from exc
