# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The one way to attach a backing file to a loop device."""

from __future__ import annotations

import errno
import os

from loopdev._allocate import RaceLost, claim, claim_number, claim_recent, take_turn
from loopdev._backing import Backing
from loopdev._configure import LoopConfig, check_sector_size, configure, cut_loop_ref
from loopdev._control import LoopControl, lock_or_lose, open_or_lose
from loopdev._device import LoopDevice
from loopdev._loop import MAX_NUMBER, Loop
from loopdev.errors import (
    BackingFileError,
    DeviceBusyError,
    InvalidValueError,
    KernelError,
    NoSuchDeviceError,
    VerificationError,
)
from loopdev.kernel import abi, nodes, probe, sysfs
from loopdev.kernel.fds import open_device
from loopdev.kernel.ioctl import diskseq_of, get_int, get_u64, status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev._backing import BackingLike
    from loopdev.kernel.fds import OwnedFd
    from loopdev.partitions import PartitionTable

DEFAULT_TIMEOUT = 30.0
# How long to wait for udev to be done with a device that has partitions, in seconds.
_UDEV_TIMEOUT = 2.0
_SECTOR = 512
# As far as the GPT header of a table with sectors of 4096 bytes.
_HEAD = 8192
_GPT_SIGNATURE = b"EFI PART"


def attach(
    backing: BackingLike,
    *,
    offset: int = 0,
    sizelimit: int = 0,
    sector_size: int | None = None,
    read_only: bool = False,
    partscan: bool = False,
    direct_io: bool | None = None,
    persist: bool = False,
    loop_ref: str | bytes | None = None,
    number: int | None = None,
    reuse: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
    lock: bool | None = None,
    force: bool = False,
) -> LoopDevice:
    """Attach a file or block device to a loop device, and return it ready for use.

    When this returns, the device has been read back and is what was asked for, and the nodes of
    its partitions are there. When it raises, nothing is bound.

    Args:
        backing: A path, or an open file or descriptor, which stays the caller's.
        offset: First byte of the file that the device shows, a multiple of 512.
        sizelimit: Bytes from there, a multiple of the sector size; 0: to the end of the file.
        sector_size: Logical block size in bytes, a power of two from 512 to the page size (to
            64 KiB where the kernel takes it); None: that of the file's GPT, else the kernel's
            choice.
        read_only: Take no writes. A file that cannot be written is refused without it.
        partscan: Read the partition table and have a node for each partition.
        direct_io: Read and write past the file's page cache. None: where the file can.
        persist: The device stays when this process ends, until somebody detaches it. Otherwise
            the kernel detaches it when the returned object is closed or its process dies.
        loop_ref: Free text that anybody can read, 63 bytes; None: the file's path.
        number: This device and no other, added if it does not exist; None: any.
        reuse: Return the device that has this file, offset and sizelimit already, if one has.
        timeout: Seconds to go on after lost races.
        lock: Keep udev from the device until it is set up; None: where partitions are.
        force: Take a file whose end is no multiple of the sector size; the rest is not readable.

    Returns:
        The device, owned by the caller, for use in a ``with``.

    Raises:
        BackingFileError: The file is missing, of another kind, not writable, too short or not
            aligned; or *direct_io* was demanded and it cannot.
        InvalidValueError: An argument is out of range, or passes the end of the file.
        ImageFormatError: With *partscan*, a damaged partition table.
        DeviceBusyError: *number* is bound already.
        NoFreeDeviceError: No device could be had in time.
        NoSuchDeviceError: There is no /dev/loop-control, and no device of that number.
        NotPermittedError: The caller may not use loop devices.
        VerificationError: The kernel made something else of it.
    """
    if number is not None and not 0 <= number <= MAX_NUMBER:
        raise InvalidValueError("number", number, f"must be from 0 to {MAX_NUMBER}")
    if not timeout >= 0:
        raise InvalidValueError("timeout", timeout, "must be 0 or more")
    flags = abi.LO_FLAGS_READ_ONLY if read_only else 0
    flags |= abi.LO_FLAGS_PARTSCAN if partscan else 0
    flags |= abi.LO_FLAGS_DIRECT_IO if direct_io is not False else 0
    flags |= abi.LO_FLAGS_AUTOCLEAR if not persist else 0
    if sector_size is not None:
        check_sector_size(sector_size)  # 0 is no sector size
    config = LoopConfig(offset, sizelimit, sector_size or 0, flags)
    file = Backing.open(backing, read_only)
    try:
        head = file.read(offset, _HEAD) if sector_size is None or partscan else b""
        if sector_size is None:
            sector_size = _table_sector_size(head)
        length = file.length_of(offset, sizelimit, sector_size, force)
        # Without a table the kernel may choose, but not so that the end is cut off.
        config.block_size = sector_size or (_SECTOR if length % 4096 else 0)
        config.loop_ref = cut_loop_ref(file.name if loop_ref is None else loop_ref)
        table = _read_table(file, offset, length, sector_size, head) if partscan else None
        work = _Attachment(file, config, length, table, direct_io, lock)
        return work.reuse(number, timeout) if reuse else work.run(number, timeout)
    finally:
        file.close()


def _table_sector_size(head: bytes) -> int:
    """Return the sector size that a GPT was written with; 0: there is none."""
    # Most images have no GPT: find that out before the parser is loaded.
    if _GPT_SIGNATURE not in (head[512:520], head[4096:4104], head[2048:2056], head[1024:1032]):
        return 0
    from loopdev.partitions import find_sector_size

    return find_sector_size(head) or 0


def _read_table(
    file: Backing, offset: int, length: int, sector_size: int, head: bytes
) -> PartitionTable | None:
    from loopdev.partitions import read_table

    def read(position: int, count: int) -> bytes:
        count = max(0, min(count, length - position))
        if position + count <= len(head):
            return head[position : position + count]
        return file.read(offset + position, count)

    return read_table(read, length, sector_size or None, file.name)


class _Attachment:
    """One attachment in the making: arguments checked, the file looked at."""

    __slots__ = ("_config", "_direct_io", "_file", "_held", "_length", "_lock", "_made", "_table")

    def __init__(
        self,
        file: Backing,
        config: LoopConfig,
        length: int,
        table: PartitionTable | None,
        direct_io: bool | None,
        lock: bool | None,
    ) -> None:
        self._file, self._config, self._length, self._table = file, config, length, table
        self._direct_io = direct_io
        # A partition that is open while udev looks at the device.
        self._held: OwnedFd | None = None
        # Nodes of disks that had none, where /dev is no devtmpfs.
        self._made: dict[str, int] = {}
        self._lock = bool(config.flags & abi.LO_FLAGS_PARTSCAN) if lock is None else lock

    def run(self, number: int | None, timeout: float) -> LoopDevice:
        """Attach to this device, or any."""
        if number is not None:
            device = self._take(number, timeout)
        elif (recent := claim_recent(self._bind)) is not None:
            device = recent
        else:
            with LoopControl() as control:
                device = self._search(control, timeout)
        return device if self._held is None else self._settle(device)

    def _search(self, control: LoopControl, timeout: float, locked: bool = False) -> LoopDevice:
        try:
            return claim(control, self._bind, timeout, locked)
        finally:
            self._discard_unused()

    def _take(self, number: int, timeout: float) -> LoopDevice:
        try:
            return claim_number(_add, self._bind, timeout, number)
        finally:
            self._discard_unused()

    def _discard_unused(self) -> None:
        """Remove the nodes that were made for devices that came to nothing."""
        for path, rdev in self._made.items():
            # If the device was lost to another process, the node is that one's now.
            if not sysfs.is_bound(int(path.removeprefix("/dev/loop"))):
                nodes.discard(path, rdev)

    def reuse(self, number: int | None, timeout: float) -> LoopDevice:
        """Return the device that is this attachment already, or attach."""
        from loopdev._devices import reusable

        with LoopControl() as control:
            # Of two processes that ask for one device of a file the second must see the first's.
            take_turn(control, timeout)
            found = reusable(self._file, self._config, self._length, self._direct_io, number)
            if found is None:
                if number is not None:
                    made = self._take(number, timeout)
                else:
                    made = self._search(control, timeout, locked=True)
        if found is None:
            return made if self._held is None else self._settle(made)
        try:
            if self._config.flags & abi.LO_FLAGS_PARTSCAN:
                found.rescan()
        except BaseException:
            found.close()
            raise
        return found

    def _bind(self, number: int) -> LoopDevice:
        """Bind one device and set it up, or leave it as it was.

        Raises:
            RaceLost: Another has it.
        """
        if not sysfs.is_bare(number):
            # Not opened to find out: that may keep another's device from being detached.
            if sysfs.is_bound(number):
                raise RaceLost
            _drop_strays(number)
        read_only = bool(self._config.flags & abi.LO_FLAGS_READ_ONLY)
        try:
            with open_or_lose(number, read_only=read_only, made=self._made) as loop:
                if not self._lock:
                    device = self._set_up(loop)
                else:
                    # On a description of its own, closed last, and for reading: after a close for
                    # writing udev reads the table again, unless the device is still locked.
                    with Loop(number, read_only=True) as guard:
                        lock_or_lose(guard)
                        device = self._set_up(loop)
                        loop.close()
        except RaceLost:
            raise
        except BaseException:
            from loopdev._detach import remove_on_demand

            remove_on_demand(number)
            raise
        return device

    def _set_up(self, loop: Loop) -> LoopDevice:
        fd, path, number = loop.fileno(), loop.path, loop.minor
        partscan = bool(self._config.flags & abi.LO_FLAGS_PARTSCAN)
        held: OwnedFd | None = None
        made: list[tuple[str, int]] = []
        try:
            self._configure(fd, path, number)
            self._verify(fd, path)
            if partscan:
                from loopdev._partnodes import agree, hold

                made = agree(fd, path, number, self._table)
                held = hold(number)
            diskseq = diskseq_of(fd, path)
            # From here on for reading only: where the kernel forbids writing to mounted devices,
            # one that is open for writing cannot be mounted.
            pin = open_device(path, os.O_RDONLY)
        except RaceLost:
            raise
        except BaseException:
            if held is not None:
                held.close()
            self._undo(loop, made)
            raise
        self._held = held
        persist = not self._config.flags & abi.LO_FLAGS_AUTOCLEAR
        if path in self._made:
            made.append((path, self._made.pop(path)))
        return LoopDevice(number, pin, diskseq, persist, partscan, self._table, made, created=True)

    def _settle(self, device: LoopDevice) -> LoopDevice:
        """Wait until udev has looked at the device, and see that the partitions are still there."""
        from loopdev._partnodes import agree
        from loopdev.kernel import udev

        assert self._held is not None
        try:
            with self._held:
                udev.wait_idle(_UDEV_TIMEOUT)
            agree(device.fileno(), device.path, device.number, self._table)
        except BaseException:
            # Not to be refused because udev, or whoever, has it open.
            device.detach(lazy=True)
            raise
        return device

    def _configure(self, fd: int, path: str, number: int) -> None:
        try:
            configure(fd, path, self._file.fileno(), self._config)
        except DeviceBusyError as exc:
            raise RaceLost(stuck=not sysfs.is_bound(number)) from exc
        except KernelError as exc:
            if exc.errno != errno.EBADF:
                raise
            reason = f"is {path} itself, or is backed by it"
            raise BackingFileError(errno.EBADF, self._file.name, reason) from exc

    def _verify(self, fd: int, path: str) -> None:
        """Compare the device with what was asked for."""
        config, status = self._config, self._file.status
        device, inode, _, offset, sizelimit, _, _, _, flags, *_ = status_of(fd, path)
        block_size = get_int(fd, abi.BLKSSZGET, path) if config.block_size else 0
        size = get_u64(fd, abi.BLKGETSIZE64, path)
        # Direct I/O is as the file allows.
        flags_found = flags & ~abi.LO_FLAGS_DIRECT_IO
        flags_asked = config.flags & ~abi.LO_FLAGS_DIRECT_IO
        if probe.part_shift():
            flags_asked |= abi.LO_FLAGS_PARTSCAN  # the kernel sets it where max_part is set
        found = (device, inode, offset, sizelimit, block_size, flags_found, size)
        asked = (
            *(status.st_dev, status.st_ino, config.offset, config.sizelimit),
            *(config.block_size, flags_asked, self._length // _SECTOR * _SECTOR),
        )
        if found != asked:
            names = ("device", "inode", "offset", "sizelimit", "sector size", "flags", "size")
            for name, expected, value in zip(names, asked, found, strict=True):
                if expected != value:
                    raise VerificationError(path, name, expected, value)
        if self._direct_io and not flags & abi.LO_FLAGS_DIRECT_IO:
            reason = "does not take direct I/O at this offset and sector size"
            raise BackingFileError(errno.EINVAL, self._file.name, reason)

    def _undo(self, loop: Loop, made: list[tuple[str, int]]) -> None:
        """Let go of a device that was bound a moment ago; nothing was written through it.

        The request itself may have been refused, or interrupted by a signal after it was done.
        """
        if not loop.is_bound_to_inode(self._file.status):
            return
        from loopdev import _partnodes
        from loopdev._detach import set_autoclear

        _partnodes.discard_nodes(made)
        try:
            _partnodes.remove_all(loop.fd, loop.path, loop.minor)
        finally:
            if not self._config.flags & abi.LO_FLAGS_AUTOCLEAR:
                set_autoclear(loop.fd, loop.path)
            loop.close()


def _add(number: int) -> None:
    with LoopControl() as control:
        control.add(number)


def _drop_strays(number: int) -> None:
    from loopdev._partnodes import drop_strays

    try:
        drop_strays(f"/dev/loop{number}", number)
    except (DeviceBusyError, NoSuchDeviceError) as exc:
        raise RaceLost(stuck=isinstance(exc, DeviceBusyError)) from exc
