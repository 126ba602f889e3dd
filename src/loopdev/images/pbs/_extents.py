# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Which chunks of an image may hold something other than zeros."""

from __future__ import annotations

import errno
import os

from loopdev.images.pbs.index import CHUNK_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from loopdev.images import Image


def chunks_to_read(image: Image) -> Iterator[int]:
    """Return the numbers of the chunks to read; each of the others is a whole one in a hole.

    A short chunk at the end is always read: it has a digest of its own, zeros or not.
    """
    whole, short = divmod(image.size, CHUNK_SIZE)
    fd = image.fileno()
    if fd is None:
        yield from (n for n in range(whole) if not image.is_zero(n * CHUNK_SIZE, CHUNK_SIZE))
    else:
        yield from _with_data(fd, whole)
    if short:
        yield whole


def _with_data(fd: int, count: int) -> Iterator[int]:
    """Return which of the first *count* chunks of a file have data in them."""
    number = 0
    while number < count:
        try:
            start = os.lseek(fd, number * CHUNK_SIZE, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return  # a hole from here to the end
            # Not every filesystem or device knows its holes: the rest is data.
            start, end = number * CHUNK_SIZE, count * CHUNK_SIZE
        first = start // CHUNK_SIZE
        number = min(-(-end // CHUNK_SIZE), count)
        yield from range(first, number)
