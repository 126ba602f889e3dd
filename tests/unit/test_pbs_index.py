# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Indexes: every vector, built by hand, and any bytes."""

from __future__ import annotations

import hashlib
import struct
import time
from mmap import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pbs import FIXED_MAGIC, KEY, VALUES, vector

from loopdev.errors import ImageFormatError
from loopdev.images.pbs import index
from loopdev.images.pbs.index import FixedIndex
from loopdev.images.pbs.keys import CryptKey
from loopdev.images.pbs.manifest import FileEntry

TINY = VALUES["tiny_fidx"]


def header(size, chunk_size, magic=FIXED_MAGIC):
    return struct.pack("<8s16sq32sQQ4016x", magic, b"u" * 16, 5, b"c" * 32, size, chunk_size)


@pytest.mark.parametrize(
    ("name", "digests", "csum"),
    [
        ("tiny-plain", "plain_digests", "plain_index_csum"),
        ("tiny-encrypted", "enc_digests_K_00_1f", "enc_index_csum"),
    ],
)
def test_vectors(name, digests, csum):
    found = FixedIndex.parse(vector(f"index/{name}.img.fidx"))
    assert (found.size, found.chunk_size, found.count) == (132608, 65536, 3)
    assert found.uuid.hex() == TINY["uuid"]
    assert found.ctime == TINY["ctime"]
    assert [digest.hex() for digest in found.digests()] == TINY[digests]
    assert found.csum().hex() == found.stored_csum.hex() == TINY[csum]
    assert [found.length(number) for number in range(3)] == [65536, 65536, 1536]


@pytest.fixture
def tiny():
    """An index, and what a manifest says of it."""
    data = vector("index/tiny-plain.img.fidx")
    csum = bytes.fromhex(TINY["plain_index_csum"])
    return data, FileEntry(filename="t.img.fidx", crypt_mode="none", size=132608, csum=csum)


def test_the_index_that_a_manifest_means(tiny):
    data, entry = tiny
    assert index.check_index(memoryview(data), "/i", entry).count == 3


@pytest.mark.parametrize(
    ("changes", "offset", "reason"),
    [({"size": 132609}, 64, "says 132609"), ({"csum": bytes(32)}, 4096, "vouches for")],
)
def test_another_index_than_a_manifest_means(tiny, changes, offset, reason):
    data, entry = tiny
    facts = {name: getattr(entry, name) for name in ("filename", "crypt_mode", "size", "csum")}
    with pytest.raises(ImageFormatError) as caught:
        index.check_index(memoryview(data), "/i", FileEntry(**facts | changes))
    assert (caught.value.path, caught.value.offset) == ("/i", offset)
    assert reason in str(caught.value)


def test_an_index_that_is_too_long(tiny):
    with pytest.raises(ImageFormatError) as caught:
        index.check_size(132608, (4 << 30) + 1, tiny[1], "/i")
    assert "more than 4294967296" in str(caught.value)


@pytest.mark.parametrize("chunk_size", [4 << 20, 64 << 10])
@pytest.mark.parametrize("key", [None, KEY])
def test_the_digest_of_zeros(chunk_size, key):
    """It is that of the plain text, with what is derived of the key behind it."""
    data = header(chunk_size, chunk_size) + bytes(32)
    text = bytes(chunk_size)
    if key is not None:
        text += hashlib.pbkdf2_hmac("sha256", key, b"_id_key", 10)
    found = index.zeros_digest(FixedIndex.parse(data), key and CryptKey(key))
    assert found == hashlib.sha256(text).digest()


@pytest.mark.parametrize(
    ("name", "offset", "reason"),
    [
        ("bad-magic.fidx", 0, "magic"),
        ("bad-truncated-header.fidx", 0, "at least 4096"),
        ("bad-short-body.fidx", 4096, "must have 4192 bytes, it has 4191"),
        ("bad-extra-digest.fidx", 4096, "must have 4192 bytes, it has 4224"),
        ("bad-chunk-size-not-pow2.fidx", 72, "65535"),
        ("bad-chunk-size-zero.fidx", 72, "chunks cannot be 0"),
        ("bad-size-zero.fidx", 64, "image cannot be 0"),
        ("bad-size-overflow.fidx", 64, "18446744073709551615"),
        ("bad-size-2p59plus1.fidx", 4096, "must have"),
        ("tiny.didx", 0, "dynamic"),
    ],
)
def test_damaged_vectors(name, offset, reason):
    with pytest.raises(ImageFormatError) as caught:
        FixedIndex.parse(vector(f"index/{name}"), "/index")
    assert (caught.value.path, caught.value.offset) == ("/index", offset)
    assert reason in caught.value.reason


def test_a_wrong_csum_shows_when_it_is_computed():
    found = FixedIndex.parse(vector("index/bad-csum.fidx"))
    assert found.stored_csum != found.csum()
    assert found.csum().hex() == TINY["plain_index_csum"]


def test_one_byte_more_than_a_chunk():
    """As upstream's own test has it."""
    digests = bytes(range(32)), bytes(range(32, 64))
    found = FixedIndex.parse(header((4 << 20) + 1, 4 << 20) + b"".join(digests))
    assert tuple(found.digests()) == digests
    assert [found.length(0), found.length(1)] == [4 << 20, 1]


@pytest.mark.parametrize("chunk_size", [1, 512, 2048, 3 << 20, 32 << 20, 1 << 63])
def test_chunk_sizes_that_no_server_has(chunk_size):
    count = -(-(1 << 30) // chunk_size) if chunk_size > 1 << 20 else 1
    with pytest.raises(ImageFormatError) as caught:
        FixedIndex.parse(header(1 << 30, chunk_size) + bytes(32 * count))
    assert caught.value.offset == 72


@pytest.mark.parametrize("number", [-1, 3])
def test_no_such_chunk(number):
    with pytest.raises(IndexError):
        FixedIndex.parse(vector("index/tiny-plain.img.fidx")).digest(number)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 1 << 20])
def test_build(size):
    """Field by field, as the format says."""
    count = -(-size // 4096)
    digests = hashlib.shake_128(b"digests").digest(32 * count)
    found = index.build(digests, size, 4096, uuid=bytes(range(16)), ctime=1704164645)
    assert len(found) == 4096
    assert found[:8] == FIXED_MAGIC
    assert found[8:24] == bytes(range(16))
    assert int.from_bytes(found[24:32], "little") == 1704164645
    assert found[32:64] == hashlib.sha256(digests).digest()
    assert int.from_bytes(found[64:72], "little") == size
    assert int.from_bytes(found[72:80], "little") == 4096
    assert found[80:] == bytes(4016)
    parsed = FixedIndex.parse(found + digests)
    assert (parsed.size, parsed.count) == (size, count)


def test_build_gives_the_vector():
    digests = bytes.fromhex("".join(TINY["plain_digests"]))
    uuid = bytes.fromhex(TINY["uuid"])
    found = index.build(digests, TINY["size"], 65536, uuid=uuid, ctime=TINY["ctime"])
    assert found + digests == vector("index/tiny-plain.img.fidx")


def test_16_tib_are_opened_at_once():
    """The digests stay where they are: nothing is copied or listed."""
    count = (16 << 40) // (4 << 20)
    with mmap(-1, 4096 + 32 * count) as memory:
        memory[:4096] = header(16 << 40, 4 << 20)
        memory[-32:] = b"z" * 32
        begin = time.monotonic()
        found = FixedIndex.parse(memory)
        assert found.digest(count - 1) == b"z" * 32
        assert time.monotonic() - begin < 0.5
        assert found.csum() == hashlib.sha256(memoryview(memory)[4096:]).digest()
        found.close()


@given(st.binary(max_size=5000))
def test_any_bytes_are_refused(data):
    with pytest.raises(ImageFormatError):
        FixedIndex.parse(data)


@given(
    st.one_of(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.integers(0, 30).map(lambda bits: 1 << bits), st.integers(0, (1 << 64) - 1)),
    st.integers(0, 10),
    st.integers(-40, 40),
)
def test_any_sizes(size, chunk_size, count, more):
    data = header(size, chunk_size) + bytes(max(0, 32 * count + more))
    try:
        found = FixedIndex.parse(data)
    except ImageFormatError:
        return
    assert found.count * 32 + 4096 == len(data)
    assert (found.count - 1) * chunk_size < size <= found.count * chunk_size
    assert sum(found.length(number) for number in range(found.count)) == size
