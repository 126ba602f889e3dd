# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Index files: which chunks an image is made of.

Source: pbs-datastore/src/{fixed_index,dynamic_index}.rs.
"""

from __future__ import annotations

import struct

from loopdev.errors import ImageFormatError
from loopdev.images.pbs.keys import chunk_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from mmap import mmap
    from typing import NoReturn

    from loopdev.images.pbs.keys import CryptKey
    from loopdev.images.pbs.manifest import FileEntry

    Buffer = bytes | bytearray | memoryview | mmap

MAGIC = bytes.fromhex("2f7f41ed91fd0fcd")
DYNAMIC_MAGIC = bytes.fromhex("1c914ea519bab3cd")
CHUNK_SIZE = 4 << 20
DIGEST_SIZE = 32
_HEADER = struct.Struct("<8s16sq32sQQ4016x")  # fixed_index.rs, FixedIndexHeader
HEADER_SIZE = _HEADER.size
# Servers write 4 MiB, and take chunks of up to 16 MiB.
_CHUNK_SIZES = tuple(1 << bits for bits in range(12, 25))
_INDEX_MAX = 4 << 30  # of an image of 512 TiB; it is kept in memory
_ZERO_DIGEST = bytes.fromhex("bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8")
# A block device cannot be bigger, so no image is.
_SIZE_MAX = (1 << 63) - 1


class FixedIndex:
    """The index of a disk image: one digest for each chunk.

    Made by :meth:`parse`. The digests stay where they are.

    Attributes:
        size: Of the image, in bytes.
        chunk_size: Of every chunk but the last, which ends with the image.
        count: How many chunks there are.
        uuid: 16 random bytes.
        ctime: When it was made, in Unix seconds.
        stored_csum: The checksum in the header, which nothing relies on; see :meth:`csum`.
    """

    __slots__ = ("_digests", "chunk_size", "count", "ctime", "size", "stored_csum", "uuid")

    def __init__(
        self, fields: tuple[bytes, bytes, int, bytes, int, int], digests: memoryview
    ) -> None:
        _, self.uuid, self.ctime, self.stored_csum, self.size, self.chunk_size = fields
        self.count = len(digests) // DIGEST_SIZE
        self._digests = digests

    @classmethod
    def parse(cls, data: Buffer, path: str | None = None) -> FixedIndex:
        """Return the index in *data*, which must not change while it is in use.

        Raises:
            ImageFormatError: It is no such index.
        """
        view = memoryview(data).cast("B")
        fields = check_header(view[:HEADER_SIZE], len(view), path)
        return cls(fields, view[HEADER_SIZE:].toreadonly())

    def digest(self, number: int) -> bytes:
        """Return the digest of a chunk; the first is number 0."""
        if not 0 <= number < self.count:
            raise IndexError(number)
        start = number * DIGEST_SIZE
        return bytes(self._digests[start : start + DIGEST_SIZE])

    def digests(self) -> Iterator[bytes]:
        """Return all digests in order."""
        return map(self.digest, range(self.count))

    def length(self, number: int) -> int:
        """Return the size of a chunk in bytes."""
        return min(self.chunk_size, self.size - number * self.chunk_size)

    def csum(self) -> bytes:
        """Return the checksum of all digests: 32 bytes, what the manifest has for the file."""
        return digests_csum(self._digests)

    def close(self) -> None:
        """Let go of the data; the index is then of no use."""
        self._digests.release()


def check_header(
    head: memoryview, length: int, path: str | None = None
) -> tuple[bytes, bytes, int, bytes, int, int]:
    """Return the fields of a header, if it can be that of an index of *length* bytes.

    Raises:
        ImageFormatError: It cannot.
    """

    def bad(offset: int, reason: str) -> NoReturn:
        raise ImageFormatError(path, offset, reason)

    if len(head) < HEADER_SIZE:
        bad(0, f"an index has at least {HEADER_SIZE} bytes, this has {len(head)}")
    magic, uuid, ctime, csum, size, chunk_size = _HEADER.unpack_from(head)
    if magic == DYNAMIC_MAGIC:
        bad(0, "is a dynamic index, of a file archive; a disk image has a fixed one")
    if magic != MAGIC:
        bad(0, f"no index has the magic number {magic.hex()}")
    if not 0 < size <= _SIZE_MAX:
        bad(64, f"the size of the image cannot be {size}")
    if chunk_size not in _CHUNK_SIZES:
        bad(72, f"the size of chunks cannot be {chunk_size}")
    # Python's integers do not overflow.
    expected = HEADER_SIZE + -(-size // chunk_size) * DIGEST_SIZE
    if length != expected:
        bad(HEADER_SIZE, f"the index must have {expected} bytes, it has {length}")
    return magic, uuid, ctime, csum, size, chunk_size


def check_index(data: memoryview, path: str, entry: FileEntry) -> FixedIndex:
    """Return the index in *data*, which is what the manifest says.

    Raises:
        ImageFormatError: It is no index, or another one.
    """
    index = FixedIndex.parse(data, path)
    check_size(index.size, len(data), entry, path)
    if index.csum() != entry.csum:
        raise ImageFormatError(
            path, 4096, "the digests are not those that the manifest vouches for"
        )
    return index


def zeros_digest(index: FixedIndex, key: CryptKey | None) -> bytes:
    """Return the digest of a whole chunk of zeros."""
    if key is None and index.chunk_size == CHUNK_SIZE:
        return _ZERO_DIGEST
    return chunk_digest(bytes(index.chunk_size), key)


def check_size(size: int, length: int, entry: FileEntry, path: str) -> None:
    """Check that the manifest means an index, by what its header says.

    Args:
        size: Of the image, in bytes.
        length: Of the index, in bytes.
        entry: What the manifest says.
        path: For messages.

    Raises:
        ImageFormatError: It means another one, or this one is too long.
    """
    if size != entry.size:
        reason = f"the manifest says {entry.size} bytes, the index {size}"
        raise ImageFormatError(path, 64, reason)
    if length > _INDEX_MAX:
        raise ImageFormatError(path, 64, f"the index has {length} bytes, more than {_INDEX_MAX}")


def digests_csum(digests: Buffer) -> bytes:
    """Return the checksum of digests that stand one behind the other."""
    from _hashlib import openssl_sha256

    return openssl_sha256(digests).digest()


def build(
    digests: Buffer, size: int, chunk_size: int = CHUNK_SIZE, *, uuid: bytes, ctime: int
) -> bytes:
    """Return the header of an index; the digests follow it in the file.

    Args:
        digests: All, one behind the other.
        size: Of the image, in bytes.
        chunk_size: Of the chunks, in bytes.
        uuid: 16 random bytes.
        ctime: Now, in Unix seconds.
    """
    assert memoryview(digests).nbytes == -(-size // chunk_size) * DIGEST_SIZE
    return _HEADER.pack(MAGIC, uuid, ctime, digests_csum(digests), size, chunk_size)
