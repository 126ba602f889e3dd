# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""GPT and MBR partition tables: bytes in, values out.

Nothing here opens or writes anything: the caller brings a function that reads. Where a table is
ambiguous the answer is the Linux kernel's (block/partitions/efi.c and msdos.c), so that an image
has the same partitions with and without a kernel that can parse it. Where the kernel drops a
damaged table or partition without a word, this raises instead.
"""

from __future__ import annotations

import binascii
import struct

from loopdev._value import Value
from loopdev.errors import ImageFormatError, InvalidValueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Slots = tuple[tuple[int, int, int, int], ...]  # boot_ind, sys_ind, start_sect, nr_sects

# What find_sector_size() needs for sectors of up to 4096 bytes.
HEAD_SIZE = 8192
# The kernel's last number: its DISK_MAX_PARTS, 256, counts the whole disk as well.
MAX_NUMBER = 255
# Bytes of GPT entries that are read at most. It is the kernel's limit (KMALLOC_MAX_SIZE), so a
# longer table has no partitions under Linux; 32768 entries of 128 bytes fit.
MAX_ARRAY_SIZE = 4 << 20
# Extended boot records that are followed in one container: 251 of them can have a number, the
# others are empty. The kernel stops at 100 empty ones in a row.
MAX_RECORDS = 1024

# By how common a GPT of that size is.
_SECTOR_SIZES = (512, 4096, 2048, 1024)
_LARGE_SECTOR_SIZES = (8192, 16384, 32768, 65536)
_GPT_HEADER = struct.Struct("<12xII4xQQQQ16sQIII")  # UEFI 2.10, table 5-5
_GPT_ENTRY = struct.Struct("<16s16sQQ8x72s")  # UEFI 2.10, table 5-6
_GPT_SIGNATURE = b"EFI PART"
_NO_GPT = "a protective MBR, but no GPT header"
_MBR_SIZE = 512
_MBR_SLOT = struct.Struct("<B3xB3xII")  # struct msdos_partition, <linux/msdos_partition.h>
_FAT_BOOT_SECTOR = struct.Struct("<B10xHxHB4xB")  # struct fat_boot_sector, <linux/msdos_fs.h>
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)


class PartitionEntry(Value):
    """One partition as its table describes it.

    Attributes:
        number: From 1; logical partitions of an MBR from 5.
        start: Where it begins in the image, in bytes.
        size: Its length in bytes.
        type: GPT: the type GUID in lower case. MBR: two hex digits, as in "0x83".
        name: The name in a GPT, "" in an MBR.
        uuid: GPT: the unique GUID in lower case. MBR: disk signature and number, both in hex, as
            the kernel and libblkid write them; None if the disk has no signature.
        node_size: Bytes that the kernel gives the device node: *size*, but for an extended
            container only the boot record, so that nobody formats it.
    """

    number: int
    start: int
    size: int
    type: str
    name: str
    uuid: str | None
    node_size: int


class PartitionTable(Value):
    """A partition table and what it says.

    Attributes:
        label: "gpt" or "dos", the words of blkid and sfdisk.
        sector_size: The size in bytes of the sectors it counts in.
        uuid: GPT: the disk GUID. MBR: the disk signature in 8 hex digits, None if that is 0.
        source: Which copy was read: "primary" or "backup" of a GPT, or "mbr".
        partitions: Sorted by number.
    """

    label: str
    sector_size: int
    uuid: str | None
    source: str
    partitions: tuple[PartitionEntry, ...]


class _Gpt(Value):
    """One copy of a GPT whose checksums hold; the last three are of its array of entries."""

    sector_size: int
    my_lba: int
    disk_guid: bytes
    entry_size: int
    offset: int
    array: bytes


class _Image:
    """The image's bytes: whoever asks for more than there are gets an error, never a part."""

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self._read, self.size = read, size

    def bytes_at(self, offset: int, length: int, what: str) -> bytes:
        end = offset + length
        data = self._read(offset, length) if end <= self.size else b""
        if len(data) < length:
            raise _fault(offset, f"{what} ends at byte {end}, the image at byte {self.size}")
        return data[:length]


def find_sector_size(head: bytes) -> int | None:
    """Return the sector size that an image's GPT was written with, or None without a GPT.

    Args:
        head: The first bytes of the image, HEAD_SIZE of them or more. Sectors above 4096 bytes
            are looked for as far as *head* reaches. Only the primary header is looked at.
    """
    for unit in (*_SECTOR_SIZES, *_LARGE_SECTOR_SIZES):
        try:
            _check_header(head[unit : 2 * unit], unit, 1)
        except ImageFormatError:
            continue
        return unit
    return None


def read_table(
    read: Callable[[int, int], bytes],
    size: int,
    sector_size: int | None = None,
    path: str | None = None,
) -> PartitionTable | None:
    """Return an image's partition table, or None if it has none.

    A GPT counts only behind a protective MBR, and its entries above number 255 are left out: the
    kernel has no numbers for them. Partitions of an MBR may overlap, as those of isohybrid images
    do; those of a GPT may not.

    Args:
        read: Called with an offset and a length; returns that many bytes, fewer only where the
            image ends.
        size: The image's size in bytes.
        sector_size: The sector size of the device, a power of two from 512 to 65536. A GPT is
            found with other sizes too. None: an MBR counts in 512 bytes.
        path: The image's name for errors.

    Raises:
        ImageFormatError: There is a table, but it is damaged or the image is cut off.
        InvalidValueError: *sector_size* is out of its range.
    """
    if sector_size not in (None, *_SECTOR_SIZES, *_LARGE_SECTOR_SIZES):
        raise InvalidValueError("sector_size", sector_size, "not a power of two from 512 to 65536")
    mbr = read(0, _MBR_SIZE) if size >= _MBR_SIZE else b""
    if len(mbr) < _MBR_SIZE:
        return None
    try:
        return _read_table(_Image(read, size), mbr, sector_size)
    except ImageFormatError as exc:
        # The parsers below know bytes only; this is where the name is known.
        raise ImageFormatError(path, exc.offset, exc.reason) from exc


def _read_table(image: _Image, mbr: bytes, sector_size: int | None) -> PartitionTable | None:
    slots = _slots(mbr)
    if slots is None:
        # A GPT behind a wiped MBR is no table either; kernel, blkid, sfdisk and parted agree. It
        # is what a file system that was made on the whole disk has left of an earlier use.
        return None
    sane = all(boot_ind in (0, 0x80) for boot_ind, _, _, _ in slots)
    # Other entries beside the protective one make it a hybrid MBR, where the GPT wins. Without a
    # protective entry the MBR wins, and a GPT behind it is a stale one. The kernel wants the entry
    # at sector 1, libblkid anywhere; boot code that happens to have an 0xEE there is neither.
    if any(kind == _PROTECTIVE and (sane or start == 1) for _, kind, start, _ in slots):
        return _gpt_table(image, _find_gpt(image, sector_size))
    unit = sector_size or 512
    if not sane or _is_filesystem(mbr, slots, image.size // unit):
        return None
    return _MbrReader(image, unit, mbr).table(slots)


def _fault(offset: int, reason: str) -> ImageFormatError:
    return ImageFormatError(None, offset, reason)


def _find_gpt(image: _Image, sector_size: int | None) -> _Gpt:
    """Return the first good copy of the GPT; without one, raise what is wrong with the primary."""
    units = [sector_size] if sector_size is not None else []
    units += [unit for unit in _SECTOR_SIZES if unit != sector_size]
    primary = _fault(units[0], _NO_GPT)
    for unit, lba in _copies(image, [unit for unit in units if image.size >= 3 * unit]):
        try:
            return _read_copy(image, unit, lba)
        except ImageFormatError as exc:
            if lba == 1 and primary.reason == _NO_GPT and exc.reason != _NO_GPT:
                primary = exc
    raise _fault(primary.offset, f"{primary.reason}; the backup is bad too")


def _copies(image: _Image, units: list[int]) -> Iterator[tuple[int, int]]:
    """Yield where a GPT header may be, as sector size and sector: the primaries first."""
    yield from ((unit, 1) for unit in units)
    for unit in units:
        last = image.size // unit - 1
        yield unit, last
        # An image that was enlarged still has its backup where its old end was. The primary that
        # says so is damaged, so this is a hint that the header found there must confirm.
        sector = image.bytes_at(unit, unit, "the GPT header")
        alternate = _GPT_HEADER.unpack_from(sector)[3]
        if sector.startswith(_GPT_SIGNATURE) and 1 < alternate < last:
            yield unit, alternate


def _check_header(sector: bytes, unit: int, lba: int) -> None:
    if len(sector) < _GPT_HEADER.size or not sector.startswith(_GPT_SIGNATURE):
        raise _fault(lba * unit, _NO_GPT)
    size, crc, my_lba, *_ = _GPT_HEADER.unpack_from(sector)
    if not _GPT_HEADER.size <= size <= unit:
        raise _fault(lba * unit, f"a GPT header of {size} bytes, not of 92 to {unit}")
    if binascii.crc32(sector[:16] + bytes(4) + sector[20:size]) != crc:
        raise _fault(lba * unit, "the GPT header's checksum is wrong")
    if my_lba != lba:
        raise _fault(lba * unit, f"the GPT header in sector {lba} is that of sector {my_lba}")


def _read_copy(image: _Image, unit: int, lba: int) -> _Gpt:
    offset = lba * unit
    sector = image.bytes_at(offset, unit, "the GPT header")
    _check_header(sector, unit, lba)
    alternate, first, last, guid, where, count, length, crc = _GPT_HEADER.unpack_from(sector)[3:]
    if first > last:
        raise _fault(offset, f"the GPT's usable sectors start at {first} but end at {last}")
    # The backup behind the usable sectors may be cut off: no partition misses a byte then, and
    # kernel, sfdisk and libblkid take such a GPT as well.
    if last >= image.size // unit:
        disk = f"a disk of {(max(last, alternate) + 1) * unit} bytes"
        raise _fault(offset, f"truncated: the GPT describes {disk}, the image has {image.size}")
    if not _GPT_ENTRY.size <= length <= 4096 or length & (length - 1):
        raise _fault(offset, f"GPT entries of {length} bytes, not 128, 256, ... 4096")
    if not 0 < count <= MAX_ARRAY_SIZE // length:
        raise _fault(offset, f"a GPT of {count} entries, not of 1 to {MAX_ARRAY_SIZE // length}")
    place = where * unit
    array = image.bytes_at(place, count * length, "the array of GPT entries")
    if binascii.crc32(array) != crc:
        raise _fault(place, "the checksum of the GPT entries is wrong")
    return _Gpt(
        sector_size=unit, my_lba=lba, disk_guid=guid, entry_size=length, offset=place, array=array
    )


def _gpt_table(image: _Image, gpt: _Gpt) -> PartitionTable:
    unit = gpt.sector_size
    partitions = tuple(_gpt_entries(gpt, image.size // unit))
    # The border is what is in use, not the usable sectors: some writers put partitions beside
    # those, and the kernel takes them. Where the other copy is does not matter to a reader.
    areas = [(entry.start, entry.size, f"partition {entry.number}") for entry in partitions]
    areas.append((0, unit, "the protective MBR"))
    areas.append((gpt.my_lba * unit, unit, "the GPT header"))
    areas.append((gpt.offset, len(gpt.array), "the array of GPT entries"))
    end, owner = 0, ""
    for start, size, name in sorted(areas):
        if start < end:
            raise _fault(start, f"{owner} and {name} overlap")
        end, owner = start + size, name
    source, uuid = "primary" if gpt.my_lba == 1 else "backup", _guid(gpt.disk_guid)
    return PartitionTable(
        label="gpt", sector_size=unit, uuid=uuid, source=source, partitions=partitions
    )


def _gpt_entries(gpt: _Gpt, sectors: int) -> Iterator[PartitionEntry]:
    for index in range(min(len(gpt.array) // gpt.entry_size, MAX_NUMBER)):
        where = index * gpt.entry_size
        kind, guid, first, last, name = _GPT_ENTRY.unpack_from(gpt.array, where)
        if kind == bytes(16):
            continue
        if not first <= last < sectors:
            reason = f"partition {index + 1}: sectors {first} to {last}, the image has {sectors}"
            raise _fault(gpt.offset + where, reason)
        size = (last - first + 1) * gpt.sector_size
        yield PartitionEntry(
            number=index + 1,
            start=first * gpt.sector_size,
            size=size,
            type=_guid(kind),
            name=_name(name),
            uuid=_guid(guid),
            node_size=size,
        )


def _guid(raw: bytes) -> str:
    # The first three fields are little-endian numbers, the rest are bytes in their order.
    low, mid, high = struct.unpack_from("<IHH", raw)
    return f"{low:08x}-{mid:04x}-{high:04x}-{raw[8:10].hex()}-{raw[10:].hex()}"


def _name(raw: bytes) -> str:
    # With a byte order mark of our own "utf-16" is little-endian, and it is the one of the UTF-16
    # codecs that the interpreter has built in: "utf-16-le" would import a module.
    return (b"\xff\xfe" + raw).decode("utf-16", "replace").partition("\0")[0]


def _slots(sector: bytes) -> Slots | None:
    """Return the four entries of an MBR or extended boot record, None without its signature."""
    return tuple(_MBR_SLOT.iter_unpack(sector[446:510])) if sector[510:512] == b"\x55\xaa" else None


def _is_filesystem(sector: bytes, slots: Slots, sectors: int) -> bool:
    """Tell whether this is the first sector of a FAT, NTFS or exFAT file system and no table.

    It may be both: GRUB keeps the FAT fields of what was on a disk before it was partitioned, and
    kernel and sfdisk read such a table. No table are: no entry at all, bytes of boot code, and
    the entry for the file system itself, from sector 0, that ``mkfs.fat --mbr`` writes.
    """
    jump, sector_size, reserved, fats, media = _FAT_BOOT_SECTOR.unpack_from(sector)
    # As the kernel's, with two more fields: a boot loader may have the jump, and zeros after it.
    fat = jump in (0xE9, 0xEB) and sector_size in _SECTOR_SIZES and reserved and fats
    fat = fat and (media >= 0xF8 or media == 0xF0)
    used = [(start, start + count) for _, _, start, count in slots if count]
    real = used and all(start and end <= sectors for start, end in used)
    return not real and bool(fat or sector[3:11] in (b"NTFS    ", b"EXFAT   "))


class _MbrReader:
    """One MBR and the extended boot records that it leads to."""

    def __init__(self, image: _Image, unit: int, mbr: bytes) -> None:
        self._image, self._unit = image, unit
        (self._signature,) = struct.unpack_from("<I", mbr, 440)

    def table(self, slots: Slots) -> PartitionTable:
        # An entry counts if it has sectors, whatever its type: kernel, sfdisk and libblkid all
        # show type 0 too. Isohybrid images use it for the partition with the ISO file system.
        used = [(number, *slot[1:]) for number, slot in enumerate(slots, 1) if slot[3]]
        partitions = [self._entry(*slot) for slot in used]
        number = 5
        for _, kind, first, sectors in used:
            for logical in self._logicals(first, sectors) if kind in _EXTENDED else ():
                partitions.append(self._entry(number, *logical))
                number += 1
        uuid, found = f"{self._signature:08x}" if self._signature else None, tuple(partitions)
        return PartitionTable(
            label="dos", sector_size=self._unit, uuid=uuid, source="mbr", partitions=found
        )

    def _entry(self, number: int, kind: int, start: int, count: int) -> PartitionEntry:
        offset, size, whole = start * self._unit, count * self._unit, self._image.size
        if number > MAX_NUMBER:
            raise _fault(offset, f"an MBR with more than {MAX_NUMBER} partitions")
        if offset + size > whole:
            reason = f"partition {number} ends at byte {offset + size}, the image at byte {whole}"
            raise _fault(offset, f"{reason} (with sectors of {self._unit} bytes)")
        return PartitionEntry(
            number=number,
            start=offset,
            size=size,
            type=f"0x{kind:02x}",
            name="",
            uuid=f"{self._signature:08x}-{number:02x}" if self._signature else None,
            node_size=min(size, max(1024, self._unit)) if kind in _EXTENDED else size,
        )

    def _logicals(self, first: int, sectors: int) -> Iterator[tuple[int, int, int]]:
        """Yield type, start and size of what is in the container at *first*, in sectors."""
        seen = {0}  # a link to the MBR itself is a loop as well
        link: tuple[int, int] | None = (0, sectors)
        while link is not None:
            lba, offset = first + link[0], (first + link[0]) * self._unit
            if lba in seen:
                raise _fault(offset, "a loop of extended partitions")
            if link[0] >= sectors:
                raise _fault(offset, "an extended boot record outside of its extended partition")
            if len(seen) > MAX_RECORDS:
                raise _fault(offset, f"more than {MAX_RECORDS} extended boot records in a chain")
            seen.add(lba)
            slots = _slots(self._image.bytes_at(offset, _MBR_SIZE, "an extended boot record"))
            if slots is None and link[0] == 0:
                # Some tools write nothing into a new container: sfdisk lists it without logical
                # partitions, the kernel and libblkid stop here too, whatever the bytes are.
                return
            if slots is None:
                raise _fault(offset, "an extended boot record without its signature 55AA")
            for index, (_, kind, start, count) in enumerate(slots):
                # OS/2 uses all four entries; with others the last two may hold garbage.
                fits = start + count <= min(link[1], sectors - link[0])
                if count and kind not in _EXTENDED and (fits or index < 2):
                    yield kind, lba + start, count
            # Links count from the container's start, partitions from their own record.
            links = (slot[2:] for slot in slots if slot[1] in _EXTENDED and slot[3])
            link = next(links, None)
