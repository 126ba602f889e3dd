# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""/dev/loop-control, and the way from it to a bound loop device."""

from __future__ import annotations

import errno
import fcntl
import os

from loopdev._allocate import RaceLost, claim, claim_recent
from loopdev._loop import MAX_NUMBER, Loop
from loopdev.errors import (
    ClosedError,
    DeviceBusyError,
    InvalidValueError,
    NoSuchDeviceError,
    kernel_error,
)
from loopdev.kernel import nodes, sysfs
from loopdev.kernel.abi import LOOP_CTL_ADD, LOOP_CTL_GET_FREE, LOOP_CTL_REMOVE
from loopdev.kernel.fds import OwnedFd
from loopdev.kernel.ioctl import ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

# How long loop_for_fd() tries, in seconds.
ALLOCATE_TIMEOUT = 30.0


class LoopControl:
    """/dev/loop-control: adding, removing and finding loop devices.

    Args:
        dir_fd: A descriptor of the directory that holds the nodes, borrowed; None: /dev.

    Raises:
        NoSuchDeviceError: There is no loop-control: no loop module, or a container without it.
        NotPermittedError: EACCES or EPERM.
    """

    def __init__(self, dir_fd: int | None = None) -> None:
        path = "/dev/loop-control" if dir_fd is None else "loop-control"
        self._dir_fd = dir_fd
        try:
            self._fd = OwnedFd.open(path, os.O_RDWR, dir_fd)
        except OSError as exc:
            raise kernel_error(exc, path, "open") from exc

    def fileno(self) -> int:
        """Return the descriptor, which stays this object's.

        Raises:
            ClosedError: (a RuntimeError) The object is closed.
        """
        return self._fd.fileno()

    def close(self) -> None:
        """Close it; doing so again is no error. Every other method then raises ClosedError."""
        self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _ioctl(self, request: int, arg: int = 0) -> int:
        return ioctl(self._fd.fileno(), request, self._fd.name, arg)

    def add(self, minor: int = -1) -> int:
        """Add a device (LOOP_CTL_ADD) and return its number.

        Args:
            minor: The number wanted, below 2^20; -1: the next one that does not exist.

        Raises:
            KernelError: EEXIST: there is one.
            InvalidValueError: The number is out of range.
        """
        if not -1 <= minor <= MAX_NUMBER:
            raise InvalidValueError("minor", minor, f"must be from 0 to {MAX_NUMBER}, or -1")
        return self._ioctl(LOOP_CTL_ADD, minor)

    def remove(self, minor: int) -> None:
        """Remove a device and its node (LOOP_CTL_REMOVE); costs some 40 ms.

        Raises:
            InvalidValueError: The number is out of range.
            DeviceBusyError: It is bound or open.
            NoSuchDeviceError: ENODEV.
        """
        if not 0 <= minor <= MAX_NUMBER:
            raise InvalidValueError("minor", minor, f"must be from 0 to {MAX_NUMBER}")
        self._ioctl(LOOP_CTL_REMOVE, minor)

    def get_unbound(self) -> int:
        """Return the lowest unbound number, adding a device if there is none (LOOP_CTL_GET_FREE).

        It is not reserved: anybody may take it before you do. loop_for_fd() copes with that.
        """
        return self._ioctl(LOOP_CTL_GET_FREE)

    def loop_for_fd(
        self,
        fd: int,
        lock: bool = False,
        setup: Callable[[Loop], None] | None = None,
        **config: object,
    ) -> Loop:
        """Bind *fd* to an unbound loop device and return it, open.

        Lost races are tried again, on another device where that is better, for 30 seconds. On any
        failure, one that *setup* raises included, nothing stays bound or open. A device that was
        added for this stays when the loop is closed: remove() is for that.

        Args:
            fd: The backing file, borrowed.
            lock: Hold flock LOCK_EX on the device from before it is bound until it is closed.
                A device that somebody else has locked is passed over.
            setup: Called with each device that is tried, after it is opened and before all else.
            **config: As for :meth:`Loop.configure`.

        Raises:
            InvalidValueError: (a ValueError) A negative descriptor, or a value in *config*.
            NoFreeDeviceError: No device could be had in time.
            KernelError: Whatever configure() raises for the file.
        """
        if fd < 0:
            raise InvalidValueError("fd", fd, "must be an open descriptor")
        self._fd.fileno()
        try:
            # Before anything else is opened, which could be given a closed one's number.
            os.fstat(fd)
        except (OSError, OverflowError) as exc:
            refused = OSError(errno.EBADF, os.strerror(errno.EBADF))
            raise kernel_error(refused, f"descriptor {fd}", "fstat") from exc
        made: dict[str, int] = {}

        def bind(number: int) -> Loop:
            if sysfs.is_bound(number):
                raise RaceLost
            loop = open_or_lose(number, self._dir_fd, made=made)
            try:
                if setup is not None:
                    setup(loop)
                if lock:
                    lock_or_lose(loop)
                configure_or_lose(loop, fd, config)
            except RaceLost:
                loop.close()
                raise
            except BaseException:
                _let_go(loop, fd)
                raise
            made.pop(loop.path, None)
            return loop

        try:
            loop = claim_recent(bind)
            return loop if loop is not None else claim(self, bind, ALLOCATE_TIMEOUT)
        finally:
            for name, rdev in made.items():
                nodes.discard(name, rdev, self._dir_fd)


def _let_go(loop: Loop, fd: int) -> None:
    """Close a loop that could not be set up, and clear it if a signal came after it was bound."""
    try:
        if loop.is_bound_to(fd):
            loop.clear_fd()
    except (OSError, ClosedError):
        pass  # the descriptor is none, or setup() closed the loop
    finally:
        loop.close()


def open_or_lose(
    number: int,
    dir_fd: int | None = None,
    *,
    read_only: bool = False,
    made: dict[str, int] | None = None,
) -> Loop:
    """Open a device that may be going, making its node where the kernel does not.

    Args:
        number: The device.
        dir_fd: As for Loop.
        read_only: As for Loop.
        made: Takes the path and device number of a node that was made.

    Raises:
        RaceLost: It is being detached or was removed.
    """
    try:
        return Loop(number, dir_fd, read_only=read_only)
    except NoSuchDeviceError as exc:
        if exc.errno == errno.ENOENT and (dir_fd is not None or not nodes.kernel_makes_them()):
            name = f"loop{number}" if dir_fd is not None else f"/dev/loop{number}"
            rdev = sysfs.rdev(number)
            if rdev is not None and nodes.ensure(name, rdev, dir_fd=dir_fd) and made is not None:
                made[name] = rdev
        # Without a node it cannot be had, and the kernel may name it again and again.
        raise RaceLost(stuck=exc.errno == errno.ENOENT) from exc


def lock_or_lose(loop: Loop) -> None:
    """Lock a device for its set-up.

    Raises:
        RaceLost: Somebody has it locked, udev for one.
    """
    try:
        loop.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise RaceLost(stuck=True) from exc


def configure_or_lose(loop: Loop, fd: int, config: dict[str, object]) -> None:
    """Bind a device that another may have bound first.

    Raises:
        RaceLost: It is bound or claimed by somebody else.
    """
    try:
        loop.configure(fd, **config)  # type: ignore[arg-type]
    except DeviceBusyError as exc:
        raise RaceLost(stuck=not sysfs.is_bound(loop.minor)) from exc
