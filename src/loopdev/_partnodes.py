# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The partition nodes of one loop device: added where the kernel made none, and removed again."""

from __future__ import annotations

import errno
import os

from loopdev._value import Value
from loopdev.errors import DeviceBusyError, ImageFormatError, KernelError, NotBoundError
from loopdev.kernel import blkpg, nodes, sysfs, udev
from loopdev.kernel.fds import open_device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from loopdev.kernel.fds import OwnedFd
    from loopdev.partitions import PartitionEntry, PartitionTable


class Partition(Value):
    """A partition of a loop device, with its node.

    Attributes:
        number: 1 or more; the N in /dev/loop3pN.
        path: Its node.
        start: First byte, counted from the start of the device.
        size: Bytes.
        type: GPT: the type's GUID; MBR: "0x83"; None where the table was not read.
        name: GPT: its name; None where there is none.
        uuid: As in /dev/disk/by-partuuid; None where there is none.
    """

    number: int
    path: str
    start: int
    size: int
    type: str | None = None
    name: str | None = None
    uuid: str | None = None


def node_path(number: int, partition: int) -> str:
    """Return the path of a partition's node."""
    return f"/dev/loop{number}p{partition}"


def present(number: int) -> tuple[Partition, ...]:
    """Return the partitions that the kernel has, as far as sysfs tells."""
    return tuple(
        Partition(
            number=node.number,
            path=node_path(number, node.number),
            start=node.start,
            size=node.size,
        )
        for node in sysfs.partitions(number)
    )


def described(number: int, table: PartitionTable | None) -> tuple[Partition, ...]:
    """Return the partitions that the kernel has, with what the table says of them."""
    entries = {entry.number: entry for entry in table.partitions} if table is not None else {}
    return tuple(_describe(part, entries.get(part.number)) for part in present(number))


def _describe(part: Partition, entry: PartitionEntry | None) -> Partition:
    if entry is None or entry.start != part.start:
        return part
    return Partition(
        number=part.number,
        path=part.path,
        start=part.start,
        size=entry.size,
        type=entry.type,
        name=entry.name or None,
        uuid=entry.uuid,
    )


def drop_strays(path: str, number: int) -> None:
    """Remove what an earlier user of an unbound device left.

    The kernel drops partitions at detach only where LO_FLAGS_PARTSCAN was set; others would appear
    on our image.

    Raises:
        DeviceBusyError: Somebody has claimed the device.
    """
    strays = sysfs.partition_numbers(number)
    if not strays:
        return
    # While we have it exclusively nobody can bind it, so they are nobody's.
    with open_device(path, os.O_RDONLY | os.O_EXCL) as claim:
        if not sysfs.is_bound(number):
            for stray in strays:
                _delete(claim.fileno(), path, stray)


def _delete(fd: int, path: str, partition: int) -> None:
    try:
        blkpg.delete(fd, path, partition)
    except NotBoundError:
        pass  # ENXIO: it is gone already


def agree(fd: int, path: str, number: int, table: PartitionTable | None) -> list[tuple[str, int]]:
    """Make the kernel's partitions those of the table, and see that each has a node.

    Args:
        fd: The device, borrowed.
        path: Its name.
        number: Its number.
        table: None: no partitions.

    Returns:
        Path and device number of each node made here because /dev is no devtmpfs.

    Raises:
        DeviceBusyError: A partition that must go or move is in use.
        ImageFormatError: The kernel refuses a partition: it is not aligned to the sector size.
        NotPermittedError: Without CAP_SYS_ADMIN.
    """
    have = {node.number: node for node in sysfs.partitions(number)}
    want = {entry.number: entry for entry in table.partitions} if table is not None else {}
    for partition, node in have.items():
        if partition not in want or want[partition].start != node.start:
            _delete(fd, path, partition)
    kept = {number: node for number, node in have.items() if number in want}
    kept = {number: node for number, node in kept.items() if want[number].start == node.start}
    # Those that shrink before those that need the room, and those that grow after.
    for partition, node in kept.items():
        if want[partition].node_size < node.size != want[partition].size:
            blkpg.resize(fd, path, partition, node.start, want[partition].node_size)
    for partition, entry in want.items():
        if partition not in kept:
            _add(fd, path, entry, table)
    for partition, node in kept.items():
        if want[partition].node_size > node.size:
            blkpg.resize(fd, path, partition, node.start, want[partition].node_size)
    return ensure_nodes(number)


def hold(number: int) -> OwnedFd | None:
    """Open one partition, where there is a udevd: with that, nobody can have the table read again.

    Returns:
        Its descriptor, or None where there are no partitions or nobody who would.
    """
    if not udev.is_running():
        return None
    for node in sysfs.partitions(number):
        return open_device(node_path(number, node.number), os.O_RDONLY)
    return None


def _add(fd: int, path: str, entry: PartitionEntry, table: PartitionTable | None) -> None:
    try:
        blkpg.add(fd, path, entry.number, entry.start, entry.node_size)
    except DeviceBusyError:
        # The hybrid images that Linux is distributed in have partitions within others. The
        # kernel's own scan allows that, BLKPG does not: the first one has a node.
        others = table.partitions if table is not None else ()
        if not any(_overlap(entry, other) for other in others if other != entry):
            raise
    except KernelError as exc:
        if exc.errno != errno.EINVAL:
            raise
        reason = f"the kernel refuses partition {entry.number}: not aligned to its sectors"
        raise ImageFormatError(path, entry.start, reason) from exc


def _overlap(one: PartitionEntry, other: PartitionEntry) -> bool:
    return one.start < other.start + other.node_size and other.start < one.start + one.node_size


def ensure_nodes(number: int) -> list[tuple[str, int]]:
    """Make the nodes that are missing, and return them with their device numbers."""
    made = []
    try:
        for part in sysfs.partitions(number):
            path = node_path(number, part.number)
            if nodes.ensure(path, part.rdev):
                made.append((path, part.rdev))
    except BaseException:
        discard_nodes(made)
        raise
    return made


def discard_nodes(made: Iterable[tuple[str, int]]) -> None:
    """Remove nodes that ensure_nodes() made."""
    for path, rdev in made:
        nodes.discard(path, rdev)


def remove_all(fd: int, path: str, number: int) -> list[sysfs.PartitionNode]:
    """Remove every partition of a device, or none, and return what they were.

    Raises:
        DeviceBusyError: One is in use; those removed before it are back.
    """
    removed: list[sysfs.PartitionNode] = []
    try:
        for node in sysfs.partitions(number):
            _delete(fd, path, node.number)
            removed.append(node)
    except BaseException:
        restore(fd, path, removed)
        raise
    return removed


def restore(fd: int, path: str, removed: Iterable[sysfs.PartitionNode]) -> None:
    """Add partitions again that were removed by remove_all()."""
    for node in removed:
        blkpg.add(fd, path, node.number, node.start, node.size)
