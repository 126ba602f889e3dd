# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Which blocks a worker reads ahead, and which not."""

from __future__ import annotations

import os
import time

import pytest

from loopdev.kernel.fds import OwnedFd
from loopdev.mapping._bytelocks import ByteLocks
from loopdev.mapping._cache import Cache
from loopdev.mapping._readers import CachedReader

BLOCK = 4096
BLOCKS = 64
AHEAD = 4


class Numbered:
    """An image each of whose blocks says which it is; every tenth is known to be zeros."""

    size, block_size, cached = BLOCKS * BLOCK, BLOCK, True
    ahead, streams = 0, 1

    def __init__(self) -> None:
        self.read_blocks: list[int] = []

    def read_into(self, offset, buffer):
        block = offset // BLOCK
        buffer[:] = block.to_bytes(8, "little") * (len(buffer) // 8)
        self.read_blocks.append(block)

    def is_zero(self, offset, length):
        return offset // BLOCK % 10 == 9


@pytest.fixture
def image():
    return Numbered()


@pytest.fixture
def reader(image):
    cache = Cache.create(image.size, BLOCK, image.size, 1)
    cache.enter(0)
    yield CachedReader(image, cache, lambda offset, exc: None, AHEAD // 2)
    cache.close()


def read(reader, block: int) -> None:
    """Read a block as the server does."""
    buffers = reader.at_once(block * BLOCK, 16)
    if buffers is None:
        buffers = reader.wait(block * BLOCK, 16, time.monotonic() + 10)
    want = bytes(16) if block % 10 == 9 else block.to_bytes(8, "little") * 2
    assert b"".join(buffers) == want
    reader.sent()
    reader.done()


def settle(reader) -> None:
    """Wait until nothing is read ahead any more."""
    end = time.monotonic() + 10
    while reader.busy and time.monotonic() < end:
        time.sleep(0.001)
    assert not reader.busy


def test_in_order(reader, image):
    read(reader, 20)
    settle(reader)
    assert image.read_blocks == [20]
    read(reader, 21)
    settle(reader)
    assert sorted(image.read_blocks) == [20, 21, 22, 23, 24, 25]
    read(reader, 22)
    settle(reader)
    assert sorted(image.read_blocks) == [20, 21, 22, 23, 24, 25, 26]


def test_each_block_is_read_once(reader, image):
    for block in range(BLOCKS):
        read(reader, block)
    settle(reader)
    assert sorted(image.read_blocks) == [n for n in range(BLOCKS) if n % 10 != 9]


def test_out_of_order(reader, image):
    for block in (40, 10, 50, 3, 30, 60, 22):
        read(reader, block)
    settle(reader)
    assert image.read_blocks == [40, 10, 50, 3, 30, 60, 22]


def test_backwards_is_not_ahead(reader, image):
    for block in (28, 24, 20, 16):
        read(reader, block)
    settle(reader)
    assert image.read_blocks == [28, 24, 20, 16]


def test_a_step_aside_does_not_begin_it_anew(reader, image):
    """The other workers get some of the reads, and they come in any order."""
    for block in (20, 22, 21, 23):
        read(reader, block)
    settle(reader)
    assert sorted(image.read_blocks) == [20, 21, 22, 23, 24, 25, 26, 27]
    assert len(set(image.read_blocks)) == len(image.read_blocks)


def test_not_beyond_the_end(reader, image):
    read(reader, BLOCKS - 2)
    read(reader, BLOCKS - 1)
    settle(reader)
    assert sorted(image.read_blocks) == [BLOCKS - 2, BLOCKS - 1]


def test_the_first_block_is_read_at_the_beginning(reader, image):
    reader.begin()
    settle(reader)
    assert image.read_blocks == [0]
    read(reader, 0)
    assert image.read_blocks == [0]


@pytest.mark.parametrize("zeros", [False, True])
def test_the_first_block_is_kept_from_the_others_until_it_is_there(image, zeros):
    image.is_zero = lambda offset, length: zeros
    cache = Cache.create(image.size, BLOCK, image.size, 1)
    cache.reserve(0)
    cache.enter(0)
    reader = CachedReader(image, cache, lambda offset, exc: None, AHEAD // 2)
    other = ByteLocks(OwnedFd.open(f"/proc/self/fd/{cache.filenos()[0]}", os.O_RDWR))
    assert other.is_held(0)
    reader.begin()
    settle(reader)
    assert not other.is_held(0)
    assert image.read_blocks == ([] if zeros else [0])
    other.close()
    cache.close()


def test_not_busy_before_anything_is_read(reader):
    assert not reader.busy


@pytest.fixture
def small(image):
    """A cache of two frames, and what reads through it."""
    cache = Cache.create(image.size, BLOCK, 0, 1)
    cache.enter(0)
    yield cache, CachedReader(image, cache, lambda offset, exc: None, 1)
    cache.close()


def test_a_read_of_more_blocks_than_the_cache_has(small):
    _, reader = small
    (found,) = reader.wait(BLOCK // 2, BLOCKS * BLOCK - BLOCK, time.monotonic() + 10)
    words = BLOCK // 8
    whole = b"".join(block.to_bytes(8, "little") * words for block in range(BLOCKS))
    assert found == whole[BLOCK // 2 : -BLOCK // 2]
    reader.done()


def test_others_that_want_its_frame_do_not_keep_who_reads_from_it(small, image, monkeypatch):
    cache, reader = small
    fill = cache.fill

    def fill_and_lose(block, *args, **kwargs):
        fill(block, *args, **kwargs)
        for other in (30, 31, 32):
            fill(other, lambda view: None, time.monotonic() + 10)

    monkeypatch.setattr(cache, "fill", fill_and_lose)
    (found,) = reader.wait(10 * BLOCK + 8, 8, time.monotonic() + 1)
    assert found == (10).to_bytes(8, "little")
    assert image.read_blocks == [10]
    reader.done()
