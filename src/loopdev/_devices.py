# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What is bound now: all loop devices, those of one file, and who holds one.

Everything here is read from sysfs, which never waits for a backing file. What only an ioctl tells
(``loop_ref``, the file's inode) is asked under a time limit.
"""

from __future__ import annotations

import os
import stat

from loopdev import _partnodes
from loopdev._device import LoopDevice, number_of
from loopdev._holders import Holder, holders_of
from loopdev._partnodes import Partition
from loopdev._value import Value
from loopdev._within import each_within
from loopdev.kernel import abi, sysfs
from loopdev.kernel.fds import open_device
from loopdev.kernel.ioctl import diskseq_of, status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from loopdev._backing import Backing
    from loopdev._configure import LoopConfig

__all__ = ["DeviceInfo", "Holder", "Partition", "devices", "find", "holders", "info"]

# Seconds that one backing file's filesystem is given to answer.
_STATUS_TIMEOUT = 1.0


class DeviceInfo(Value):
    """A bound loop device, as it was when it was looked at.

    Attributes:
        path: "/dev/loop3".
        number: 3.
        backing_file: Its path as the kernel spells it; " (deleted)" follows once it is unlinked.
        offset: First byte of the backing file that the device shows.
        sizelimit: Bytes from there; 0: to the end of the file.
        size: The device's size in bytes.
        sector_size: Logical block size in bytes.
        read_only: Whether it takes no writes.
        autoclear: Whether the kernel detaches it when its last user closes it.
        partscan: Whether the kernel scans it for partitions.
        direct_io: Whether the file is read and written past its page cache.
        diskseq: The number of this attachment; None before Linux 5.15.
        loop_ref: The free text it was given; None where it could not be asked: without the right
            to open the device, or because the backing file's filesystem does not answer.
        partitions: Those that have a node; type, name and uuid are not looked up.
    """

    path: str
    number: int
    backing_file: str
    offset: int
    sizelimit: int
    size: int
    sector_size: int
    read_only: bool
    autoclear: bool
    partscan: bool
    direct_io: bool
    diskseq: int | None
    loop_ref: str | None
    partitions: tuple[Partition, ...]

    def open(self) -> LoopDevice:
        """Open this device.

        Raises:
            NotBoundError: It is bound no longer, or something else is.
        """
        return LoopDevice.open(self.path, self.diskseq)


def devices() -> list[DeviceInfo]:
    """Return all bound loop devices, in order of their numbers; foreign ones, too."""
    return _look(sysfs.numbers())


def info(device: LoopDevice | str | os.PathLike[str]) -> DeviceInfo:
    """Return what one bound device is, with its partitions as the table describes them.

    Raises:
        NoSuchDeviceError: There is none, or it is not a loop device.
        NotBoundError: It has no backing file.
    """
    opened = device if isinstance(device, LoopDevice) else LoopDevice.open(device)
    try:
        partitions = opened.partitions
        for found in _look([opened.number]):
            return DeviceInfo(**{**found.as_dict(), "partitions": partitions})  # type: ignore[arg-type]
        # It is pinned, so it went while it was looked at only if somebody forced it.
        return info(opened.path)
    finally:
        if opened is not device:
            opened.close()


def find(backing: str | bytes | os.PathLike[str] | os.PathLike[bytes] | int) -> list[DeviceInfo]:
    """Return the devices whose backing file is this one, whatever path it was attached by.

    Args:
        backing: A path or a descriptor. Files are compared by st_dev and st_ino, block devices
            by their number.

    Raises:
        FileNotFoundError: and its like, for the path.
    """
    status = os.stat(backing)
    bound = [number for number in sysfs.numbers() if sysfs.is_bound(number)]
    statuses = each_within(_status, bound, _STATUS_TIMEOUT)
    return _look(
        number
        for number, found in zip(bound, statuses, strict=True)
        if (found.is_of(status) if found is not None else _is_path_of(number, status))
    )


def holders(device: LoopDevice | DeviceInfo | str | os.PathLike[str]) -> tuple[Holder, ...]:
    """Return who uses a loop device or a partition of it, the given LoopDevice left out.

    Mounts in every mount namespace, processes that have it open, swap, and the dm, md and loop
    devices on top of it. Without root, what others hold is not seen.

    Raises:
        NoSuchDeviceError: It is not a loop device.
    """
    if isinstance(device, LoopDevice):
        return holders_of(device.number, ours=(device.fileno(),))
    if isinstance(device, DeviceInfo):
        return holders_of(device.number)
    return holders_of(number_of(os.fspath(device)))


def reusable(
    file: Backing, config: LoopConfig, length: int, direct_io: bool | None, number: int | None
) -> LoopDevice | None:
    """Open the device that shows the same bytes of this file in the same way, if there is one."""
    read_only = bool(config.flags & abi.LO_FLAGS_READ_ONLY)
    persist = not config.flags & abi.LO_FLAGS_AUTOCLEAR
    for found in find(file.fileno()):
        if (
            (found.offset, found.sizelimit) == (config.offset, config.sizelimit)
            and found.read_only == read_only
            and found.size == length // 512 * 512
            and config.block_size in (0, found.sector_size)
            and direct_io in (None, found.direct_io)
            # One that goes with its owner is no device that stays.
            and not (persist and found.autoclear)
            and number in (None, found.number)
        ):
            return found.open()
    return None


def _is_path_of(number: int, status: os.stat_result) -> bool:
    """Compare by path: of a device that may not be opened, or whose filesystem hangs."""
    path = sysfs.backing_file(number)
    found = each_within(os.stat, [path], _STATUS_TIMEOUT)[0] if path is not None else None
    return found is not None and os.path.samestat(found, status)


class _Status(Value):
    """What only an ioctl tells."""

    device: int
    inode: int
    rdevice: int
    diskseq: int | None
    loop_ref: str

    def is_of(self, status: os.stat_result) -> bool:
        if stat.S_ISBLK(status.st_mode):
            return self.rdevice == status.st_rdev
        return (self.device, self.inode) == (status.st_dev, status.st_ino)


def _status(number: int) -> _Status:
    with open_device(f"/dev/loop{number}", os.O_RDONLY) as fd:
        diskseq = diskseq_of(fd.fileno(), fd.name)
        fields = status_of(fd.fileno(), fd.name)
    device, inode, rdevice = fields[:3]
    loop_ref = os.fsdecode(fields[9].split(b"\0")[0])
    return _Status(device=device, inode=inode, rdevice=rdevice, diskseq=diskseq, loop_ref=loop_ref)


def _look(numbers: Iterable[int]) -> list[DeviceInfo]:
    seen = {number: found for number in numbers if (found := _attributes(number)) is not None}
    statuses = each_within(_status, list(seen), _STATUS_TIMEOUT)
    for found, status in zip(seen.values(), statuses, strict=True):
        if status is not None and status.diskseq == found["diskseq"]:
            found["loop_ref"] = status.loop_ref
    return [DeviceInfo(**found) for found in seen.values()]  # type: ignore[arg-type]


def _attributes(number: int) -> dict[str, object] | None:
    """Return the fields of a DeviceInfo that sysfs tells, None when unbound."""
    try:
        place = os.open(f"{sysfs.BLOCK}/loop{number}", os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        backing_file = sysfs.read("loop/backing_file", place)
        if backing_file is None:
            return None
        return {
            "path": f"/dev/loop{number}",
            "number": number,
            "backing_file": os.fsdecode(backing_file),
            "offset": sysfs.read_int("loop/offset", place) or 0,
            "sizelimit": sysfs.read_int("loop/sizelimit", place) or 0,
            "size": (sysfs.read_int("size", place) or 0) * 512,
            "sector_size": sysfs.read_int("queue/logical_block_size", place) or 512,
            "read_only": sysfs.read("ro", place) == b"1",
            "autoclear": sysfs.read("loop/autoclear", place) == b"1",
            "partscan": sysfs.read("loop/partscan", place) == b"1",
            "direct_io": sysfs.read("loop/dio", place) == b"1",
            "diskseq": sysfs.read_int("diskseq", place),
            "loop_ref": None,
            "partitions": _partnodes.present(number),
        }
    finally:
        os.close(place)
