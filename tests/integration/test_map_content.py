# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What is read from a map is what is in the image: cmp and sha256sum are the judges."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import threading
from pathlib import Path

import pytest
from mapped import (
    KIB,
    MIB,
    drop_cache,
    loopdev,
    mounted,
    noise,
    ok,
    padded,
    raw,
    read_all,
    read_direct,
    refused,
    store,
)
from oracle import losetup, make_gpt, partitions, run, sysfs

KINDS = {"raw": raw, "datastore": store}
TREE_SEED = 7


@pytest.fixture(params=KINDS)
def kind(request):
    """How an image gets its source: as a file, or as chunks in a datastore."""
    return KINDS[request.param]


def fill(directory: Path) -> None:
    """Make files of all kinds."""
    rng = random.Random(TREE_SEED)
    for number in range(40):
        place = directory / f"dir{number % 5}" / f"sub{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file{number}").write_bytes(rng.randbytes(rng.randrange(1 << (number % 19))))
    (directory / "link").symlink_to("dir0/sub0/file0")
    (directory / "large").write_bytes(rng.randbytes(3 * MIB + 17))
    os.truncate(directory / "large", 9 * MIB)


def checksums(directory: Path) -> str:
    """Return what sha256sum says of every file, with their names, sizes, modes and times."""
    script = (
        "find . -type f ! -path './lost+found*' -print0 | sort -z | xargs -0 sha256sum; "
        "find . ! -path './lost+found*' ! -path . -printf '%p %y %m %l\\n' | sort"
    )
    return run("sh", "-c", script, cwd=directory)


def filesystem(kind: str, tree: Path, image: Path) -> str:
    """Make an image with a filesystem that has the tree in it; return what to mount it with."""
    if kind == "squashfs":
        run("mksquashfs", tree, image, "-quiet", "-no-progress")
        return "ro"
    size = {"ext4": 32, "xfs": 300}[kind]
    with open(image, "wb") as file:
        file.truncate(size * MIB)
    run(*{"ext4": ("mkfs.ext4", "-q", "-m0"), "xfs": ("mkfs.xfs", "-q")}[kind], image)
    where = tree.parent / "filled"
    where.mkdir()
    run("mount", "-o", "loop", image, where)
    try:
        run("cp", "-a", f"{tree}/.", where)
    finally:
        run("umount", where)
    return {"ext4": "ro,noload", "xfs": "ro,norecovery,nouuid"}[kind]


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "squashfs"])
def test_every_file_of_a_filesystem(maps, tmp_path, fstype):
    tree, image = tmp_path / "tree", tmp_path / "fs.img"
    tree.mkdir()
    fill(tree)
    options = filesystem(fstype, tree, image)
    expected = checksums(tree)
    assert expected.count("file") > 40
    for source in ((image,), store(tmp_path, image.read_bytes())):
        mapping = maps(*source)
        with mounted(mapping.device, tmp_path / "mnt", options) as where:
            assert checksums(where) == expected
            run("diff", "-r", "--no-dereference", "-x", "lost+found", tree, where)
        run("cmp", "-n", image.stat().st_size, image, mapping.device)
        ok("unmap", mapping.name)


@pytest.mark.parametrize("size", [1, 511, 512, 513, 4095, 4097, MIB, 4 * MIB, 4 * MIB + 1, 9999999])
def test_any_size(maps, tmp_path, kind, size, sector_size):
    data = noise(size)
    mapping = maps(*kind(tmp_path, data), "--sector-size", sector_size)
    expected = padded(data, sector_size)
    assert sysfs(mapping.number, "size") == str(len(expected) // 512)
    assert sysfs(mapping.number, "queue/logical_block_size") == str(sector_size)
    assert read_all(mapping.image) == expected
    assert read_all(mapping.device) == expected
    assert read_all(mapping.device, direct=True) == expected
    ok("unmap", mapping.name)


def test_what_the_device_is(maps, tmp_path, kind):
    mapping = maps(*kind(tmp_path, noise(MIB)))
    found = losetup(mapping.device)
    assert found["back-file"] == str(mapping.image)
    assert (found["ro"], found["dio"], found["autoclear"]) == (True, True, False)
    assert (found["offset"], found["sizelimit"], found["log-sec"]) == (0, 0, 512)
    mode = oct(os.stat(mapping.image).st_mode)
    assert (mode, os.stat(mapping.directory).st_mode & 0o777) == ("0o100400", 0o700)
    with pytest.raises(OSError, match="Read-only"):
        open(mapping.image, "r+b").close()
    ok("unmap", mapping.name)


@pytest.mark.parametrize("direct", [False, True])
def test_every_odd_offset_of_the_file(maps, tmp_path, kind, direct):
    """FUSE takes any offset and length, past the page cache too."""
    data = noise(3 * 4 * KIB + 1001)
    source = raw(tmp_path, data) if kind is raw else store(tmp_path, data, 4 * KIB)
    mapping = maps(*source)
    expected, rng = padded(data), random.Random(1)
    fd = os.open(mapping.image, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        for offset in range(1, len(expected) + 600, 2):
            for length in (1, rng.randrange(1, len(expected), 2), len(expected)):
                if not direct and not offset % 101:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                assert os.pread(fd, length, offset) == expected[offset : offset + length]
    finally:
        os.close(fd)
    ok("unmap", mapping.name)


def test_every_odd_sector_of_the_device(maps, tmp_path, kind):
    data = noise(24 * KIB - 100)
    source = raw(tmp_path, data) if kind is raw else store(tmp_path, data, 4 * KIB)
    mapping = maps(*source)
    expected = padded(data)
    sectors = len(expected) // 512
    for first in range(1, sectors, 2):
        for count in range(1, sectors - first + 1, 2):
            start, length = first * 512, count * 512
            assert read_direct(mapping.device, start, length) == expected[start : start + length]
    ok("unmap", mapping.name)


def test_reads_across_chunks(maps, tmp_path):
    """Reads that begin and end anywhere around where chunks meet, in a store of small chunks."""
    data, rng = noise(4 * MIB + 12345), random.Random(5)
    mapping = maps(*store(tmp_path, data, 64 * KIB), "--cache-limit", MIB)
    expected = padded(data)
    for _ in range(600):
        edge = rng.randrange(len(expected) // (64 * KIB) + 1) * 64 * KIB
        offset = max(0, edge - rng.randrange(1, 4096) * 2 - 1)
        length = rng.choice((4097, 65537, 200003))
        with open(mapping.image, "rb", buffering=0) as file:
            assert os.pread(file.fileno(), length, offset) == expected[offset : offset + length]
        drop_cache(mapping.image)
    ok("unmap", mapping.name)


TABLE = "label: gpt\nstart=2048,size=4096,name=one\nstart=8192,size=4096,name=two\n"


def test_partitions(maps, tmp_path, kind):
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.write(noise(8 * MIB))
    make_gpt(image, TABLE)
    data = image.read_bytes()
    mapping = maps(*kind(tmp_path, data), "--partscan")
    wanted = {1: (2048 * 512, 4096 * 512), 2: (8192 * 512, 4096 * 512)}
    assert partitions(mapping.number) == wanted
    for number, (start, size) in wanted.items():
        assert read_all(f"{mapping.device}p{number}") == data[start : start + size]
    ok("unmap", mapping.device)
    assert partitions(mapping.number) == {}
    assert not Path(f"{mapping.device}p1").exists()


def test_partitions_of_4096_byte_sectors(maps, tmp_path):
    """The sector size is that of the table, if none is given."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    make_gpt(image, "label: gpt\nstart=256,size=512,name=one\n", 4096)
    mapping = maps(image, "--partscan")
    assert sysfs(mapping.number, "queue/logical_block_size") == "4096"
    assert partitions(mapping.number) == {1: (MIB, 2 * MIB)}
    ok("unmap", mapping.name)


def test_table_of_4096_byte_sectors_and_an_odd_end(maps, tmp_path):
    """All of the device can be read: it ends with a whole sector."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(16 * MIB)
    make_gpt(image, "label: gpt\nstart=256,size=512,name=one\n", 4096)
    with open(image, "ab") as file:
        file.write(noise(700))
    mapping = maps(image)
    assert read_all(mapping.device, direct=True) == padded(image.read_bytes(), 4096)
    ok("unmap", mapping.name)


@pytest.mark.parametrize("value", ["0", "1", "500", "768"])
def test_sector_size_that_cannot_be(maps, tmp_path, value):
    name = maps.name()
    done = loopdev("map", *raw(tmp_path, noise(MIB)), "--name", name, "--sector-size", value)
    assert done.returncode == 2, done
    assert "sector" in done.stderr


def test_concurrent_readers(maps, tmp_path, kind):
    """Many at once, in order and at random, through a cache that holds a part of the image."""
    data = noise(24 * MIB + 512)
    source = raw(tmp_path, data) if kind is raw else store(tmp_path, data, MIB)
    mapping = maps(*source, "--cache-limit", 4 * MIB)
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        fd = os.open(mapping.image, os.O_RDONLY | (os.O_DIRECT if seed % 2 else 0))
        try:
            for _ in range(150):
                length = rng.choice((512, 4096, 65536, MIB + 512))
                offset = rng.randrange(0, len(data) - length)
                if os.pread(fd, length, offset) != data[offset : offset + length]:
                    wrong.append((seed, offset, length))
        except OSError as exc:
            wrong.append(exc)
        finally:
            os.close(fd)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    words = ["dd", f"if={mapping.device}", "bs=512k", "status=none"]
    readers = [
        subprocess.Popen([*words, *more], stdout=subprocess.PIPE)
        for more in ((), ("iflag=direct",), ("iflag=direct",), ())
    ]
    sums = {hashlib.sha256(reader.communicate()[0]).digest() for reader in readers}
    assert sums == {hashlib.sha256(data).digest()}
    ok("unmap", mapping.name)


def test_holes_and_zero_chunks(maps, tmp_path):
    data = bytes(4 * MIB) + noise(MIB) + bytes(7 * MIB) + noise(100)
    mapping = maps(*store(tmp_path, data))
    assert read_all(mapping.device) == padded(data)
    ok("unmap", mapping.name)


def test_map_of_a_map(maps, tmp_path):
    """The last one is unmapped first, whatever their names; the first one says who holds it."""
    data = noise(6 * MIB + 300)
    first = maps(*store(tmp_path, data, MIB), name=f"{maps.name()}-first")
    maps.names.append(first.name)
    second = maps(first.device)
    third = maps(second.device, "--sector-size", 4096)
    assert read_all(third.device, direct=True) == padded(data, 4096)
    done = loopdev("unmap", first.name, "--timeout", 0.3)
    refused(done, 4, "in use by")
    assert read_all(third.device) == padded(data, 4096)
    ok("unmap", third.name, second.name, first.name)


def test_twenty_at_once(maps, tmp_path):
    """Made by as many processes at the same time; each has its own image."""
    wanted = {}
    running = []
    for number in range(20):
        data = noise(100_000 + number, number)
        place = tmp_path / str(number)
        place.mkdir()
        source = store(place, data, 64 * KIB) if number % 2 else raw(place, data)
        name = maps.name()
        wanted[name] = data
        words = ("map", *source, "--name", name, "--workers", 1, "--json")
        running.append(subprocess.Popen(command(*words), stdout=subprocess.PIPE))
    found = {}
    for process in running:
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 0
        info = json.loads(out)
        found[info["name"]] = info["device"]
    assert len(set(found.values())) == 20
    for name, device in found.items():
        assert read_all(device) == padded(wanted[name])
    ok("unmap", *found)


def command(*words: object) -> list[str]:
    from mapped import COMMAND

    return [COMMAND, *map(str, words)]
