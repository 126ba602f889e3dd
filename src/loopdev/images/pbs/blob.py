# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""DataBlob: what every chunk file and every ``*.blob`` file is.

Source: pbs-datastore/src/{file_formats,data_blob}.rs.
"""

from __future__ import annotations

import struct
import zlib

from loopdev.errors import ImageFormatError
from loopdev.images.pbs import _zstd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from loopdev.images.pbs.keys import CryptKey

    Readable = bytes | bytearray | memoryview

# Each is the first 8 bytes of the SHA-256 of a sentence, "Proxmox Backup uncompressed blob v1.0".
PLAIN = bytes.fromhex("42ab3807be8370a1")
ZSTD = bytes.fromhex("31b958426fb6a37f")
ENCRYPTED = bytes.fromhex("7b6785be222d4cf0")
ENCRYPTED_ZSTD = bytes.fromhex("e6591bbf0bbfd80b")

_HEADER = struct.Struct("<8sI")  # magic, CRC-32 of all that follows the header
_ENCRYPTED_HEADER = struct.Struct("<8sI16s16s")  # also the IV and the GCM tag
HEADER_MAX = _ENCRYPTED_HEADER.size
PAYLOAD_MAX = 128 << 20
CHUNK_MAX = 16 << 20
LEVEL = 1


def decode(
    data: Readable, key: CryptKey | None = None, limit: int = PAYLOAD_MAX, path: str | None = None
) -> bytes:
    """Return the payload of a blob.

    Args:
        data: The whole blob.
        key: The key; None: the blob must not be encrypted. With a key it must be.
        limit: The most that it may decompress to, in bytes.
        path: Its name, for messages.

    Raises:
        ImageFormatError: It is damaged, of the other mode, too big, or of another key.
    """
    payload, compressed = _unwrap(data, key, path)
    if compressed:
        try:
            return _zstd.decompress(payload, limit)
        except _zstd.FrameError as exc:
            raise ImageFormatError(path, _start(key), f"the payload {exc}") from exc
    if len(payload) > limit:
        raise ImageFormatError(path, _start(key), f"the payload has more than {limit} bytes")
    return bytes(payload)


def decode_into(
    data: Readable, buffer: memoryview, key: CryptKey | None = None, path: str | None = None
) -> None:
    """Fill *buffer* with the payload of a blob, which must be exactly that long.

    What is in the buffer after an error is undefined. Arguments and errors are those of
    :func:`decode`.
    """
    payload, compressed = _unwrap(data, key, path)
    if compressed:
        try:
            _zstd.decompress_into(payload, buffer)
        except _zstd.FrameError as exc:
            raise ImageFormatError(path, _start(key), f"the payload {exc}") from exc
    elif len(payload) != len(buffer):
        reason = f"the payload has {len(payload)} bytes, not {len(buffer)}"
        raise ImageFormatError(path, _start(key), reason)
    else:
        buffer[:] = payload


def _start(key: CryptKey | None) -> int:
    return _HEADER.size if key is None else _ENCRYPTED_HEADER.size


def _unwrap(data: Readable, key: CryptKey | None, path: str | None) -> tuple[Readable, bool]:
    """Check and decrypt; return the payload, and whether it is compressed."""

    def bad(offset: int, reason: str) -> NoReturn:
        raise ImageFormatError(path, offset, reason)

    if len(data) < _HEADER.size:
        bad(0, f"a blob has at least {_HEADER.size} bytes, this has {len(data)}")
    magic, crc = _HEADER.unpack_from(data)
    encrypted = magic in (ENCRYPTED, ENCRYPTED_ZSTD)
    if not encrypted and magic not in (PLAIN, ZSTD):
        bad(0, f"no blob has the magic number {magic.hex()}")
    header = _ENCRYPTED_HEADER if encrypted else _HEADER
    if len(data) < header.size:
        bad(0, f"an encrypted blob has at least {header.size} bytes, this has {len(data)}")
    body = memoryview(data)[header.size :]
    if zlib.crc32(body) != crc:
        bad(8, "the checksum is wrong")
    if encrypted and key is None:
        bad(0, "is encrypted, which it should not be")
    if key is None:
        return body, magic == ZSTD
    if not encrypted:
        bad(0, "is not encrypted, as it should be")
    *_, iv, tag = header.unpack_from(data)
    plain = key.decrypt(iv, tag, body)
    if plain is None:
        bad(28, "the authentication tag is wrong: another key, or damage")
    return plain, magic == ENCRYPTED_ZSTD


def encode(data: Readable, key: CryptKey | None = None, level: int = LEVEL) -> bytes:
    """Return a blob of *data*.

    Args:
        data: The payload.
        key: Encrypt with this.
        level: Of zstd; 0: don't compress. Compression is kept only where it makes it smaller.
    """
    return b"".join(encode_parts(data, key, level))


def encode_parts(
    data: Readable, key: CryptKey | None = None, level: int = LEVEL
) -> tuple[bytes, Readable]:
    """Return a blob of *data* as header and body, for who writes both without joining them."""
    body: Readable = data
    compressed = False
    if level and data:
        frame = _zstd.compress(data, level)
        if len(frame) < len(data):
            body, compressed = frame, True
    if key is None:
        return _HEADER.pack(ZSTD if compressed else PLAIN, zlib.crc32(body)), body
    iv, tag, body = key.encrypt(body)
    magic = ENCRYPTED_ZSTD if compressed else ENCRYPTED
    return _ENCRYPTED_HEADER.pack(magic, zlib.crc32(body), iv, tag), body
