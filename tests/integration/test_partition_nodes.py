# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Partition nodes: there when attach() returns, right, and gone after detach()."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import counting_bytes
from oracle import make_gpt, partitions, run, sysfs

import loopdev
from loopdev.kernel import blkpg
from loopdev.loop import Loop

MIB = 1 << 20
GPT = 'label: gpt\nsize=2MiB, name="first"\nsize=3MiB, name="zweite Öffnung"\nsize=1MiB\n'
MBR = """label: dos
disk1: size=2MiB, type=83
disk2: size=8MiB, type=5
disk5: size=2MiB, type=83
disk6: size=3MiB, type=82
"""


def table_of(path: str) -> dict[str, dict[str, object]]:
    """Return the partitions as sfdisk reads them from the device itself."""
    found = json.loads(run("sfdisk", "--json", path))["partitiontable"]["partitions"]
    return {part["node"]: part for part in found}


def check(device: loopdev.LoopDevice) -> None:
    """Compare nodes and properties with sysfs and sfdisk."""
    table = table_of(device.path)
    unit = device.sector_size
    kernel = partitions(device.number)
    assert [part.path for part in device.partitions] == list(table)
    assert [part.number for part in device.partitions] == sorted(kernel)
    for part in device.partitions:
        seen = table[part.path]
        assert (part.start, part.size) == (seen["start"] * unit, seen["size"] * unit)
        assert kernel[part.number][0] == part.start
        mbr = len(seen["type"]) < 3
        assert part.type == (f"0x{int(seen['type'], 16):02x}" if mbr else seen["type"].lower())
        status = os.stat(part.path)
        assert stat.S_ISBLK(status.st_mode)
        dev = sysfs(device.number, f"loop{device.number}p{part.number}/dev")
        assert f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" == dev


def test_gpt(image, sector_size):
    make_gpt(image, GPT, sector_size)
    with loopdev.attach(image, partscan=True) as device:
        assert device.sector_size == sector_size, "found from the table"
        check(device)
        assert [part.name for part in device.partitions] == ["first", "zweite Öffnung", None]
        nodes = [part.path for part in device.partitions]
        uuids = [
            run("blkid", "-p", "-s", "PART_ENTRY_UUID", "-o", "value", n).strip() for n in nodes
        ]
        assert [part.uuid for part in device.partitions] == uuids
    assert not any(map(os.path.exists, nodes))
    assert partitions(device.number) == {}


def test_mbr_with_logical_partitions(image):
    run("sfdisk", "-q", image, input=MBR)
    with loopdev.attach(image, partscan=True) as device:
        check(device)
        assert [part.number for part in device.partitions] == [1, 2, 5, 6]
        # The container is there, as small as the kernel's own scan makes it.
        assert partitions(device.number)[2][1] == 1024


def test_partition_shows_its_bytes(tmp_path, sector_size):
    path = tmp_path / "disk.img"
    path.write_bytes(counting_bytes(0, 16 * MIB))
    make_gpt(path, GPT, sector_size)
    with loopdev.attach(path, partscan=True, read_only=True) as device:
        for part in device.partitions:
            assert Path(part.path).read_bytes() == counting_bytes(part.start, part.size)
            assert os.stat(part.path).st_rdev
            assert sysfs(device.number, f"loop{device.number}p{part.number}/ro") == "1"


def test_damaged_primary_header(image, sector_size):
    make_gpt(image, GPT, sector_size)
    with open(image, "r+b") as file:
        file.seek(sector_size + 16)
        file.write(b"\xff" * 4)
    with loopdev.attach(image, sector_size=sector_size, partscan=True) as device:
        assert [part.size for part in device.partitions] == [2 * MIB, 3 * MIB, MIB]


@pytest.mark.parametrize("partscan", [True, False])
def test_no_table_is_no_error(image, partscan):
    with loopdev.attach(image, partscan=partscan) as device:
        assert device.partitions == ()
        assert partitions(device.number) == {}


def test_filesystem_is_no_table(image):
    run("mkfs.ext4", "-q", image)
    with loopdev.attach(image, partscan=True) as device:
        assert device.partitions == ()


def test_without_partscan_no_nodes(image):
    make_gpt(image, GPT)
    with loopdev.attach(image) as device:
        assert partitions(device.number) == {}
        assert device.partitions == ()


def test_hybrid_image_with_overlapping_partitions(image):
    """As isohybrid makes them: the second lies within the first. The first has a node."""
    first = struct.pack("<B3sB3sII", 0x80, b"\0\0\0", 0x17, b"\0\0\0", 0, 8192)
    second = struct.pack("<B3sB3sII", 0, b"\0\0\0", 0xEF, b"\0\0\0", 64, 128)
    with open(image, "r+b") as file:
        file.seek(446)
        file.write(first + second + bytes(32) + b"\x55\xaa")
    with loopdev.attach(image, partscan=True) as device:
        assert 1 in [part.number for part in device.partitions]


def test_gpt_of_512_on_sectors_of_4096(image):
    """Aligned to 1 MiB as tables are, it can be used all the same."""
    make_gpt(image, GPT, 512)
    with loopdev.attach(image, sector_size=4096, partscan=True) as device:
        assert sysfs(device.number, "queue/logical_block_size") == "4096"
        assert [part.start // MIB for part in device.partitions] == [1, 3, 6]


def test_partition_that_is_not_aligned_is_refused(image):
    make_gpt(image, "label: gpt\nstart=2049, size=64\n", 512)
    with pytest.raises(loopdev.ImageFormatError, match="partition 1"):
        loopdev.attach(image, sector_size=4096, partscan=True)
    assert run("losetup", "-j", image) == ""


def test_large_table(image):
    run("sgdisk", "-Z", image)
    run("sgdisk", "-S", "512", image)
    args = [word for n in range(1, 41) for word in ("-n", f"{n}:0:+64K")]
    run("sgdisk", "-a", "1", *args, image)
    with loopdev.attach(image, partscan=True) as device:
        check(device)
        assert len(device.partitions) == 40


def leave_stray(image: Path, number: int) -> None:
    """Leave a partition on an unbound device, as a user of BLKPG does who detaches without it."""
    with Loop(number) as loop, open(image, "r+b") as file:
        loop.configure(file.fileno(), autoclear=True)
        blkpg.add(loop.fd, loop.path, 7, MIB, MIB)


def test_strays_of_an_earlier_user_are_removed(image, counting_file):
    number = 11000 + os.getpid() % 1000
    with loopdev.loop.LoopControl() as control:
        control.add(number)
    leave_stray(image, number)
    if 7 not in partitions(number):
        with loopdev.loop.LoopControl() as control:
            control.remove(number)
        pytest.skip("this kernel, or udev, does not keep them")
    with loopdev.attach(counting_file, number=number) as device:
        assert partitions(number) == {}
        assert device.partitions == ()
    assert not os.path.exists(f"/dev/loop{number}p7")


def test_killed_owner_leaves_no_partitions(image):
    make_gpt(image, GPT)
    code = f"""
        import loopdev, os, signal
        device = loopdev.attach({str(image)!r}, partscan=True)
        assert len(device.partitions) == 3
        print(device.number, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    number = int(done.stdout)
    assert sysfs(number, "loop/backing_file") != str(image)
    assert partitions(number) == {}


@pytest.mark.skipif(os.path.exists("/run/udev/control"), reason="udev reads the table by itself")
def test_rescan_follows_the_table(image):
    make_gpt(image, "label: gpt\nsize=2MiB\nsize=2MiB\nsize=2MiB\n")
    with loopdev.attach(image, partscan=True) as device:
        run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", device.path, input=GPT)
        with open(device.partitions[0].path, "rb"):  # unchanged, so it may be in use
            found = device.rescan()
        assert [part.size for part in found] == [2 * MIB, 3 * MIB, MIB]
        check(device)
        run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--delete", device.path, 2)
        assert [part.number for part in device.rescan()] == [1, 3]
        check(device)
        run("wipefs", "-qa", "--no-act", device.path)
        with open(device.path, "r+b") as file:
            file.write(bytes(MIB))
            file.seek(-MIB, os.SEEK_END)
            file.write(bytes(MIB))
        assert device.rescan() == ()
        assert partitions(device.number) == {}


def test_rescan_when_neighbours_trade_places(image):
    """The one that shrinks makes room for the one that is added or grows."""
    before = "label: gpt\n2: start=2048, size=8192\n1: start=10240, size=10240\n"
    after = "label: gpt\n2: start=2048, size=4096\n1: start=6144, size=14336\n"
    run("sfdisk", "-q", image, input=before)
    with loopdev.attach(image, partscan=True) as device:
        run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", device.path, input=after)
        found = {part.number: (part.start, part.size) for part in device.rescan()}
        assert found == {1: (3 * MIB, 7 * MIB), 2: (MIB, 2 * MIB)}
        check(device)


def test_rescan_refuses_what_is_in_use(image):
    make_gpt(image, "label: gpt\nsize=2MiB\nsize=2MiB\n")
    with loopdev.attach(image, partscan=True) as device:
        with open(device.partitions[1].path, "rb"):
            run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--delete", device.path, 2)
            with pytest.raises(loopdev.DeviceBusyError):
                device.rescan()
        assert [part.number for part in device.rescan()] == [1]


def test_rescan_of_a_device_attached_without_partscan(image):
    make_gpt(image, GPT)
    with loopdev.attach(image) as device:
        nodes = [part.path for part in device.rescan()]
        assert len(nodes) == 3
        check(device)
    assert not any(map(os.path.exists, nodes))
    assert partitions(device.number) == {}


def test_device_attached_by_others_shows_its_partitions(image):
    make_gpt(image, GPT)
    with loopdev.attach(image, partscan=True) as device:
        with loopdev.LoopDevice.open(device.path) as again:
            assert again.partitions == device.partitions
        listed = {d.path: d for d in loopdev.devices()}[device.path]
        assert [part.path for part in listed.partitions] == [p.path for p in device.partitions]


def test_dev_that_is_no_devtmpfs(image, tmp_path):
    """In a container's /dev nobody makes nodes but us, and we take them away again."""
    make_gpt(image, GPT)
    number = 12000 + os.getpid() % 1000
    command = Path(sys.executable).with_name("loopdev")
    program = tmp_path / "program.py"
    program.write_text(f"""
import os, stat, loopdev
with loopdev.attach({str(image)!r}, number={number}, partscan=True) as device:
    nodes = [device.path, *(part.path for part in device.partitions)]
    for node in nodes:
        print(node, stat.S_ISBLK(os.stat(node).st_mode))
    print(len(open(nodes[1], "rb").read()))
print(sorted(name for name in os.listdir("/dev") if name.startswith("loop")))
""")
    script = f"""
        mount -t tmpfs none /dev
        mknod /dev/loop-control c 10 237
        mknod /dev/null c 1 3
        {sys.executable} {program}
        device=$({command} attach -P --number {number} {image})
        ls $device*
        {command} detach $device
        ls /dev
    """
    out = run("unshare", "-m", "--propagation", "private", "sh", "-ec", script).splitlines()
    nodes = [f"/dev/loop{number}{part}" for part in ("", "p1", "p2", "p3")]
    assert out[:4] == [f"{node} True" for node in nodes]
    assert out[4] == str(2 * MIB)
    assert out[5] == "['loop-control']"
    assert out[6:10] == nodes
    # The disk's own node may be a static one of the container: only who made it removes it.
    assert out[10:] == ["loop-control", f"loop{number}", "null"]
    assert not os.path.exists(f"/sys/block/loop{number}")
