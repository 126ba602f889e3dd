# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Zstandard frames: one in, one out, and never more than was allowed."""

from __future__ import annotations

import sys

from loopdev.errors import MissingExtraError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

    from loopdev.images.pbs.blob import Readable

_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK_MAX = 128 << 10
_RLE, _RESERVED = 1, 3
# What a decoder may need beside its output. Level 19 needs 8 MiB; a frame that asks for more than
# this was made to hurt.
_WINDOW_MAX = 16 << 20

_module: ModuleType | None = None


class FrameError(Exception):
    """It is not one whole frame, or holds more than allowed."""


def backend() -> ModuleType:
    """Return zstandard, or the C half of it.

    The package's face imports typing and platform, which costs more than starting the
    interpreter; nothing here needs it.
    """
    global _module  # noqa: PLW0603
    if _module is None:
        _module = sys.modules.get("zstandard") or _load()
    return _module


def _load() -> ModuleType:
    # Where importlib.machinery has it from; that itself costs half a millisecond to import.
    from _frozen_importlib_external import PathFinder

    try:
        package = PathFinder.find_spec("zstandard")
        name = "zstandard.backend_c"
        spec = package and PathFinder.find_spec(name, package.submodule_search_locations)
        if spec is not None and spec.loader is not None:
            module = spec.loader.create_module(spec)
            if module is not None:
                spec.loader.exec_module(module)
                return module
        import zstandard
    except ImportError as exc:
        raise MissingExtraError("pbs") from exc
    return zstandard


def compress(data: Readable, level: int) -> bytes:
    """Return *data* as one frame that tells its size."""
    frame: bytes = backend().ZstdCompressor(level=level).compress(data)
    return frame


def decompress(frame: Readable, limit: int) -> bytes:
    """Return what is in a frame.

    Args:
        frame: One whole frame and nothing after it.
        limit: The most that may come out, in bytes; not more than that is allocated.

    Raises:
        FrameError: It is no such frame, or there is more in it.
    """
    zstd = backend()
    told, most = _measure(zstd, frame)
    # zstandard allocates what the frame tells, whatever the limit is.
    if told is not None and told > limit:
        raise FrameError(f"decompresses to more than {limit} bytes")
    if told is not None and told > most:
        raise FrameError("tells a size that it cannot have")
    try:
        data: bytes = _decompressor(zstd).decompress(frame, max_output_size=min(limit, most) or 1)
    except zstd.ZstdError as exc:
        more = f", or to more than {limit} bytes" if most > limit else ""
        raise FrameError(f"does not decompress{more}") from exc
    if len(data) > limit:
        raise FrameError(f"decompresses to more than {limit} bytes")
    return data


def decompress_into(frame: Readable, buffer: memoryview) -> None:
    """Fill *buffer* with what is in a frame, which must be exactly that much.

    Raises:
        FrameError: It is no whole frame, or what is in it is of another size.
    """
    zstd = backend()
    told, most = _measure(zstd, frame)
    if told not in (None, len(buffer)) or most < len(buffer):
        raise FrameError(f"decompresses to another size than {len(buffer)} bytes")
    try:
        # With a read size of all, one call does it; the default would be one call for 128 KiB.
        reader = _decompressor(zstd).stream_reader(frame, read_size=len(frame))
        count = reader.readinto(buffer) if buffer else 0
        rest = reader.read(1)
    except zstd.ZstdError as exc:
        raise FrameError("does not decompress") from exc
    if count != len(buffer) or rest:
        raise FrameError(f"decompresses to another size than {len(buffer)} bytes")


def _decompressor(zstd: ModuleType) -> Any:
    return zstd.ZstdDecompressor(max_window_size=_WINDOW_MAX)


def _measure(zstd: ModuleType, frame: Readable) -> tuple[int | None, int]:
    """Return the size that a frame tells (None: it does not), and the most it can decompress to.

    Walks over the blocks' headers to find where the frame ends: the decoder says neither that
    there are bytes behind it nor, before it is done, that some are missing.
    """
    if bytes(frame[:4]) != _MAGIC:
        raise FrameError("is no zstd frame")
    try:
        header = zstd.get_frame_parameters(frame)
        position = int(zstd.frame_header_size(frame))
    except zstd.ZstdError as exc:
        raise FrameError("has a bad zstd frame header") from exc
    blocks, last = 0, False
    while not last:
        word = int.from_bytes(frame[position : position + 3], "little")
        last, kind, size = bool(word & 1), word >> 1 & 3, word >> 3
        position += 3 + (1 if kind == _RLE else size)
        if kind == _RESERVED or position > len(frame):
            raise FrameError("is cut off, or no zstd frame")
        blocks += 1
    if position + (4 if header.has_checksum else 0) != len(frame):
        raise FrameError("is cut off, or has bytes after its zstd frame")
    told = header.content_size
    return (None if told >= 1 << 63 else told), blocks * _BLOCK_MAX
