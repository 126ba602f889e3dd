# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Images that cannot be read, or not in time: errors for what is asked of them, and no more."""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path

import pytest
from fake_fuse import SIZE, StoppedFuse
from loads import Reader
from mapped import (
    EIO,
    KIB,
    MIB,
    SNAPSHOT,
    elapsed,
    loopdev,
    noise,
    ok,
    raw,
    read_all,
    read_direct,
    read_fails,
    store,
)
from oracle import wait_until
from pbs import make_snapshot

CHUNK = 64 * KIB


def chunk(directory: Path, data: bytes, number: int, size: int = CHUNK) -> Path:
    """Return the file of a chunk."""
    import hashlib

    digest = hashlib.sha256(data[number * size : (number + 1) * size]).hexdigest()
    return directory / "store/.chunks" / digest[:4] / digest


def flip(path: Path) -> None:
    raw_bytes = bytearray(path.read_bytes())
    raw_bytes[len(raw_bytes) // 2] ^= 1
    path.write_bytes(raw_bytes)


def cut(path: Path) -> None:
    os.truncate(path, 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (flip, cut, empty, Path.unlink, replace_by_directory, replace_by_pipe)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_chunks(maps, tmp_path, damage):
    """EIO for their range alone, told once each with digest and offset, and counted."""
    data = noise(8 * CHUNK + 100)
    bad = (2, 5, 8)
    source = store(tmp_path, data, CHUNK)
    for number in bad:
        damage(chunk(tmp_path, data, number))
    mapping = maps(*source)
    for _ in range(3):
        for number in range(9):
            start = number * CHUNK
            if number in bad:
                assert read_fails(mapping.device, start, 512) == EIO
            else:
                assert read_direct(mapping.device, start, CHUNK) == data[start : start + CHUNK]
    info = mapping.info()
    assert (info["status"], info["damaged"], info["restarts"]) == ("serving", len(bad), 0)
    assert info["errors"] >= 3 * len(bad)
    lines = maps.log(mapping).splitlines()
    assert len(lines) == len(bad)
    for number in bad:
        digest = chunk(tmp_path, data, number).name
        [line] = [line for line in lines if digest in line]
        assert f"bytes {number * CHUNK} to " in line
    ok("unmap", mapping.name)


def test_first_chunk_damaged(maps, tmp_path):
    """The rest is what is left of a backup, so it can be had."""
    data = noise(4 * CHUNK)
    source = store(tmp_path, data, CHUNK)
    chunk(tmp_path, data, 0).unlink()
    mapping = maps(*source)
    assert read_fails(mapping.device, 0) == EIO
    assert read_direct(mapping.device, CHUNK, 3 * CHUNK) == data[CHUNK:]
    ok("unmap", mapping.name)
    name = maps.name()
    done = loopdev("map", *source, "--name", name, "--partscan")
    assert (done.returncode, done.stdout) == (6, "")
    assert "cannot be read" in done.stderr


def test_a_chunk_that_comes_back(maps, tmp_path):
    """Nothing is remembered of what could not be read."""
    data = noise(4 * CHUNK)
    source = store(tmp_path, data, CHUNK)
    place = chunk(tmp_path, data, 3)
    place.rename(tmp_path / "away")
    mapping = maps(*source)
    assert read_fails(mapping.device, 3 * CHUNK) == EIO
    (tmp_path / "away").rename(place)
    assert read_all(mapping.device, direct=True) == data
    ok("unmap", mapping.name)


def test_the_store_vanishes(maps, tmp_path):
    """What is in the cache can be read still; the map stays, and goes when asked to."""
    data = noise(128 * CHUNK)
    mapping = maps(*store(tmp_path, data, CHUNK))
    read_direct(mapping.device, 0, CHUNK)
    shutil.rmtree(tmp_path / "store")
    assert read_direct(mapping.device, 0, CHUNK) == data[:CHUNK]
    # Where nobody who looks for filesystems, such as udev, has read already.
    assert read_fails(mapping.device, 64 * CHUNK) == EIO
    assert mapping.info()["status"] == "serving"
    ok("unmap", mapping.name)


def test_many_damages(maps, tmp_path):
    """A store that is gone altogether does not fill the log, nor take the time of the map."""
    data = noise(600 * 4 * KIB)
    mapping = maps(*store(tmp_path, data, 4 * KIB))
    shutil.rmtree(tmp_path / "store/.chunks")
    for number in range(8, 600):  # the first ones may be in the cache
        assert read_fails(mapping.device, number * 4 * KIB) == EIO
    info = mapping.info()
    assert info["errors"] >= 592
    assert info["damaged"] == 592
    assert len(maps.log(mapping).splitlines()) <= 600
    ok("unmap", mapping.name)


def test_a_raw_image_is_cut_while_mapped(maps, tmp_path):
    data = noise(MIB)
    [image] = raw(tmp_path, data)
    mapping = maps(image)
    os.truncate(image, MIB // 2)
    assert read_direct(mapping.device, 0, MIB // 2) == data[: MIB // 2]
    assert read_fails(mapping.device, MIB - 4096) == EIO
    assert "has become shorter" in maps.log(mapping)
    os.truncate(image, MIB)
    assert read_direct(mapping.device, MIB - 4096, 4096) == bytes(4096)
    ok("unmap", mapping.name)


def test_a_raw_image_is_removed_while_mapped(maps, tmp_path):
    data = noise(MIB)
    [image] = raw(tmp_path, data)
    mapping = maps(image)
    image.unlink()
    assert read_all(mapping.device) == data
    ok("unmap", mapping.name)


# A store that hangs.


def test_a_store_that_hangs(maps, tmp_path):
    """EIO at the deadline, for as many reads as there may be; then all is well again."""
    with StoppedFuse(tmp_path / "slow.img") as slow:
        mapping = maps(slow.file, "--io-timeout", 1, "--workers", 2)
        read_direct(mapping.device, 0, 4096)
        slow.stop()
        began = time.monotonic()
        readers = [Reader(mapping.device, SIZE // 2 + 4096 * number) for number in range(8)]
        # What is there can be had meanwhile.
        assert read_direct(mapping.device, 0, 4096) == bytes(4096)
        # More than there are threads for.
        readers += [Reader(mapping.device, SIZE // 4 + 4096 * number) for number in range(56)]
        assert {reader.result(10) for reader in readers} == {EIO}
        assert elapsed(began) < 8
        info = mapping.info()
        assert (info["status"], info["restarts"]) == ("serving", 0)
        assert info["errors"] > 0
        slow.resume()
        assert read_all(mapping.device, direct=True) == bytes(SIZE)
        ok("unmap", mapping.name)


def test_unmap_while_the_store_hangs(maps, tmp_path):
    with StoppedFuse(tmp_path / "slow.img") as slow:
        mapping = maps(slow.file, "--io-timeout", 1)
        slow.stop()
        reader = Reader(mapping.device, SIZE // 2)
        wait_until(lambda: mapping.info()["misses"] > 0)
        began = time.monotonic()
        done = loopdev("unmap", mapping.name, "--force")
        assert elapsed(began) < 15
        assert reader.result(5) == EIO
        # A thread may be where no signal reaches it: then its process outlives its end.
        if done.returncode:
            assert done.returncode == 7, done
            assert "its processes do not end" in done.stderr
            assert not mapping.is_bound()
        slow.resume()
        mapping.wait_gone() if not done.returncode else wait_until(lambda: gc(mapping.name))
        assert mapping.is_gone()


def gc(name: str) -> bool:
    return (
        bool(re.search(f"^{name}: .*, removed$", ok("gc"), re.MULTILINE))
        or not Path(f"/run/loopdev/maps/{name}").exists()
    )


def test_two_images_of_one_store(maps, tmp_path):
    """They share chunks on disk, and nothing else."""
    first, second = noise(4 * CHUNK), noise(2 * CHUNK) + noise(2 * CHUNK, 9)
    one = maps(*store(tmp_path, first, CHUNK))
    other = SNAPSHOT.replace("2026", "2027")
    make_snapshot(tmp_path / "store", other, second, CHUNK, "disk.img")
    two = maps(f"{other}/disk.img", "--repository", tmp_path / "store")
    assert read_all(one.device) == first
    assert read_all(two.device) == second
    ok("unmap", one.name, two.name)
