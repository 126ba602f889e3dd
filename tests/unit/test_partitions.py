# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Partition tables from bytes; the builders here are written from the specifications alone."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import uuid
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopdev import partitions
from loopdev.errors import ImageFormatError, InvalidValueError
from loopdev.partitions import HEAD_SIZE, MAX_ARRAY_SIZE, find_sector_size, read_table

LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
DISK = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
SECTORS = 4096


# Builders


def boot_record(*slots, signature=0, boot=(0, 0, 0, 0)):
    """Slots are (type, start, count) in sectors."""
    record = bytearray(512)
    struct.pack_into("<I", record, 440, signature)
    for index, (kind, start, count) in enumerate(slots):
        struct.pack_into(
            "<BBBBBBBBII", record, 446 + 16 * index, 0, 0, 0, 0, kind, 0, 0, 0, start, count
        )
    for index, indicator in enumerate(boot):
        record[446 + 16 * index] = indicator
    record[510:512] = b"\x55\xaa"
    return record


def protective_mbr():
    return boot_record((0xEE, 1, 0xFFFFFFFF))


def gpt_array(entries, count, length):
    """Entries are number -> (first, last, name)."""
    array = bytearray(count * length)
    for number, (first, last, name) in entries.items():
        entry = LINUX.bytes_le + uuid.UUID(int=number).bytes_le
        entry += struct.pack("<QQQ", first, last, 0)
        entry += name if isinstance(name, bytes) else name.encode("utf-16-le")
        array[(number - 1) * length : (number - 1) * length + len(entry)] = entry
    return bytes(array)


def gpt_header(array, unit, sectors, *, backup=False, entry_size=128, **changes):
    blocks = -(-len(array) // unit)
    fields = {
        "signature": b"EFI PART",
        "revision": 0x10000,
        "size": 92,
        "my_lba": sectors - 1 if backup else 1,
        "alternate": 1 if backup else sectors - 1,
        "first": 2 + blocks,
        "last": sectors - 2 - blocks,
        "guid": DISK.bytes_le,
        "array_lba": sectors - 1 - blocks if backup else 2,
        "count": len(array) // entry_size,
        "length": entry_size,
        "array_crc": zlib.crc32(array),
    }
    fields |= changes
    values = list(fields.values())
    header = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", *values[:3], 0, 0, *values[3:]))
    size = fields["size"]
    body = bytes(header).ljust(max(size, 92), b"\0")
    struct.pack_into("<I", header, 16, zlib.crc32(body[:size]))
    return bytes(header)


class Disk:
    """An image in memory that counts what is read from it."""

    def __init__(self, size=SECTORS * 512):
        self.data = bytearray(size)
        self.bytes_read = 0

    def put(self, offset, data):
        self.data[offset : offset + len(data)] = data
        return self

    def read(self, offset, length):
        assert offset >= 0
        assert length >= 0
        self.bytes_read += length
        return bytes(self.data[offset : offset + length])

    def table(self, sector_size=None, path=None):
        return read_table(self.read, len(self.data), sector_size, path)

    def fault(self, sector_size=None):
        with pytest.raises(ImageFormatError) as caught:
            self.table(sector_size, "disk.img")
        assert caught.value.path == "disk.img"
        assert caught.value.offset >= 0
        return caught.value


def gpt_disk(entries, unit=512, count=128, length=128, sectors=SECTORS, **changes):
    """Return a disk with both copies; changes go to the primary header only."""
    array = gpt_array(entries, count, length)
    blocks = -(-len(array) // unit)
    disk = Disk(sectors * unit).put(0, protective_mbr())
    disk.put(2 * unit, array)
    disk.put(unit, gpt_header(array, unit, sectors, entry_size=length, **changes))
    disk.put((sectors - 1 - blocks) * unit, array)
    disk.put((sectors - 1) * unit, gpt_header(array, unit, sectors, entry_size=length, backup=True))
    return disk


def only_primary(**changes):
    """Return a disk without a backup; the changed header's checksum is right."""
    disk = gpt_disk({1: (100, 199, "")})
    disk.put(512, gpt_header(disk.data[1024 : 1024 + 128 * 128], 512, SECTORS, **changes))
    return disk.put(len(disk.data) - 512, bytes(512))


def spans(table):
    return [(entry.number, entry.start, entry.size) for entry in table.partitions]


# GPT


@pytest.mark.parametrize("unit", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("given", [None, 512, 4096, 65536])
def test_gpt_is_found_at_every_sector_size(unit, given):
    disk = gpt_disk({1: (100, 199, "first"), 3: (200, 200, "")}, unit)
    table = disk.table(given)
    assert (table.label, table.sector_size, table.source) == ("gpt", unit, "primary")
    assert table.uuid == str(DISK)
    assert spans(table) == [(1, 100 * unit, 100 * unit), (3, 200 * unit, unit)]
    assert all(entry.node_size == entry.size for entry in table.partitions)


@pytest.mark.parametrize("unit", [8192, 16384, 32768, 65536])
def test_gpt_with_large_sectors_needs_the_size(unit):
    disk = gpt_disk({1: (10, 19, "")}, unit, sectors=64)
    assert disk.table(unit).sector_size == unit
    assert "no GPT header" in disk.fault().reason


def test_guid_is_mixed_endian():
    """The EFI system partition as UEFI's appendix A stores it, byte by byte."""
    esp = bytes.fromhex("28732ac11ff8d211ba4b00a0c93ec93b")
    disk = gpt_disk({1: (100, 199, "")})
    array = bytearray(disk.data[1024 : 1024 + 128 * 128])
    array[:16] = esp
    disk.put(1024, array).put(512, gpt_header(bytes(array), 512, SECTORS))
    (entry,) = disk.table().partitions
    assert entry.type == "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
    assert entry.uuid == "00000000-0000-0000-0000-000000000001"


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("héllo wörld", "héllo wörld"),
        ("𝄞 clef", "𝄞 clef"),
        ("cut\0here", "cut"),
        ("x" * 36, "x" * 36),
        ("\ufeffmark", "\ufeffmark"),
        (b"a\0\x00\xd8b\0", "a\ufffdb"),
        (b"a\0\x00\xdcb\0", "a\ufffdb"),
        (b"a\0" * 35 + b"\x00\xd8", "a" * 35 + "\ufffd"),
    ],
)
def test_gpt_names(raw, name):
    (entry,) = gpt_disk({1: (100, 199, raw)}).table().partitions
    assert entry.name == name


@pytest.mark.parametrize(
    ("count", "length"),
    [(4, 128), (128, 128), (128, 256), (256, 128), (1024, 128), (1024, 4096), (32768, 128)],
)
def test_gpt_entry_counts_and_sizes(count, length):
    entries = {1: (60000, 60009, "a"), min(count, 255): (60010, 60019, "b")}
    disk = gpt_disk(entries, count=count, length=length, sectors=70000)
    assert [entry.number for entry in disk.table().partitions] == sorted(entries)


def test_gpt_entries_above_255_are_left_out():
    disk = gpt_disk({255: (2000, 2001, ""), 256: (2002, 2003, "")}, count=1024)
    assert [entry.number for entry in disk.table().partitions] == [255]


def test_gpt_entries_need_no_order():
    disk = gpt_disk({1: (300, 399, ""), 2: (100, 199, ""), 3: (200, 299, "")})
    assert [start // 512 for _, start, _ in spans(disk.table())] == [300, 100, 200]


def test_gpt_without_partitions():
    assert gpt_disk({}).table().partitions == ()


def test_hybrid_mbr_is_a_gpt():
    disk = gpt_disk({1: (100, 199, "")})
    disk.put(0, boot_record((0x0C, 100, 100), (0xEE, 1, 99), signature=7))
    assert disk.table().label == "gpt"


def test_protective_entry_elsewhere_is_a_gpt_if_the_mbr_is_sane():
    disk = gpt_disk({1: (100, 199, "")})
    assert disk.put(0, boot_record((0xEE, 2, 99))).table().label == "gpt"
    assert disk.put(0, boot_record((0xEE, 2, 99), boot=(1, 0, 0, 0))).table() is None
    assert disk.put(0, boot_record((0xEE, 1, 99), boot=(1, 0, 0, 0))).table().label == "gpt"


def test_stale_gpt_behind_a_real_mbr_is_ignored():
    disk = gpt_disk({1: (100, 199, "")}).put(0, boot_record((0x83, 2048, 10)))
    table = disk.table()
    assert (table.label, spans(table)) == ("dos", [(1, 2048 * 512, 5120)])


def test_gpt_without_an_mbr_is_none():
    disk = gpt_disk({1: (100, 199, "")}).put(0, bytes(512))
    assert disk.table() is None
    assert find_sector_size(disk.data[:HEAD_SIZE]) == 512


# The backup


@pytest.mark.parametrize("unit", [512, 4096])
@pytest.mark.parametrize("given", [None, 512, 4096])
def test_backup_header(unit, given):
    disk = gpt_disk({2: (100, 199, "x")}, unit).put(unit, bytes(unit))
    table = disk.table(given)
    assert (table.source, table.sector_size, table.uuid) == ("backup", unit, str(DISK))
    assert spans(table) == [(2, 100 * unit, 100 * unit)]


def test_backup_when_the_primary_entries_are_damaged():
    disk = gpt_disk({1: (100, 199, "")})
    disk.data[1024] ^= 1
    assert disk.table().source == "backup"


def test_backup_of_an_image_that_was_enlarged():
    disk = gpt_disk({1: (100, 199, "")})
    disk.data += bytes(1 << 20)
    assert disk.table().source == "primary"
    disk.data[512 + 20] ^= 1
    assert disk.table().source == "backup"
    disk.put(512, bytes(512))
    assert "no GPT header" in disk.fault().reason


@pytest.mark.parametrize("alternate", [0, 1, SECTORS, 1 << 63])
def test_a_damaged_primary_cannot_send_us_outside(alternate):
    disk = gpt_disk({}, alternate=alternate, first=9, last=8)
    disk.put(len(disk.data) - 512, bytes(512))
    assert disk.fault().reason == (
        "the GPT's usable sectors start at 9 but end at 8; the backup is bad too"
    )


def test_backup_in_the_last_whole_sector():
    disk = gpt_disk({1: (100, 199, "")}, 4096).put(4096, bytes(4096))
    disk.data += bytes(512)
    assert disk.table().source == "backup"


# Damaged GPTs


@pytest.mark.parametrize(
    ("changes", "reason", "offset"),
    [
        ({"signature": b"EFI PARX"}, "no GPT header", 512),
        ({"size": 91}, "a GPT header of 91 bytes", 512),
        ({"size": 513}, "a GPT header of 513 bytes", 512),
        ({"size": 1 << 24}, "a GPT header of 16777216 bytes", 512),
        ({"my_lba": 2}, "header in sector 1 is that of sector 2", 512),
        ({"first": 200, "last": 199}, "usable sectors start at 200 but end at 199", 512),
        ({"length": 0}, "GPT entries of 0 bytes", 512),
        ({"length": 64}, "GPT entries of 64 bytes", 512),
        ({"length": 192}, "GPT entries of 192 bytes", 512),
        ({"length": 8192}, "GPT entries of 8192 bytes", 512),
        ({"count": 0}, "a GPT of 0 entries", 512),
        ({"count": (1 << 30) + 1}, "a GPT of 1073741825 entries", 512),
        ({"count": 0xFFFFFFFF}, "a GPT of 4294967295 entries", 512),
        ({"count": MAX_ARRAY_SIZE // 128 + 1}, "a GPT of 32769 entries", 512),
        ({"array_lba": SECTORS - 1}, "the array of GPT entries ends at byte", (SECTORS - 1) * 512),
        (
            {"array_lba": (1 << 64) - 1},
            "the array of GPT entries ends at byte",
            ((1 << 64) - 1) * 512,
        ),
        ({"array_crc": 1}, "the checksum of the GPT entries is wrong", 1024),
    ],
)
def test_both_headers_bad(changes, reason, offset):
    disk = only_primary(**changes)
    fault = disk.fault()
    assert reason in fault.reason
    assert fault.reason.endswith("; the backup is bad too")
    assert fault.offset == offset
    assert disk.bytes_read < 200_000


def test_header_larger_than_92_bytes():
    assert only_primary(size=512).table().source == "primary"


def test_header_checksum():
    disk = only_primary()
    disk.data[512 + 56] ^= 1
    assert disk.fault().reason.startswith("the GPT header's checksum is wrong")


def test_truncated_image_says_both_sizes():
    disk = gpt_disk({1: (100, 199, "")})
    del disk.data[1 << 20 :]
    fault = disk.fault()
    assert fault.offset == 512
    assert fault.reason == (
        f"truncated: the GPT describes a disk of {SECTORS * 512} bytes, the image has {1 << 20}; "
        "the backup is bad too"
    )


def test_only_the_backup_is_cut_off():
    disk = gpt_disk({1: (100, 199, "")})
    del disk.data[-512:]
    assert disk.table().source == "primary"


def test_protective_mbr_alone():
    fault = Disk().put(0, protective_mbr()).fault()
    assert fault.reason == "a protective MBR, but no GPT header; the backup is bad too"
    assert fault.offset == 512
    assert Disk().put(0, protective_mbr()).fault(4096).offset == 4096
    assert "no GPT header" in Disk(512).put(0, protective_mbr()).fault().reason


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({3: (199, 100, "")}, "partition 3: sectors 199 to 100"),
        (
            {4: (100, SECTORS, "")},
            f"partition 4: sectors 100 to {SECTORS}, the image has {SECTORS}",
        ),
        ({4: (100, (1 << 64) - 1, "")}, "partition 4: sectors 100 to 18446744073709551615"),
        ({5: (0, 0, "")}, "partition 5 and the protective MBR overlap"),
        ({5: (1, 1, "")}, "partition 5 and the GPT header overlap"),
        ({5: (33, 40, "")}, "the array of GPT entries and partition 5 overlap"),
        ({2: (100, 199, ""), 7: (199, 300, "")}, "partition 2 and partition 7 overlap"),
        ({2: (150, 160, ""), 7: (100, 300, "")}, "partition 7 and partition 2 overlap"),
        ({2: (100, 199, ""), 7: (100, 199, "")}, "partition 2 and partition 7 overlap"),
    ],
)
def test_bad_gpt_entries(entries, reason):
    """Their checksum is right, so both copies say the same and there is no use in the other."""
    assert reason in gpt_disk(entries).fault().reason


def test_partition_beside_the_usable_sectors():
    disk = gpt_disk({1: (40, 49, "")}, first=2048)
    assert spans(disk.table()) == [(1, 40 * 512, 5120)]


def test_array_over_the_mbr():
    disk = Disk().put(0, protective_mbr())
    disk.put(512, gpt_header(bytes(disk.data[:512]), 512, SECTORS, array_lba=0))
    assert disk.fault().reason == "the array of GPT entries and the protective MBR overlap"


# MBR


def test_mbr_primaries():
    disk = Disk().put(0, boot_record((0x83, 8, 100), (0, 0, 0), (0x0C, 200, 50), signature=0xABC))
    table = disk.table()
    assert (table.label, table.sector_size, table.source) == ("dos", 512, "mbr")
    assert table.uuid == "00000abc"
    one, three = table.partitions
    assert one.as_dict() == {
        "number": 1,
        "start": 8 * 512,
        "size": 100 * 512,
        "type": "0x83",
        "name": "",
        "uuid": "00000abc-01",
        "node_size": 100 * 512,
    }
    assert (three.number, three.type, three.uuid) == (3, "0x0c", "00000abc-03")


def test_mbr_without_a_disk_signature():
    table = Disk().put(0, boot_record((0x83, 8, 100))).table()
    assert table.uuid is None
    assert table.partitions[0].uuid is None


def test_mbr_counts_in_the_given_sectors():
    disk = Disk().put(0, boot_record((0x83, 8, 100)))
    table = disk.table(4096)
    assert (table.sector_size, spans(table)) == (4096, [(1, 8 * 4096, 100 * 4096)])


def test_isohybrid_type_0_and_overlap():
    disk = Disk().put(0, boot_record((0, 0, SECTORS), (0xEF, 100, 50), signature=1))
    assert spans(disk.table()) == [(1, 0, SECTORS * 512), (2, 51200, 25600)]
    assert disk.table().partitions[0].type == "0x00"


def test_empty_mbr():
    table = Disk().put(0, boot_record(signature=5)).table()
    assert (table.label, table.uuid, table.partitions) == ("dos", "00000005", ())


def test_mbr_entry_past_the_end():
    fault = Disk().put(0, boot_record((0x83, 8, 10), (0x83, 100, SECTORS))).fault()
    end = (100 + SECTORS) * 512
    assert f"partition 2 ends at byte {end}, the image at byte {SECTORS * 512}" in fault.reason
    assert fault.offset == 100 * 512


@pytest.mark.parametrize("slot", range(4))
def test_bad_boot_indicator_is_none(slot):
    boot = [0x80 if index == 0 else 0 for index in range(4)]
    assert Disk().put(0, boot_record((0x83, 8, 10), boot=boot)).table() is not None
    boot[slot] = 0x7F
    assert Disk().put(0, boot_record((0x83, 8, 10), boot=boot)).table() is None


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1 << 20])
def test_no_table_in_zeros(size):
    assert Disk(size).table() is None


def test_image_that_is_shorter_than_its_size():
    assert read_table(lambda _offset, _length: b"", 1 << 20) is None
    mbr = bytes(protective_mbr())
    with pytest.raises(ImageFormatError):
        read_table(lambda offset, length: mbr[offset : offset + length], 1 << 20)


def fat(*slots):
    record = boot_record(*slots, signature=0x20202020)
    record[:3] = b"\xeb\x58\x90"
    struct.pack_into("<HBHBHHB", record, 11, 512, 8, 32, 2, 0, 0, 0xF8)
    return record


def test_filesystems_are_none():
    assert Disk().put(0, fat()).table() is None
    # What mkfs.fat --mbr writes: the file system as its own partition.
    assert Disk().put(0, fat((0x0C, 0, SECTORS))).table() is None
    assert Disk().put(0, fat((0x20, 0x20202020, 0x20202020))).table() is None
    for name in (b"NTFS    ", b"EXFAT   "):
        assert Disk().put(0, boot_record()).put(3, name).table() is None
    assert Disk().put(1024 + 56, b"\x53\xef").table() is None


def test_real_table_with_left_over_fat_fields():
    assert spans(Disk().put(0, fat((0x0C, 8, 10))).table()) == [(1, 4096, 5120)]


def test_jump_of_a_boot_loader_is_no_fat():
    assert Disk().put(0, boot_record()).put(0, b"\xeb\x63\x90").table() is not None


@pytest.mark.parametrize("size", [0, 1, -512, 100, 513, 1536, 131072])
def test_sector_size_is_checked(size):
    with pytest.raises(InvalidValueError):
        Disk().table(size)


# Logical partitions


@pytest.mark.parametrize("unit", [512, 4096])
@pytest.mark.parametrize("kind", [0x05, 0x0F, 0x85])
def test_logical_partitions(unit, kind):
    disk = Disk(SECTORS * unit)
    disk.put(0, boot_record((0x83, 8, 8), (kind, 1000, 2000), (0x83, 3000, 9), signature=0x1234))
    disk.put(1000 * unit, boot_record((0x83, 8, 100), (kind, 500, 200)))
    disk.put(1500 * unit, boot_record((0x82, 16, 100)))
    table = disk.table(unit)
    assert spans(table) == [
        (1, 8 * unit, 8 * unit),
        (2, 1000 * unit, 2000 * unit),
        (3, 3000 * unit, 9 * unit),
        (5, 1008 * unit, 100 * unit),
        (6, 1516 * unit, 100 * unit),
    ]
    container, logical = table.partitions[1], table.partitions[4]
    assert container.node_size == max(1024, unit)
    assert (logical.type, logical.uuid, logical.node_size) == ("0x82", "00001234-06", 100 * unit)


def test_container_of_one_sector():
    disk = Disk().put(0, boot_record((5, 1000, 1)))
    assert disk.table().partitions[0].node_size == 512


@pytest.mark.parametrize("content", [b"", b"x" * 512])
def test_container_without_a_first_record_is_empty(content):
    disk = Disk().put(0, boot_record((5, 1000, 100))).put(512000, content)
    assert spans(disk.table()) == [(1, 512000, 51200)]


def test_two_containers_number_on():
    disk = Disk().put(0, boot_record((5, 1000, 100), (0x0F, 2000, 100)))
    disk.put(512000, boot_record((0x83, 1, 9))).put(1024000, boot_record((0x83, 1, 9)))
    assert [number for number, _, _ in spans(disk.table())] == [1, 2, 5, 6]


def test_link_before_data_and_all_four_slots():
    """DR-DOS puts the link first, OS/2 uses every slot; garbage in the last two is skipped."""
    disk = Disk().put(0, boot_record((5, 1000, 1000)))
    disk.put(512000, boot_record((5, 500, 100), (0x83, 1, 9)))
    disk.put(768000, boot_record((0x83, 1, 9), (0x83, 10, 9), (0x83, 19, 9), (0x83, 95, 9)))
    starts = [start // 512 for _, start, _ in spans(disk.table())]
    assert starts == [1000, 1001, 1501, 1510, 1519]


@pytest.mark.parametrize("back", [0, 500])
def test_loop_of_records(back):
    disk = Disk().put(0, boot_record((5, 1000, 1000)))
    disk.put(512000, boot_record((0x83, 1, 9), (5, 500, 100)))
    disk.put(768000, boot_record((0x83, 1, 9), (5, back, 100)))
    fault = disk.fault()
    assert (fault.reason, fault.offset) == ("a loop of extended partitions", (1000 + back) * 512)


def test_container_over_the_mbr_is_a_loop():
    assert "loop" in Disk().put(0, boot_record((5, 0, 1000))).fault().reason


@pytest.mark.parametrize("start", [1000, 2000, 0xFFFFFFFF])
def test_link_out_of_the_container(start):
    disk = Disk().put(0, boot_record((5, 1000, 1000)))
    disk.put(512000, boot_record((0x83, 1, 9), (5, start, 100)))
    assert "outside of its extended partition" in disk.fault().reason


def test_record_without_a_signature():
    disk = Disk().put(0, boot_record((5, 1000, 1000)))
    disk.put(512000, boot_record((0x83, 1, 9), (5, 500, 100)))
    fault = disk.fault()
    assert "without its signature 55AA" in fault.reason
    assert fault.offset == 1500 * 512


def test_logical_past_the_end():
    disk = Disk().put(0, boot_record((5, 1000, 1000)))
    disk.put(512000, boot_record((0x83, 1, SECTORS)))
    assert "partition 5 ends at byte" in disk.fault().reason


def chain(length, *, empty):
    disk = Disk().put(0, boot_record((5, 1, SECTORS - 1)))
    for index in range(length):
        link = (5, 2 * (index + 1), 2) if index + 1 < length else (0, 0, 0)
        data = (0, 0, 0) if empty else (0x83, 1, 1)
        disk.put((1 + 2 * index) * 512, boot_record(data, link))
    return disk


def test_number_255_is_the_last():
    assert chain(251, empty=False).table().partitions[-1].number == 255
    assert "more than 255 partitions" in chain(252, empty=False).fault().reason


def test_chain_of_empty_records():
    assert spans(chain(1024, empty=True).table()) == [(1, 512, (SECTORS - 1) * 512)]
    assert "more than 1024" in chain(1025, empty=True).fault().reason


# find_sector_size


@pytest.mark.parametrize("unit", [512, 1024, 2048, 4096, 8192, 65536])
def test_find_sector_size(unit):
    disk = gpt_disk({}, unit, sectors=64)
    assert find_sector_size(bytes(disk.data[: max(HEAD_SIZE, 2 * unit)])) == unit
    assert find_sector_size(bytes(disk.data[:unit])) is None
    disk.data[unit + 50] ^= 1
    assert find_sector_size(bytes(disk.data)) is None


def test_find_sector_size_wants_the_primary():
    disk = gpt_disk({}, my_lba=2)
    assert find_sector_size(bytes(disk.data)) is None
    assert find_sector_size(b"") is None


# Properties


# A busy machine must not fail them; how much they may read is checked in bytes.
quiet = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)

# Each array is bounded, and so is the number of headers that are tried.
READ_LIMIT = 16 * (MAX_ARRAY_SIZE + 65536)


def check_bounded(disk, sector_size=None):
    with contextlib.suppress(ImageFormatError):
        disk.table(sector_size)
    assert disk.bytes_read <= READ_LIMIT
    find_sector_size(bytes(disk.data))


@quiet
@given(st.binary(max_size=4096), st.sampled_from([None, 512, 4096]))
def test_arbitrary_bytes(data, sector_size):
    disk = Disk(8192).put(0, data)
    check_bounded(disk, sector_size)
    disk.put(510, b"\x55\xaa")
    for slot in range(4):
        disk.data[446 + 16 * slot] &= 0x80
    check_bounded(disk, sector_size)
    check_bounded(disk.put(446, protective_mbr()[446:]), sector_size)


slot_strategy = st.tuples(
    st.sampled_from([0, 5, 0x0F, 0x83, 0x85]), st.integers(0, 70), st.integers(0, 70)
)


@quiet
@given(st.lists(st.lists(slot_strategy, min_size=4, max_size=4), min_size=64, max_size=64))
def test_arbitrary_boot_records(records):
    """A disk of boot records only: every link leads to another one."""
    disk = Disk(64 * 512)
    for index, slots in enumerate(records):
        disk.put(index * 512, boot_record(*slots))
    check_bounded(disk)


@quiet
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "size": st.integers(92, 600),
            "my_lba": st.integers(0, 3),
            "alternate": st.integers(0, (1 << 64) - 1),
            "first": st.integers(0, 1 << 13),
            "last": st.integers(0, 1 << 13),
            "array_lba": st.integers(0, 1 << 13) | st.integers(0, (1 << 64) - 1),
            "count": st.integers(0, (1 << 32) - 1) | st.integers(0, 256),
            "length": st.sampled_from([0, 1, 64, 128, 192, 256, 4096, 8192, 1 << 31]),
        },
    ),
    st.binary(min_size=512, max_size=1024),
)
def test_arbitrary_headers(changes, entries):
    """The checksums are right, the rest is not."""
    array = entries.ljust(4096, b"\0")
    disk = Disk().put(0, protective_mbr()).put(1024, array)
    disk.put(512, gpt_header(array, 512, SECTORS, **changes))
    check_bounded(disk)


@st.composite
def layouts(draw):
    """Draw number -> (first, last, name), without overlaps, behind sector 600."""
    numbers = draw(st.lists(st.integers(1, 255), unique=True, max_size=20))
    layout, lba = {}, 600
    for number in numbers:
        first = lba + draw(st.integers(0, 20))
        last = first + draw(st.integers(0, 50))
        name = draw(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
        raw = name.encode("utf-16-le")[:72]
        layout[number] = (first, last, raw.decode("utf-16-le", "ignore"))
        lba = last + 1
    return layout


@quiet
@given(layouts(), st.sampled_from([512, 1024, 4096]), st.sampled_from([256, 1024]))
def test_gpt_round_trip(layout, unit, count):
    disk = gpt_disk(layout, unit, count)
    primary = disk.table()
    found = {
        entry.number: (entry.start // unit, (entry.start + entry.size) // unit - 1, entry.name)
        for entry in primary.partitions
    }
    assert found == layout
    backup = disk.put(unit, bytes(unit)).table()
    assert backup.partitions == primary.partitions
    assert (primary.source, backup.source) == ("primary", "backup")


@quiet
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=60))
def test_logical_round_trip(steps):
    """Steps are (gap, size) of logical partitions, each behind its own record."""
    disk = Disk().put(0, boot_record((5, 10, SECTORS - 10), signature=9))
    expected, record = [], 10
    for index, (gap, size) in enumerate(steps):
        behind = record + gap + size
        link = (5, behind - 10, 1) if index + 1 < len(steps) else (0, 0, 0)
        disk.put(record * 512, boot_record((0x83, gap, size), link))
        expected.append((5 + index, (record + gap) * 512, size * 512))
        record = behind
    assert spans(disk.table())[1:] == expected


# What the module costs and promises


def test_no_io_and_no_costly_imports():
    """Importing it loads nothing that loopdev's errors do not load already."""
    program = (
        "import sys, loopdev.errors, loopdev._value; before = set(sys.modules)\n"
        "import loopdev.partitions; print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert set(run.stdout.split()) <= {"_struct", "struct", "binascii", "loopdev.partitions"}
    assert not hasattr(partitions, "os")


def test_values_are_frozen():
    table = gpt_disk({1: (100, 199, "")}).table()
    with pytest.raises(AttributeError):
        table.label = "dos"
    assert table == gpt_disk({1: (100, 199, "")}).table()
    assert hash(table) == hash(gpt_disk({1: (100, 199, "")}).table())
