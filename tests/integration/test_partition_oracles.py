# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Partition tables of real tools, compared with what those tools say of them.

Plain files, so neither root nor a loop device is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from loopdev.errors import ImageFormatError
from loopdev.partitions import HEAD_SIZE, find_sector_size, read_table

MIB = 1 << 20
LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
TOOLS = ("fdisk", "sfdisk", "sgdisk", "parted", "blkid", "partx")

# Some distributions keep these tools out of an ordinary user's PATH.
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool, path=PATH) is None for tool in TOOLS),
    reason=f"needs {', '.join(TOOLS)}",
)


def run(*command, stdin=None):
    environment = os.environ | {"PATH": PATH, "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        [os.fspath(part) for part in command],
        check=True,
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=environment,
    ).stdout


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


def read(path, sector_size=None):
    with path.open("rb") as file:
        return read_table(
            lambda offset, length: os.pread(file.fileno(), length, offset),
            path.stat().st_size,
            sector_size,
            os.fspath(path),
        )


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def write_table(path, script, unit=512):
    """Let libfdisk write a table from an sfdisk script."""
    if unit == 512:
        run("sfdisk", "--quiet", path, stdin=script)
        return
    # sfdisk has --sector-size only since util-linux 2.41, fdisk has always had it.
    file = path.with_suffix(".script")
    file.write_text(script, encoding="utf-8")
    run("fdisk", "--sector-size", str(unit), path, stdin=f"I\n{file}\nw\n")


def unescaped(text):
    """Undo what util-linux makes of bytes that are not printable ASCII: \\xHH."""
    raw = re.sub(rb"\\x(..)", lambda hit: bytes.fromhex(hit[1].decode()), text.encode())
    return raw.decode()


def sfdisk_json(path, unit):
    """Return what ``sfdisk --json`` prints, or for other sectors what fdisk dumps, as JSON."""
    if unit == 512:
        return json.loads(run("sfdisk", "--json", path))["partitiontable"]
    file = path.with_suffix(".dump")
    file.unlink(missing_ok=True)
    run("fdisk", "--sector-size", str(unit), path, stdin=f"O\n{file}\nq\n")
    head, _, body = file.read_text(encoding="utf-8").partition("\n\n")
    table = dict(line.split(": ") for line in head.splitlines())
    table = {
        "label": table["label"],
        "id": table["label-id"],
        "sectorsize": int(table["sector-size"]),
    }
    table["partitions"] = []
    for line in body.splitlines():
        node, _, rest = line.partition(" : ")
        entry = dict(re.findall(r'([a-z]+)= *"?([^",]*)', rest))
        entry["name"] = unescaped(entry.get("name", ""))
        entry |= {"node": node, "start": int(entry["start"]), "size": int(entry["size"])}
        table["partitions"].append(entry)
    return table


def sfdisk_partitions(path, unit):
    """Return sfdisk's table and its partitions as (number, start, size, type, uuid, name)."""
    table = sfdisk_json(path, unit)
    assert table["sectorsize"] == unit
    found = []
    for entry in table.get("partitions", ()):
        kind = entry["type"].lower()
        found.append(
            (
                int(entry["node"].removeprefix(os.fspath(path))),
                entry["start"] * unit,
                entry["size"] * unit,
                kind if table["label"] == "gpt" else f"0x{int(kind, 16):02x}",
                entry["uuid"].lower() if "uuid" in entry else None,
                entry.get("name", ""),
            )
        )
    return table, found


def check_sfdisk(path, unit=512):
    table, expected = sfdisk_partitions(path, unit)
    ours = read(path, unit)
    assert ours.label == table["label"]
    assert ours.sector_size == unit
    assert int(ours.uuid.replace("-", ""), 16) == int(table["id"].replace("-", ""), 16)
    found = [
        (e.number, e.start, e.size, e.type, e.uuid if ours.label == "gpt" else None, e.name)
        for e in ours.partitions
    ]
    assert found == expected
    return ours


def check_partx(path, unit=512):
    """libblkid's answer; with it the uuids of an MBR's partitions, which sfdisk does not print."""
    columns = ("NR", "START", "SECTORS", "TYPE", "UUID", "NAME")
    options = ("--sector-size", str(unit)) if unit != 512 else ()
    out = run("partx", *options, "--raw", "--noheadings", "-o", ",".join(columns), path)
    expected = []
    for line in out.splitlines():
        number, start, sectors, kind, uuid, *name = line.split(" ", 5)
        shown = unescaped("".join(name))
        expected.append((int(number), int(start), int(sectors), kind, uuid, shown))
    found = []
    for e in read(path, unit).partitions:
        kind = e.type if "-" in e.type else hex(int(e.type, 16))
        found.append((e.number, e.start // 512, e.size // 512, kind, e.uuid or "", e.name))
    assert found == expected


def check_sgdisk(path):
    """Compare with sgdisk -p for the starts and ends, with -i for all else."""
    ours = read(path)
    printed = re.findall(r"^ +(\d+) +(\d+) +(\d+) ", run("sgdisk", "-p", path), re.MULTILINE)
    assert [tuple(map(int, row)) for row in printed] == [
        (e.number, e.start // 512, (e.start + e.size) // 512 - 1) for e in ours.partitions
    ]
    for entry in ours.partitions:
        info = run("sgdisk", "-i", str(entry.number), path)
        assert f"Partition GUID code: {entry.type.upper()} " in info
        assert f"Partition unique GUID: {entry.uuid.upper()}\n" in info
        assert f"Partition name: '{entry.name}'\n" in info
    assert f"Disk identifier (GUID): {ours.uuid.upper()}\n" in run("sgdisk", "-p", path)


def check_parted(path):
    """Compare with parted -m, in bytes."""
    _, disk, *rows = run("parted", "-ms", path, "unit", "B", "print").splitlines()
    ours = read(path)
    label = {"gpt": "gpt", "msdos": "dos"}[disk.split(":")[5]]
    assert ours.label == label
    expected = {}
    for row in rows:
        number, start, _end, size, _filesystem, name, _flags = row.rstrip(";").split(":")
        expected[int(number)] = (int(start[:-1]), int(size[:-1]), name if label == "gpt" else "")
    assert {e.number: (e.start, e.size, e.name) for e in ours.partitions} == expected


def check_blkid(path, table):
    out = run("blkid", "-p", "-o", "export", path)
    values = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    assert values["PTTYPE"] == table.label
    assert values["PTUUID"] == table.uuid


def make_gpt(path, unit=512):
    script = (
        "label: gpt\nlabel-id: 8D8F1E6D-5E56-4A0C-9C1B-2A8C3F1B7E11\n"
        'size=8M, type=U, name="EFI system"\n'
        f"size=16M, type={LINUX}, "
        'uuid=01234567-89AB-CDEF-0123-456789ABCDEF, name="grüße 日本"\n'
        "size=4M, type=S\n"
    )
    write_table(path, script, unit)


@pytest.mark.parametrize("unit", [512, 4096])
def test_gpt_of_sfdisk(image, unit):
    make_gpt(image, unit)
    table = check_sfdisk(image, unit)
    check_partx(image, unit)
    assert table.source == "primary"
    assert table.partitions[1].uuid == "01234567-89ab-cdef-0123-456789abcdef"
    assert table.partitions[1].name == "grüße 日本"
    with image.open("rb") as file:
        assert find_sector_size(file.read(HEAD_SIZE)) == unit
    assert read(image) == table
    assert read(image, 512 + 4096 - unit) == table


def test_gpt_512_as_the_others_see_it(image):
    make_gpt(image)
    check_sgdisk(image)
    check_parted(image)
    check_blkid(image, read(image))


@pytest.mark.parametrize("unit", [512, 4096])
def test_backup_after_the_primary_was_zeroed(image, unit):
    make_gpt(image, unit)
    primary = read(image, unit)
    overwrite(image, unit, bytes(2 * unit))
    table = check_sfdisk(image, unit)
    check_partx(image, unit)
    assert (table.source, table.partitions) == ("backup", primary.partitions)
    assert read(image) == table


def test_gpt_with_1024_entries_of_sgdisk(image):
    """The kernel has no numbers above 255; sgdisk has."""
    options = [f"--new={number}:{4096 + 2 * number}:+1" for number in (1, 128, 129, 255, 256, 1000)]
    run("sgdisk", "-S", "1024", "-a", "1", *options, "-c", "255:déjà vu", image)
    table, expected = sfdisk_partitions(image, 512)
    assert table["label"] == "gpt"
    found = read(image).partitions
    assert [entry.number for entry in found] == [1, 128, 129, 255]
    assert [(e.number, e.start, e.size, e.type, e.uuid, e.name) for e in found] == [
        entry for entry in expected if entry[0] <= 255
    ]
    assert found[-1].name == "déjà vu"


def test_gpt_of_sgdisk_with_256_entries(image):
    run("sgdisk", "-S", "256", "-n", "200:0:+1M", "-c", "200:ñ", "-t", "200:fd00", image)
    check_sgdisk(image)
    check_sfdisk(image)
    check_partx(image)


def test_gpt_of_parted(image):
    run(
        *("parted", "-s", image, "mklabel", "gpt"),
        *("mkpart", "über", "ext4", "1MiB", "9MiB"),
        *("mkpart", "two", "fat32", "9MiB", "20MiB"),
    )
    check_parted(image)
    check_sfdisk(image)
    check_sgdisk(image)
    check_partx(image)


@pytest.mark.parametrize("unit", [512, 4096])
def test_mbr_with_logical_partitions_of_sfdisk(image, unit):
    script = (
        "label: dos\nlabel-id: 0xdeadbeef\n"
        "size=4M, type=c\nsize=40M, type=f\nsize=4M, type=82\nsize=1M, type=ef\n"
        "size=2M\nsize=4M, type=8e\nsize=8M\n"
    )
    write_table(image, script, unit)
    table = check_sfdisk(image, unit)
    assert [entry.number for entry in table.partitions] == [1, 2, 3, 4, 5, 6, 7]
    assert table.partitions[1].node_size == max(1024, unit)
    check_partx(image, unit)
    if unit == 512:
        check_parted(image)
        check_blkid(image, table)


def test_mbr_of_parted_with_an_empty_container(image):
    mkpart = ("parted", "-s", image, "mklabel", "msdos", "mkpart", "extended", "1MiB", "30MiB")
    run(*mkpart)
    assert [entry.number for entry in check_sfdisk(image).partitions] == [1]
    run("parted", "-s", image, "mkpart", "logical", "2MiB", "9MiB")
    run("parted", "-s", image, "mkpart", "logical", "10MiB", "19MiB")
    check_sfdisk(image)
    check_parted(image)
    check_partx(image)


def test_empty_container_without_a_boot_record(image):
    write_table(image, "label: dos\nsize=40M, type=5\n")
    overwrite(image, 2048 * 512, bytes(512))
    assert [entry.number for entry in check_sfdisk(image).partitions] == [1]
    check_partx(image)


def test_type_0_with_sectors_counts(image):
    """As in isohybrid images: from sector 0, type 0, with another partition inside."""
    write_table(image, "label: dos\nsize=40M\nsize=4M, type=ef\n")
    slot = bytes.fromhex("80000000 00000000 00000000 00000200")
    overwrite(image, 446, slot)
    table = check_sfdisk(image)
    assert [(e.start, e.type) for e in table.partitions] == [(0, "0x00"), (41 * MIB, "0xef")]
    check_partx(image)


def test_empty_tables(image):
    for label in ("dos", "gpt"):
        write_table(image, f"label: {label}\n")
        assert check_sfdisk(image).partitions == ()


def test_gpt_behind_a_wiped_mbr_is_no_table(image):
    make_gpt(image)
    overwrite(image, 0, bytes(512))
    for tool in (("sfdisk", "--json"), ("partx",), ("blkid", "-p"), ("parted", "-ms")):
        with pytest.raises(subprocess.CalledProcessError):
            run(*tool, image, *(["print"] if tool[0] == "parted" else []))
    assert read(image) is None


def test_stale_gpt_behind_a_real_mbr(image):
    make_gpt(image)
    overwrite(image, 446, bytes.fromhex("00000000 83000000 00080000 00100000") + bytes(48))
    overwrite(image, 440, b"\1\2\3\4")
    assert check_sfdisk(image).label == "dos"
    check_partx(image)


def test_truncated_image(image):
    make_gpt(image)
    os.truncate(image, 40 * MIB)
    with pytest.raises(ImageFormatError, match=f"{64 * MIB} bytes, the image has {40 * MIB}"):
        read(image)


def test_enlarged_image(image):
    make_gpt(image)
    os.truncate(image, 80 * MIB)
    check_sfdisk(image)
    check_partx(image)
    overwrite(image, 512 + 60, b"\xff")
    assert read(image).source == "backup"
