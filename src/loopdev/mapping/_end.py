# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The end of a map, whoever asks for it and whoever of its processes still lives.

Everything is found by looking: the device by its backing file, the mount in mountinfo, the
processes by the lock that they hold. So it can be done again, from any state.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from loopdev._backoff import backoff
from loopdev._device import LoopDevice
from loopdev.errors import (
    DeviceBusyError,
    KernelError,
    NoSuchDeviceError,
    NotBoundError,
    NotMappedError,
    WaitTimeoutError,
    kernel_error,
)
from loopdev.fuse import session
from loopdev.kernel import mounts, sysfs
from loopdev.kernel.fds import OwnedFd
from loopdev.mapping._registry import discard

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from loopdev.mapping._registry import Entry

TIMEOUT = 10.0
# For processes that have nothing left to serve, in seconds; then they are killed.
_LAST_WORDS = 3.0


def end(entry: Entry, *, timeout: float = TIMEOUT, lazy: bool = False, force: bool = False) -> None:
    """Detach the device, unmount the file, and wait until nothing of the map is left.

    Args:
        entry: The map.
        timeout: How long to wait for users of the device to leave, in seconds.
        lazy: If it is in use, let it go when its last user leaves; it serves till then.
        force: Fail all reads, now and later, instead of asking its users to leave.

    Raises:
        NotMappedError: There is no such map.
        DeviceBusyError: The device is in use, and was left as it was. With its holders.
        WaitTimeoutError: Its processes do not end, or somebody else is ending it all the time.
    """
    deadline = time.monotonic() + timeout
    with _Directory(entry, timeout + 2 * _LAST_WORDS) as directory:
        if force:
            _abort(entry)
        for number in entry.devices():
            if not _detach(entry, number, timeout, lazy, force):
                return
        _unmount(entry, lazy or force, deadline)
        if not directory.wait_unlocked(_LAST_WORDS):
            directory.kill_all()
            if not directory.wait_unlocked(_LAST_WORDS):
                raise WaitTimeoutError(entry.path, "its processes do not end", _LAST_WORDS)
        directory.discard()


class _Directory:
    """A map's directory, which is this one for as long as it is open: names can be used again."""

    def __init__(self, entry: Entry, timeout: float) -> None:
        self._entry, self._timeout = entry, timeout
        self._life: OwnedFd | None = None
        try:
            self._fd = OwnedFd.open(entry.path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise NotMappedError(entry.name) from exc
        except OSError as exc:
            raise kernel_error(exc, entry.path, "open") from exc

    def __enter__(self) -> Self:
        # One ends it, the others wait; it is gone then.
        if not self._lock():
            self._fd.close()
            raise WaitTimeoutError(self._entry.path, "somebody else is ending it", self._timeout)
        if not self._is_there():
            self._fd.close()
            raise NotMappedError(self._entry.name)
        # Now: the supervisor removes it before it ends.
        try:
            self._life = OwnedFd.open("lock", os.O_RDONLY, dir_fd=self._fd.fileno())
        except OSError:
            self._life = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._life is not None:
            self._life.close()
        self._fd.close()

    def _lock(self) -> bool:
        for _ in backoff(time.monotonic() + self._timeout):
            try:
                fcntl.flock(self._fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return True
        return False

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._entry.path), os.fstat(self._fd.fileno()))
        except FileNotFoundError:
            return False

    def wait_unlocked(self, timeout: float) -> bool:
        """Return whether all processes of the map have ended within *timeout* seconds."""
        if self._life is None:
            return True
        for _ in backoff(time.monotonic() + timeout, longest=0.02):
            try:
                fcntl.flock(self._life.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            fcntl.flock(self._life.fileno(), fcntl.LOCK_UN)
            return True
        return False

    def kill_all(self) -> None:
        """Kill who has the lock: processes of this map that were stopped, or hang."""
        import signal

        assert self._life is not None  # somebody has it
        lock = os.fstat(self._life.fileno())
        for pid in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
            try:
                with OwnedFd(os.pidfd_open(pid), "pidfd") as process:
                    # Looked at after it was opened: so it is this process that is killed.
                    if pid != os.getpid() and _has_lock(pid, lock):
                        signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
            except OSError:
                continue

    def discard(self) -> None:
        """Remove it."""
        discard(self._fd.fileno(), self._entry.path)


def _has_lock(pid: int, file: os.stat_result) -> bool:
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            # Not a stat of the descriptor's file: that may be one that nobody serves.
            link = os.readlink(f"/proc/{pid}/fd/{name}")
            if not link.removesuffix(" (deleted)").endswith("/lock"):
                continue
            # Others have it open, too: to see whether it is locked, or to wait until it is not.
            with open(f"/proc/{pid}/fdinfo/{name}") as info:
                locked = any(line.startswith("lock:") and " WRITE " in line for line in info)
            if locked and os.path.samestat(os.stat(f"/proc/{pid}/fd/{name}"), file):
                return True
        except OSError:
            continue
    return False


def _abort(entry: Entry) -> None:
    found = mounts.mounted(entry.image)
    if found is None:
        return
    if not session.abort(os.minor(found.device)):
        try:
            mounts.umount(entry.image, mounts.MNT_FORCE | mounts.UMOUNT_NOFOLLOW)
        except KernelError:
            pass  # EBUSY: it is in use still, but aborted


def _detach(entry: Entry, number: int, timeout: float, lazy: bool, force: bool) -> bool:
    """Detach one device; False: it will be when its last user leaves, and until then is served."""
    try:
        device = LoopDevice.open(f"/dev/loop{number}", sysfs.diskseq(number))
        try:
            if number not in entry.devices():
                return True
            device.detach(0.1 if force or lazy else timeout)
        except DeviceBusyError:
            if not force and not lazy:
                raise
            device.detach(lazy=True)
            return force
        finally:
            device.close()
    except (NotBoundError, NoSuchDeviceError):
        pass  # somebody else was quicker
    return True


def _unmount(entry: Entry, lazy: bool, deadline: float) -> None:
    for _ in backoff(deadline, longest=0.05):
        if not entry.is_mounted():
            return
        try:
            mounts.umount(entry.image, mounts.UMOUNT_NOFOLLOW)
        except KernelError as exc:
            if exc.errno == errno.EINVAL:
                return  # unmounted by somebody else
            if exc.errno != errno.EBUSY:
                raise
            if lazy:
                break
    # In use by who has the file itself open: it goes with them.
    try:
        mounts.umount(entry.image, mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW)
    except KernelError as exc:
        if exc.errno != errno.EINVAL:
            raise
