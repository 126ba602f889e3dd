# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Loop devices as /sys shows them: attributes, partitions, module parameters.

Reading sysfs never waits for a backing file, so all that must not hang reads here and not by
ioctl. The directory loopN/loop exists only while the device is bound.
"""

from __future__ import annotations

import errno
import os

from loopdev._value import Value

# Not /sys/block, whose entries are links to here: resolving one costs as much as reading does.
BLOCK = "/sys/devices/virtual/block"
_MODULE = "/sys/module/loop/parameters"


class PartitionNode(Value):
    """A partition as the kernel has it.

    Attributes:
        number: Its number in the table.
        start: First byte, counted from the start of the device.
        size: Bytes.
        rdev: Its device number.
    """

    number: int
    start: int
    size: int
    rdev: int


def read(path: str, dir_fd: int | None = None) -> bytes | None:
    """Return an attribute without its last newline, None where there is none.

    Other newlines belong to the value: a backing file's name may hold them.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as exc:
        # ENODEV: it is just being removed.
        if exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV):
            raise
        return None
    try:
        return os.read(fd, 8192).removesuffix(b"\n")
    except OSError:
        # ENODEV: the device went while we read; ENAMETOOLONG: a path over a page.
        return None
    finally:
        os.close(fd)


def read_int(path: str, dir_fd: int | None = None) -> int | None:
    """Return a numeric attribute, None where there is none."""
    text = read(path, dir_fd)
    return int(text) if text else None


def numbers() -> list[int]:
    """Return the numbers of all loop devices, bound or not, in order."""
    return sorted(
        int(name[4:])
        for name in os.listdir(BLOCK)
        if name.startswith("loop") and name[4:].isdecimal()
    )


def end_of_numbers() -> int:
    """Return the number after the largest that a loop device can have."""
    # Linux has 2^20 minors for a driver; drivers/block/loop.c shifts numbers by fls(max_part).
    return (1 << 20) >> (module_parameter("max_part") or 0).bit_length()


def size(number: int) -> int:
    """Return the device's size in bytes, 0 without the device."""
    return (read_int(f"{BLOCK}/loop{number}/size") or 0) * 512


def is_bound(number: int) -> bool:
    """Return whether the device has a backing file."""
    return os.access(f"{BLOCK}/loop{number}/loop", os.F_OK)


def exists(number: int) -> bool:
    """Return whether the kernel has a loop device of this number."""
    return os.access(f"{BLOCK}/loop{number}", os.F_OK)


def backing_file(number: int) -> str | None:
    """Return the path of the backing file as the kernel spells it, None when unbound."""
    path = read(f"{BLOCK}/loop{number}/loop/backing_file")
    return None if path is None else os.fsdecode(path)


def diskseq(number: int) -> int | None:
    """Return the device's sequence number; None before Linux 5.15, or without the device."""
    return read_int(f"{BLOCK}/loop{number}/diskseq")


def parse_dev(text: bytes) -> int:
    """Return the device number in an attribute ``dev`` ("7:3")."""
    major, minor = text.split(b":")
    return os.makedev(int(major), int(minor))


def rdev(number: int) -> int | None:
    """Return the device number of the whole device."""
    text = read(f"{BLOCK}/loop{number}/dev")
    return parse_dev(text) if text else None


# How many links an unbound device without partitions has: learnt once.
_bare_links: int | None = None


def is_bare(number: int) -> bool:
    """Return whether a device is unbound and has no partitions; False may also be a doubt.

    Both would be directories in the device's own, so its number of links tells, at a third of the
    price of reading it.
    """
    global _bare_links  # noqa: PLW0603 - the same for all devices of a kernel
    place = f"{BLOCK}/loop{number}"
    try:
        links = os.stat(place).st_nlink
        if _bare_links is None:
            names = os.listdir(place)
            extra = sum(name == "loop" or name.startswith(f"loop{number}p") for name in names)
            if os.stat(place).st_nlink != links:
                return False  # it is just being bound or detached: another time
            _bare_links = links - extra
    except FileNotFoundError:
        return False
    return links == _bare_links


def has_partitions(number: int) -> bool:
    """Return whether the kernel has partitions on a bound device; True may also be a doubt.

    Told from the number of links, as by is_bare().
    """
    if _bare_links is None:
        return bool(partition_numbers(number))
    try:
        return os.stat(f"{BLOCK}/loop{number}").st_nlink > _bare_links + 1
    except FileNotFoundError:
        return False


def partition_numbers(number: int) -> list[int]:
    """Return the numbers of the partitions that the kernel has on a device, in order."""
    try:
        names = os.listdir(f"{BLOCK}/loop{number}")
    except FileNotFoundError:
        return []
    prefix = f"loop{number}p"
    cut = len(prefix)
    return sorted([int(name[cut:]) for name in names if name.startswith(prefix)])


def partitions(number: int) -> list[PartitionNode]:
    """Return the partitions that the kernel has on a device, in order."""
    found = []
    for part in partition_numbers(number):
        base = f"{BLOCK}/loop{number}/loop{number}p{part}"
        dev = read(f"{base}/dev")
        start_sectors, size_sectors = read_int(f"{base}/start"), read_int(f"{base}/size")
        if not dev or start_sectors is None or size_sectors is None:
            continue  # it went away while we read
        found.append(
            PartitionNode(
                number=part,
                start=start_sectors * 512,
                size=size_sectors * 512,
                rdev=parse_dev(dev),
            )
        )
    return found


def module_parameter(name: str) -> int | None:
    """Return a parameter of the loop module (max_loop, max_part, hw_queue_depth)."""
    return read_int(f"{_MODULE}/{name}")
