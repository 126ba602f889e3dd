# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A local datastore as its writers see it: its lock, its owner, and how one is made.

Whatever is made in a store belongs to the owner of its root, where the caller may give files away:
a server runs as a user of its own, and must be able to remove what it did not write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import ExitStack, contextmanager

from loopdev.errors import (
    DeviceBusyError,
    ImageNotFoundError,
    InvalidValueError,
    LoopdevError,
    kernel_error,
)
from loopdev.images.pbs.datastore import CHUNKS
from loopdev.kernel.fds import OwnedFd
from loopdev.kernel.sync import syncfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from loopdev.images.pbs.blob import Readable

DIRECTORY_MODE, FILE_MODE = 0o755, 0o644
_PREFIXES = 1 << 16  # directories of chunks, one for each first two bytes of a digest
_NEW_CHUNKS = ".chunks.new"
# What may be in a directory that becomes a store: nothing, or what making one began with.
_NOTHING = {"lost+found", ".lock", _NEW_CHUNKS}
# <fcntl.h>, struct flock: l_type, l_whence, l_start, l_len, l_pid
_FLOCK = struct.Struct("@hhqqi4x")


class WritableStore:
    """A datastore that is being written: no garbage is collected until it is closed.

    Attributes:
        root: Its directory.
    """

    def __init__(self, root: str, directory: OwnedFd, lock: OwnedFd) -> None:
        self.root = root
        self._directory, self._lock = directory, lock
        status = os.fstat(directory.fileno())
        self._owner = (status.st_uid, status.st_gid)
        # Who is neither root nor the owner writes as himself, as far as the modes let him.
        self._give = os.geteuid() == 0 and self._owner != (0, 0)

    @classmethod
    def open(cls, root: str, create: bool = False) -> Self:
        """Open a datastore, and take the lock that its writers share.

        Args:
            root: Its directory.
            create: Make one, if the directory is empty or does not exist.

        Raises:
            ImageNotFoundError: There is none.
            InvalidValueError: One shall be made, but the directory has something else in it.
            DeviceBusyError: Its garbage is being collected (EAGAIN).
            KernelError: It cannot be opened or made for another reason.
        """
        root = os.path.abspath(root)
        if create:
            with refused(root, "mkdir"):
                create_store(root)
        if not os.path.isdir(os.path.join(root, CHUNKS)):
            raise ImageNotFoundError("datastore", root)
        with ExitStack() as stack, refused(root, "open"):
            directory = stack.enter_context(OwnedFd.open(root, os.O_RDONLY | os.O_DIRECTORY))
            lock = stack.enter_context(_open_lock(root, directory))
            store = cls(root, directory, lock)
            stack.pop_all()
        return store

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()
        self._directory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def sync(self) -> None:
        """Return when all that was written to the store's filesystem is on its disk.

        Raises:
            KernelError: EIO, ENOSPC: something could not be.
        """
        syncfs(self._directory.fileno(), self.root)

    def make_directory(self, path: str) -> None:
        """Make a directory, unless it is there."""
        with refused(path, "mkdir"):
            try:
                os.mkdir(path)
            except FileExistsError:
                return
            self._adopt(path, DIRECTORY_MODE)

    def write_file(self, path: str, *parts: Readable) -> int:
        """Write a file that must not be there, and return its size; it is not on the disk yet."""
        with refused(path, "write"):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            with OwnedFd(fd, path):
                self._adopt(fd, FILE_MODE)
                return _write_all(fd, parts)

    def _adopt(self, file: int | str, mode: int) -> None:
        os.chmod(file, mode)  # whatever the umask is
        if self._give:
            os.chown(file, *self._owner)


def _write_all(fd: int, parts: tuple[Readable, ...]) -> int:
    size = sum(map(len, parts))
    written = os.writev(fd, parts)
    if written < size:  # a full disk takes what it can, and refuses the rest
        written += _write_all(fd, (b"".join(parts)[written:],))
    return written


@contextmanager
def refused(path: str, request: str) -> Iterator[None]:
    """Make what the kernel refuses an error of this package."""
    try:
        yield
    except LoopdevError:
        raise
    except OSError as exc:
        raise kernel_error(exc, path, request) from exc


def create_store(root: str) -> None:
    """Make a datastore of an empty directory, with all that a server expects to find in one.

    Nothing is done where there is one. Making one takes about a second.

    Raises:
        InvalidValueError: The directory has something else in it.
        OSError: It cannot be made.
    """
    try:
        os.mkdir(root, DIRECTORY_MODE)
    except FileExistsError:
        pass
    with OwnedFd.open(root, os.O_RDONLY | os.O_DIRECTORY) as directory:
        fcntl.flock(directory.fileno(), fcntl.LOCK_EX)  # somebody else may be making it
        names = set(os.listdir(root))
        if CHUNKS in names:
            return
        if names - _NOTHING:
            raise InvalidValueError("repository", root, "is neither a datastore nor empty")
        chunks = os.path.join(root, _NEW_CHUNKS)
        os.makedirs(chunks, DIRECTORY_MODE, exist_ok=True)
        for prefix in range(_PREFIXES):
            os.makedirs(f"{chunks}/{prefix:04x}", DIRECTORY_MODE, exist_ok=True)
        _open_lock(root, directory).close()
        os.rename(chunks, os.path.join(root, CHUNKS))


def _open_lock(root: str, directory: OwnedFd) -> OwnedFd:
    """Return the store's lock file, locked as its writers share it.

    The server's lock belongs to a process. Ours conflicts with it as it should, but belongs to the
    open file: a process that closes another one does not lose it.
    """
    path = os.path.join(root, ".lock")
    try:
        lock = OwnedFd.open(path, os.O_RDONLY)
    except FileNotFoundError:
        lock = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE), path)
        if os.geteuid() == 0:
            status = os.fstat(directory.fileno())
            os.fchown(lock.fileno(), status.st_uid, status.st_gid)
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(lock.fileno(), fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError) as exc:
        lock.close()
        reason = "its garbage is being collected; try again later"
        raise DeviceBusyError(errno.EAGAIN, root, "F_OFD_SETLK", reason) from exc
    except OSError:
        lock.close()
        raise
    return lock
