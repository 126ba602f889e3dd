# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Detaching a loop device, so that it is detached and nothing that was written is lost.

LOOP_CLR_FD by the only one who has the device open drops what is dirty in its page cache (Linux
6.11 and later; linux/drivers/block/loop.c, Lo_rundown). So it is never asked for that: the device
gets autoclear, and our close, the last one, writes everything out and lets go of the file.
"""

from __future__ import annotations

import errno
import os
import time

from loopdev._allocate import released
from loopdev._backoff import backoff
from loopdev._control import LoopControl
from loopdev._loop import Loop
from loopdev.errors import (
    DeviceBusyError,
    NoSuchDeviceError,
    NotBoundError,
    NotPermittedError,
    kernel_error,
)
from loopdev.kernel import abi, nodes, probe, sysfs
from loopdev.kernel.fds import open_device
from loopdev.kernel.ioctl import diskseq_of, ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopdev._holders import Holder
    from loopdev.kernel.fds import OwnedFd

REPLACED = "was detached or given another backing file by somebody else"
# How long to go on when udev or blkid looks at a device that is to be removed, in seconds.
_REMOVE_TIMEOUT = 5.0
# When a pause has grown to this many seconds, it is worth the time to look who has the device.
_LOOK_AROUND = 0.01


class Detachment:
    """The end of one attachment.

    Args:
        pin: A descriptor of the device for reading. It is closed when the device is detached.
        number: The device.
        diskseq: The attachment that is meant.
        persistent: It has no autoclear.
        partitioned: It may have partitions.

    Attributes:
        pin: Open again, maybe under another number, if the device could not be detached.
    """

    def __init__(
        self, pin: OwnedFd, number: int, diskseq: int | None, persistent: bool, partitioned: bool
    ) -> None:
        self.pin = pin
        self._path = pin.name
        self._number = number
        self._diskseq = diskseq
        # While the pin is open the device keeps its file, so this is still the one it had.
        self._backing_file = sysfs.backing_file(number) if diskseq is None else None
        self._persistent = persistent
        self._partitioned = partitioned
        self._removed: list[sysfs.PartitionNode] = []
        self._marked = False

    def run(self, timeout: float, keep: bool = False) -> None:
        """Detach within *timeout* seconds, or leave the device as it was.

        Args:
            timeout: Seconds.
            keep: Leave the unbound device, whatever its number: whoever added it will use it
                again, or remove it.

        Raises:
            DeviceBusyError: With the holders.
            NotBoundError: The device is not ours any more.
            KernelError: EIO, ENOSPC: data could not be written.
        """
        try:
            if not self._try_at_once():
                self._insist(time.monotonic() + timeout)
        except BaseException:
            self._take_back()
            raise
        for node in self._removed:
            # Where /dev is no devtmpfs; whoever made it, its number is another's from now on.
            nodes.discard(f"{self._path}p{node.number}", node.rdev)
        if keep:
            return
        if self._number < probe.preset():
            released(self._number)
        else:
            remove_on_demand(self._number)

    def _try_at_once(self) -> bool:
        try:
            self._let_go()
        except DeviceBusyError:
            return False
        return self._is_gone()

    def _is_gone(self) -> bool:
        """Return whether the attachment is over; the device may have another."""
        return not sysfs.is_bound(self._number) or self._is_another()

    def _is_another(self) -> bool:
        if self._diskseq is not None:
            return sysfs.diskseq(self._number) != self._diskseq
        return sysfs.backing_file(self._number) != self._backing_file

    def run_lazily(self) -> None:
        """Have the kernel detach when the last user closes the device."""
        fd = self.pin.fileno()
        self._check_ours(fd)
        sync(fd, self._path)
        if self._persistent:
            # With a second descriptor open LOOP_CLR_FD does no more than to set autoclear.
            with open_device(self._path, os.O_RDONLY):
                set_autoclear(fd, self._path)
        self.pin.close()

    def _let_go(self) -> None:
        """Claim the device, clean it up and close it.

        Raises:
            DeviceBusyError: It is claimed, or a partition is open; it is as it was.
        """
        # Nobody can mount it from here on, and nothing that is mounted writes to it.
        with open_device(self._path, os.O_RDONLY | os.O_EXCL) as claim:
            fd = claim.fileno()
            self._check_ours(fd)
            try:
                if self._partitioned:
                    from loopdev import _partnodes

                    self._removed = _partnodes.remove_all(fd, self._path, self._number)
                # By the descriptor that was open all the time: it knows of every error since.
                sync(self.pin.fileno(), self._path)
                if self._persistent:
                    self._marked = True
                    # The pin is open too: this only sets autoclear.
                    set_autoclear(fd, self._path)
            except BaseException:
                self._restore(fd)
                raise
            self.pin.close()

    def _insist(self, deadline: float) -> None:
        """Go on until the device can be claimed, and then until it is gone.

        Raises:
            DeviceBusyError: The time is up, or its users will not leave by themselves.
        """
        holders: Sequence[Holder] = ()
        looked = 0
        for pause in backoff(deadline):
            if self.pin.closed:
                if self._is_gone():
                    return
            else:
                try:
                    self._let_go()
                except DeviceBusyError:
                    pass
            # At once at what is quickly seen; after a while, once, at all processes.
            if looked < (2 if pause > _LOOK_AROUND else 1):
                looked += 1
                holders = self._holders(processes=looked > 1)
                if any(holder.kind != "process" for holder in holders):
                    break
        else:
            holders = self._holders()
        if self._take_back():
            raise _busy(self._path, holders)

    def _check_ours(self, fd: int) -> None:
        if diskseq_of(fd, self._path) != self._diskseq or (
            self._diskseq is None and self._is_gone()
        ):
            raise NotBoundError(errno.ENXIO, self._path, "detach", REPLACED)

    def _holders(self, processes: bool = True) -> Sequence[Holder]:
        from loopdev._holders import holders_of

        ours = () if self.pin.closed else (self.pin.fileno(),)
        return holders_of(self._number, processes, ours)

    def _restore(self, fd: int) -> None:
        """Undo what was done to the device, which is open."""
        removed, self._removed = self._removed, []
        if removed:
            from loopdev import _partnodes

            _partnodes.restore(fd, self._path, removed)
        marked, self._marked = self._marked, False
        if marked:
            _clear_autoclear(self._number)

    def _take_back(self) -> bool:
        """Hold the device again, as it was; False: it is gone."""
        if not self.pin.closed:
            return True
        try:
            pin = open_device(self._path, os.O_RDONLY)
        except NoSuchDeviceError:
            return False  # ENXIO: its last user is just leaving
        fd = pin.fileno()
        if diskseq_of(fd, self._path) != self._diskseq or self._is_gone():
            pin.close()
            return False
        self.pin = pin
        self._restore(fd)
        return True


def _busy(path: str, holders: Sequence[Holder]) -> DeviceBusyError:
    reason = "is in use, but not by a process, mount or device that can be seen from here"
    return DeviceBusyError(errno.EBUSY, path, "detach", reason, holders)


def set_autoclear(fd: int, path: str) -> None:
    """Have the kernel detach the device at its last close, without the 15 ms of SET_STATUS64.

    Somebody must have the device open on another descriptor as well.
    """
    ioctl(fd, abi.LOOP_CLR_FD, path)


def _clear_autoclear(number: int) -> None:
    # For reading if that is allowed (with CAP_SYS_ADMIN): closing a device that was open for
    # writing makes udev read the partition table again.
    try:
        with Loop(number, read_only=True) as loop:
            loop.set_status(autoclear=False)
    except NotPermittedError:
        with Loop(number) as loop:
            loop.set_status(autoclear=False)


def sync(fd: int, path: str) -> None:
    """Write out a device and its backing file.

    Raises:
        KernelError: EIO, ENOSPC: data was lost.
    """
    try:
        os.fsync(fd)
    except OSError as exc:
        raise kernel_error(exc, path, "fsync") from exc


def remove_on_demand(number: int) -> None:
    """Remove an unbound device if the module did not make it at its start.

    Such a device exists because somebody needed one more. LOOP_CTL_GET_FREE makes it again when
    it is needed again; nobody else ever removes it.
    """
    if number >= probe.preset():
        try:
            remove_device(number, _REMOVE_TIMEOUT)
        except (DeviceBusyError, NotPermittedError):
            pass  # somebody uses it already


def remove_device(number: int, timeout: float) -> None:
    """Remove an unbound device, once those who only look at it (udev) have closed it.

    One that does not exist is no error.

    Raises:
        DeviceBusyError: It is bound, or was open all the time.
    """
    busy: DeviceBusyError | None = None
    with LoopControl() as control:
        for _ in backoff(time.monotonic() + timeout):
            try:
                control.remove(number)
            except NoSuchDeviceError:
                return
            except DeviceBusyError as exc:
                busy = exc
                if sysfs.is_bound(number):
                    break
            else:
                return
    if busy is not None:
        raise busy
