# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Descriptors with an owner."""

from __future__ import annotations

import os

from loopdev.errors import ClosedError, kernel_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class OwnedFd:
    """A descriptor that belongs to this object, and is closed once.

    Args:
        fd: The descriptor; it is owned from here on.
        name: What it is open on, for messages.
    """

    __slots__ = ("_fd", "name")

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name

    @classmethod
    def open(cls, path: str, flags: int, dir_fd: int | None = None) -> Self:
        """Open *path* with O_CLOEXEC added; errors pass as they are."""
        return cls(os.open(path, flags | os.O_CLOEXEC, dir_fd=dir_fd), path)

    def fileno(self) -> int:
        """Return the descriptor, which stays owned here.

        Raises:
            ClosedError: It was closed or taken.
        """
        if self._fd < 0:
            raise ClosedError(self.name)
        return self._fd

    def take(self) -> int:
        """Hand the descriptor over: the caller owns it from here on."""
        fd, self._fd = self.fileno(), -1
        return fd

    @property
    def closed(self) -> bool:
        """Whether it was closed or taken."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; doing so again is no error."""
        # -1 first: the kernel reuses the number at once.
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def open_device(path: str, flags: int) -> OwnedFd:
    """Open a device node.

    Raises:
        NoSuchDeviceError: ENOENT, ENODEV, or ENXIO: it is just being detached.
        DeviceBusyError: EBUSY: with O_EXCL, it is mounted or claimed by somebody else.
        NotPermittedError: EACCES, EPERM.
    """
    try:
        return OwnedFd(os.open(path, flags | os.O_CLOEXEC), path)
    except OSError as exc:
        raise kernel_error(exc, path, "open") from exc
