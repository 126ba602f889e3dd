# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A disk image in a snapshot of a datastore."""

from __future__ import annotations

import os
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

from loopdev.errors import (
    ImageFormatError,
    ImageReadError,
    InvalidValueError,
    LoopdevError,
    ServerError,
)
from loopdev.images.pbs import blob
from loopdev.images.pbs.datastore import chunk_path, open_regular, read_all
from loopdev.images.pbs.keys import chunk_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from loopdev.images.pbs.index import FixedIndex
    from loopdev.images.pbs.keys import CryptKey
    from loopdev.kernel.fds import OwnedFd

_ENCODED_MAX = blob.CHUNK_MAX + blob.HEADER_MAX


class PbsImage:
    """An image made of chunks; see :class:`loopdev.images.Image`.

    Args:
        name: For messages.
        index: Which chunks; it stays its owner's.
        chunks: The directory of chunks; it is owned from here on.
        key: What the chunks are encrypted with.
        zero_digest: That of a whole chunk of zeros.
        locks: What is closed with the image.
    """

    cached = True
    streams = 1

    def __init__(
        self,
        name: str,
        index: FixedIndex,
        chunks: OwnedFd,
        key: CryptKey | None = None,
        zero_digest: bytes = b"",
        locks: tuple[OwnedFd, ...] = (),
    ) -> None:
        self.name, self.index = name, index
        self.size, self.block_size = index.size, index.chunk_size
        self._chunks, self._key, self._locks = chunks, key, locks
        self._zero_digest = zero_digest
        self._buffers: list[mmap] = []  # for encoded chunks; one for each thread, in the end
        self._last: tuple[int, bytearray] = (-1, bytearray())

    def read(self, offset: int, length: int) -> bytes:
        """Return *length* bytes from *offset* on, fewer where the image ends."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        if buffer:
            self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with what is at *offset*; whole blocks are put there without a copy."""
        if not 0 <= offset <= offset + len(buffer) <= self.size:
            raise InvalidValueError("offset", offset, "what is read must be within the image")
        done = 0
        while done < len(buffer):
            number, inside = divmod(offset + done, self.block_size)
            length = self.index.length(number)
            count = min(len(buffer) - done, length - inside)
            target = buffer[done : done + count]
            if count == length:
                self.read_chunk(number, target)
            else:
                target[:] = memoryview(self._whole(number, length))[inside : inside + count]
            done += count

    def _whole(self, number: int, length: int) -> bytearray:
        """Return a chunk of which a part is wanted; the next part will be, too."""
        last, data = self._last
        if last != number:
            data = bytearray(length)
            self.read_chunk(number, memoryview(data))
            self._last = (number, data)
        return data

    def read_chunk(self, number: int, target: memoryview, trust_zeros: bool = True) -> None:
        """Fill *target*, which is as long as the chunk, with a chunk that stood every check.

        Args:
            number: The first chunk is number 0.
            target: A writable buffer; after an error, what is in it is undefined.
            trust_zeros: Believe the index where it says zeros, and read nothing.

        Raises:
            ImageReadError: The chunk is missing or damaged.
        """
        digest = self.index.digest(number)
        if trust_zeros and self._is_zero_chunk(number, digest):
            target[:] = bytes(len(target))
            return
        try:
            self._load(digest, target)
        except (ImageFormatError, ServerError, OSError) as exc:
            reason = f"chunk {digest.hex()}: {_reason(exc)}"
            start = number * self.block_size
            raise ImageReadError(self.name, start, len(target), reason) from exc

    def _load(self, digest: bytes, target: memoryview) -> None:
        with open_regular(chunk_path(digest), self._chunks.fileno()) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _ENCODED_MAX:
                raise ImageFormatError(None, 0, f"has {size} bytes, more than a chunk can have")
            buffer = self._take_buffer(size)
            data = memoryview(buffer)[:size]
            data = data[: read_all(file, data)]
        self._decode(data, digest, target)
        self._buffers.append(buffer)

    def _decode(self, data: memoryview, digest: bytes, target: memoryview) -> None:
        blob.decode_into(data, target, self._key)
        if chunk_digest(target, self._key) != digest:
            raise ImageFormatError(None, 0, "has the content of another chunk")

    def _take_buffer(self, size: int) -> mmap:
        # Memory that was used before spares the kernel to clear it.
        try:
            buffer = self._buffers.pop()
        except IndexError:
            return _huge_buffer(max(size, self.block_size))
        return buffer if len(buffer) >= size else _huge_buffer(size)

    def is_zero(self, offset: int, length: int) -> bool:
        """Return whether the index says that a range is zeros."""
        first, last = offset // self.block_size, (offset + length - 1) // self.block_size
        return all(
            self._is_zero_chunk(number, self.index.digest(number))
            for number in range(first, last + 1)
        )

    def _is_zero_chunk(self, number: int, digest: bytes) -> bool:
        return digest == self._zero_digest and self.index.length(number) == self.block_size

    def fileno(self) -> None:
        """Return None: no file has these bytes."""
        return

    @property
    def ahead(self) -> int:
        """How many blocks to have under way for who reads in order: it is not far to them."""
        return 0

    def serve(self, timeout: float, say: Callable[[str], None], first: bool) -> None:
        """Do nothing: it is all here."""

    def close(self) -> None:
        """Close what is open; the snapshot may be removed then."""
        self._chunks.close()
        for lock in self._locks:
            lock.close()
        self._last = (-1, bytearray())
        self._buffers.clear()


def _huge_buffer(size: int) -> mmap:
    buffer = mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)
    try:
        buffer.madvise(MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel that has none
    return buffer


def _reason(exc: Exception) -> str:
    if isinstance(exc, FileNotFoundError):
        return "is missing"
    if isinstance(exc, ImageFormatError):
        return exc.reason
    return str(exc) if isinstance(exc, LoopdevError) else getattr(exc, "strerror", "") or str(exc)


def load_key(keyfile: str | None) -> CryptKey | None:
    """Return the key in a file, ready for use; None: there is no file."""
    if keyfile is None:
        return None
    from loopdev.images.pbs.passwords import load_key_file

    key = load_key_file(keyfile)
    key.prepare()
    return key
