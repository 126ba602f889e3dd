# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Where a datastore keeps what is being packed, until it is complete.

One directory in the store's root for each run, locked for as long as the run lives. Its name begins
with a dot: a server's walks pass over it. What a killed run left is known by its lock, which nobody
holds, and removed by the next run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile

from loopdev.errors import kernel_error
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

PREFIX = ".loopdev-pack-"


class WorkDirectory:
    """A directory for one run's temporaries, on the datastore's filesystem.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: str, lock: OwnedFd) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, root: str) -> Self:
        """Make one in the root of a datastore, and remove those of runs that were killed.

        Raises:
            NotPermittedError: The store cannot be written (EACCES, EPERM).
            KernelError: It cannot for another reason: EROFS, ENOSPC, ENOLCK, ...
        """
        remove_abandoned(root)
        try:
            while True:
                path = tempfile.mkdtemp(prefix=PREFIX, dir=root)
                lock = _lock(path, wait=True)
                # Between mkdtemp and the lock it looked abandoned, and may have been removed.
                if lock is not None:
                    return cls(path, lock)
        except OSError as exc:
            raise kernel_error(exc, root, "mkdir") from exc

    def close(self) -> None:
        """Remove it with all that is left in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def remove_abandoned(root: str) -> int:
    """Remove the directories of runs that are no more, and return how many there were.

    What cannot be looked at or removed, another user's for one, is left alone.
    """
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(PREFIX)]
    return sum(_remove(os.path.join(root, name)) for name in names)


def _remove(path: str) -> bool:
    try:
        lock = _lock(path, wait=False)
    except OSError:
        return False
    if lock is None:
        return False
    with lock:
        shutil.rmtree(path, ignore_errors=True)
    return not os.path.lexists(path)


def _lock(path: str, wait: bool) -> OwnedFd | None:
    """Return the directory, locked; None: somebody else has it, or it is gone."""
    try:
        lock = OwnedFd.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        with lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            os.stat(path)  # who had the lock may have removed it meanwhile
            return OwnedFd(lock.take(), path)
    except (FileNotFoundError, BlockingIOError):
        return None
