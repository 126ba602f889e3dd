# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""LoopDevice: one attachment of a backing file to a loop device, until it is detached."""

from __future__ import annotations

import errno
import os
import stat
import sys

from loopdev.errors import ImageFormatError, NoSuchDeviceError, NotBoundError, kernel_error
from loopdev.kernel import abi, nodes, probe, sysfs
from loopdev.kernel.fds import open_device
from loopdev.kernel.ioctl import diskseq_of, get_int, get_u64, ioctl, status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from loopdev._partnodes import Partition
    from loopdev.kernel.fds import OwnedFd
    from loopdev.partitions import PartitionTable

DETACH_TIMEOUT = 5.0
_REPLACED = "has another backing file by now"


class LoopDevice:
    """A loop device with its backing file.

    :func:`loopdev.attach` makes one; :meth:`open` opens one that exists. It holds the device open
    for reading, so that the device stays what it is for as long as this object is open. In a
    ``with``, an owned device is detached at the end; one that persists, or that was opened, is
    only closed.

    Attributes:
        number: The 3 in /dev/loop3.
        path: "/dev/loop3".
        created: Whether attach() made this attachment, and did not find it.
        diskseq: The number of this attachment, not used again before a reboot; None before Linux
            5.15.
    """

    def __init__(
        self,
        number: int,
        pin: OwnedFd,
        diskseq: int | None,
        persist: bool,
        partitioned: bool,
        table: PartitionTable | None,
        made_nodes: list[tuple[str, int]],
        created: bool,
    ) -> None:
        self.number = number
        self.path = pin.name
        self.diskseq = diskseq
        self.created = created
        self._pin = pin
        self._pid = os.getpid()
        self._persist = persist
        self._partitioned = partitioned
        self._table = table
        self._made_nodes = made_nodes

    @classmethod
    def open(cls, path: str | os.PathLike[str], diskseq: int | None = None) -> Self:
        """Open a loop device that is bound.

        Args:
            path: Its node.
            diskseq: The attachment that is meant; None: whichever it has.

        Raises:
            NoSuchDeviceError: There is no such node, or it is not a loop device (ENOTBLK).
            NotBoundError: It has no backing file, or another attachment by now.
        """
        name = os.fspath(path)
        number = number_of(name)
        pin = open_device(name, os.O_RDONLY)
        try:
            if os.fstat(pin.fileno()).st_rdev != sysfs.rdev(number):
                raise NoSuchDeviceError(errno.ENODEV, name, "open", "was replaced")
            if not sysfs.is_bound(number):
                raise NotBoundError(errno.ENXIO, name, "open", "has no backing file")
            found = diskseq_of(pin.fileno(), name)
            if diskseq is not None and found != diskseq:
                raise NotBoundError(errno.ENXIO, name, "open", _REPLACED)
        except BaseException:
            pin.close()
            raise
        return cls(number, pin, found, True, True, None, [], created=False)

    # What it is. Read anew each time: a device can be resized, and its file renamed.

    def fileno(self) -> int:
        """Return a descriptor of the device for reading, which stays this object's.

        Raises:
            ClosedError: The device was detached or this object closed; so does all else here.
        """
        return self._pin.fileno()

    @property
    def rdev(self) -> int:
        """The device number, as in st_rdev."""
        return os.makedev(abi.LOOP_MAJOR, self.number << probe.part_shift())

    def _attribute(self, name: str) -> bytes | None:
        self._pin.fileno()
        return sysfs.read(f"{sysfs.BLOCK}/loop{self.number}/loop/{name}")

    def _number(self, name: str) -> int:
        return int(self._attribute(name) or 0)

    @property
    def backing_file(self) -> str | None:
        """The file's path as the kernel spells it: " (deleted)" follows once it is unlinked."""
        path = self._attribute("backing_file")
        return None if path is None else os.fsdecode(path)

    @property
    def backing_id(self) -> tuple[int, int]:
        """st_dev and st_ino of the backing file; asks its filesystem, which may hang."""
        device, inode, *_ = status_of(self._pin.fileno(), self.path)
        return device, inode

    @property
    def offset(self) -> int:
        """First byte of the backing file that the device shows."""
        return self._number("offset")

    @property
    def sizelimit(self) -> int:
        """Bytes from there; 0: to the end of the file."""
        return self._number("sizelimit")

    @property
    def direct_io(self) -> bool:
        """Whether the backing file is read and written past its page cache."""
        return bool(self._number("dio"))

    @property
    def autoclear(self) -> bool:
        """Whether the kernel detaches the device when its last user closes it."""
        return bool(self._number("autoclear"))

    @property
    def size(self) -> int:
        """The device's size in bytes."""
        return get_u64(self._pin.fileno(), abi.BLKGETSIZE64, self.path)

    @property
    def sector_size(self) -> int:
        """The logical block size in bytes."""
        return get_int(self._pin.fileno(), abi.BLKSSZGET, self.path)

    @property
    def read_only(self) -> bool:
        """Whether the device takes no writes."""
        return bool(get_int(self._pin.fileno(), abi.BLKROGET, self.path))

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """The partitions that have a node, in order of their numbers."""
        self._pin.fileno()
        if self._table is None and sysfs.partition_numbers(self.number):
            try:
                self._table = self._read_table()
            except ImageFormatError:
                pass  # it was damaged since; the nodes are what they are
        from loopdev._partnodes import described

        return described(self.number, self._table)

    # What can be done with it.

    def refresh_size(self) -> int:
        """Take over the backing file's size after it grew or shrank, and return the new one."""
        ioctl(self._pin.fileno(), abi.LOOP_SET_CAPACITY, self.path)
        return self.size

    def rescan(self) -> tuple[Partition, ...]:
        """Read the partition table again, make the nodes agree with it, and return them.

        Raises:
            ImageFormatError: The table is damaged; the nodes stay as they are.
            DeviceBusyError: A partition that went or moved is in use.
            NotPermittedError: Without CAP_SYS_ADMIN.
        """
        fd = self._pin.fileno()
        # The table may have been written to the file behind the device's page cache.
        ioctl(fd, abi.BLKFLSBUF, self.path)
        from loopdev._partnodes import agree

        self._table = self._read_table()
        if self._table is not None and not self._number("partscan"):
            # With it the kernel drops the partitions when the device goes, however that happens.
            from loopdev._loop import Loop

            with Loop(self.number, read_only=True) as loop:
                loop.set_status(partscan=True)
        self._partitioned = True
        self._made_nodes += agree(fd, self.path, self.number, self._table)
        return self.partitions

    def _read_table(self) -> PartitionTable | None:
        from loopdev.partitions import read_table

        fd = self._pin.fileno()

        def read(offset: int, length: int) -> bytes:
            try:
                return os.pread(fd, length, offset)
            except OSError as exc:
                raise kernel_error(exc, self.path, "read") from exc

        return read_table(read, self.size, self.sector_size, self.path)

    def sync(self) -> None:
        """Write all that was written to the device to the backing file, and that to its disk.

        Raises:
            KernelError: EIO, ENOSPC: data was lost.
        """
        from loopdev._detach import sync

        sync(self._pin.fileno(), self.path)

    def close(self) -> None:
        """Close this object; doing so again is no error.

        A device that does not persist is detached by the kernel as soon as nobody uses it.
        detach() does the same and tells whether it worked.
        """
        if self._pin.closed:
            return
        self._pin.close()
        if not self._persist and os.getpid() == self._pid:
            self._discard_nodes()

    # For the broker, which holds devices as descriptors, among processes.

    @property
    def made_nodes(self) -> tuple[tuple[str, int], ...]:
        """Path and device number of the nodes that were made here, where /dev is no devtmpfs."""
        return tuple(self._made_nodes)

    @property
    def partitioned(self) -> bool:
        """Whether it may have partitions."""
        return self._partitioned

    def exchange_pin(self, pin: OwnedFd) -> None:
        """Hold the device by this descriptor, which is owned from here on, and not by the other."""
        old, self._pin = self._pin, pin
        old.close()

    def take_pin(self) -> int:
        """Hand the descriptor over that keeps the device; this object is closed then."""
        return self._pin.take()

    def _discard_nodes(self) -> None:
        for path, rdev in self._made_nodes:
            nodes.discard(path, rdev)
        self._made_nodes = []

    def detach(self, timeout: float = DETACH_TIMEOUT, lazy: bool = False) -> None:
        """Detach the device: when this returns, the backing file is free and has all the data.

        Partition nodes are removed, the device is synced, and it is waited until the kernel has
        let go of the file. A device that does not exist without need (one beyond those that the
        module makes at its start) is removed.

        Args:
            timeout: Seconds to wait for others to close the device. Mounts, swap and devices on
                top of it are not waited for.
            lazy: Do not wait: the device goes when its last user does.

        Raises:
            DeviceBusyError: It is in use; ``holders`` says by whom. It stays as it was.
            NotBoundError: It has another backing file than it had; nothing was done.
            KernelError: EIO, ENOSPC: data could not be written; the device stays as it was.
            ClosedError: It was detached or closed before.
        """
        self._pin.fileno()
        # Of a device that was opened here, its owner decided.
        persistent = self._persist and not self.autoclear
        from loopdev._detach import Detachment

        work = Detachment(self._pin, self.number, self.diskseq, persistent, self._partitioned)
        try:
            if lazy:
                work.run_lazily()
            else:
                work.run(timeout)
                if self._made_nodes:
                    self._discard_nodes()
        finally:
            self._pin = work.pin

    def remove(self, timeout: float = DETACH_TIMEOUT) -> None:
        """Detach the device and remove it, whatever its number.

        Raises:
            DeviceBusyError: It is in use, or taken by another at once.
        """
        self.detach(timeout)
        from loopdev._detach import remove_device

        remove_device(self.number, timeout)

    def __enter__(self) -> Self:
        self._pin.fileno()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        # A child that was forked has a copy of the descriptor, and no say in what it is open on.
        if self._pin.closed or self._persist or os.getpid() != self._pid:
            self.close()
            return
        try:
            self.detach()
        except BaseException:
            # The kernel will detach it when its last user is gone. What went wrong here must not
            # hide what went wrong in the block.
            self.close()
            if exc is None:
                raise

    def __del__(self) -> None:
        # A device that was forgotten must not stay for as long as the process lives.
        pin = getattr(self, "_pin", None)
        if pin is not None and not pin.closed:
            if not sys.is_finalizing():
                import warnings

                warnings.warn(f"{self!r} was not closed", ResourceWarning, 2, self)
            self.close()

    def __repr__(self) -> str:
        state = " closed" if self._pin.closed else ""
        return f"<LoopDevice {self.path} diskseq={self.diskseq}{state}>"


def number_of(path: str) -> int:
    """Return the number of the whole loop device that a node is of.

    Raises:
        NoSuchDeviceError: There is no such node, or it is not a loop device (ENOTBLK).
    """
    try:
        status = os.stat(path)
    except OSError as exc:
        raise kernel_error(exc, path, "open") from exc
    shift = probe.part_shift()
    minor = os.minor(status.st_rdev)
    is_loop = stat.S_ISBLK(status.st_mode) and os.major(status.st_rdev) == abi.LOOP_MAJOR
    if not is_loop or minor & ((1 << shift) - 1):
        raise NoSuchDeviceError(errno.ENOTBLK, path, "open", "is not a loop device")
    return minor >> shift
