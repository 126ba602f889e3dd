# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""How a worker gets the bytes that it is asked for: from a descriptor, or through the cache."""

from __future__ import annotations

import _thread
import errno
import os
import time

from loopdev.errors import ImageReadError
from loopdev.fuse.pool import Pool
from loopdev.mapping._ahead import Window

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from loopdev.fuse.server import Buffers
    from loopdev.images import Image
    from loopdev.mapping._cache import Cache
    from loopdev.mapping._cachereader import Reader

    Report = Callable[[int, ImageReadError], None]

# The largest READ that the kernel sends.
_LARGEST = 1 << 20
_ZEROS = memoryview(bytes(_LARGEST))
# <linux/fs.h>, Linux 4.14: EAGAIN instead of waiting for a disk.
_RWF_NOWAIT = 8
# How long to wait for a free frame, to read ahead; in seconds.
_PATIENCE = 1.0
# The block that is read before anybody asks for it: by worker 0, for whom the supervisor keeps it.
FIRST = 0
# Blocks to read ahead for each worker: enough that it always has one to decode.
_AHEAD = 2


class PlainReader:
    """Reads an image that is a descriptor; the kernel's page cache is its cache.

    Args:
        image: The image.
        report: Is told of what cannot be read.
    """

    def __init__(self, image: Image, report: Report) -> None:
        fd = image.fileno()
        assert fd is not None
        self._image, self._fd, self._size, self._report = image, fd, image.size, report
        self._buffer = memoryview(bytearray(_LARGEST))
        self._flags = _RWF_NOWAIT

    def at_once(self, offset: int, size: int) -> Buffers | None:
        """Return bytes that are in the page cache."""
        buffer = self._buffer[:size]
        try:
            if os.preadv(self._fd, (buffer,), offset, self._flags) == size:
                return [buffer]
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                # This filesystem cannot tell what would wait, so everything might.
                self.at_once = self._never  # type: ignore[method-assign]
        return None

    def begin(self) -> None:
        """Do nothing: the kernel reads ahead."""

    @property
    def busy(self) -> bool:
        """False: nothing is read ahead."""
        return False

    def _never(self, offset: int, size: int) -> None:  # noqa: ARG002
        return None

    def wait(self, offset: int, size: int, deadline: float) -> Buffers:  # noqa: ARG002
        """Read, for as long as it takes."""
        try:
            data = self._image.read(offset, min(size, self._size - offset))
        except ImageReadError as exc:
            self._report(offset, exc)
            raise
        return [data, _ZEROS[: size - len(data)]]

    def sent(self) -> None:
        """Do nothing: the buffer is only used by the loop."""

    def done(self) -> None:
        """Do nothing: what wait() returned belongs to who called it."""


class CachedReader:
    """Reads an image through the cache of decoded blocks, and ahead of who reads in order.

    Args:
        image: The image.
        cache: The cache, entered.
        report: Is told of what cannot be read.
        workers: How many processes read it.
    """

    def __init__(self, image: Image, cache: Cache, report: Report, workers: int) -> None:
        self._image, self._cache, self._report = image, cache, report
        self._shift = image.block_size.bit_length() - 1
        self._blocks = -(-image.size // image.block_size)
        self._workers = workers
        self._window = Window(self._blocks, _AHEAD * workers)
        # One thread where nothing is far away: decoding several blocks at a time would make who
        # waits for the first of them wait for all.
        self._ahead_pool = Pool(image.streams)
        self._mine = cache.reader()  # the loop's; each thread of the pool has its own
        self._read, self.sent = self._mine.read, self._mine.done
        self._local = _thread._local()
        bytes(_ZEROS[::4096])  # touched, as the frames of the cache are; see Reader there

    def at_once(self, offset: int, size: int) -> Buffers | None:
        """Return bytes that are in the cache, or zeros that no cache needs to hold."""
        block = offset >> self._shift
        if block != self._window.block:
            self._moved(block)
        view = self._read(offset, size)
        if view is not None:
            return [view]
        length = min(size, self._image.size - offset)
        if self._image.is_zero(offset, length):
            return [_ZEROS[:size]]
        return None

    def wait(self, offset: int, size: int, deadline: float) -> Buffers:
        """Have the blocks put into the cache, and read them from there, one after the other.

        So it needs no more than one frame at a time, however many blocks there are.
        """
        reader, block_size = self._reader(), 1 << self._shift
        if (offset & block_size - 1) + size <= block_size:
            return [self._part(reader, offset, size, deadline)]
        joined, at = reader.join(size), 0
        while at < size:
            here = min(size - at, block_size - (offset + at & block_size - 1))
            joined[at : at + here] = self._part(reader, offset + at, here, deadline)
            reader.done()
            at += here
        return [joined]

    def _part(self, reader: Reader, offset: int, size: int, deadline: float) -> memoryview:
        """Return a range in one block, which stays until the reader is done with it."""
        while (view := reader.read(offset, size)) is None:
            self._fill(offset >> self._shift, deadline, reader=reader)
            if time.monotonic() > deadline and (view := reader.read(offset, size)) is None:
                raise TimeoutError(errno.ETIMEDOUT, "the cache has no room for long enough")
        return view

    def done(self) -> None:
        """Let the block of this thread's last read go."""
        self._reader().done()

    def _reader(self) -> Reader:
        try:
            reader: Reader = self._local.reader
        except AttributeError:
            reader = self._local.reader = self._cache.reader()
        return reader

    def _fill(
        self, block: int, deadline: float, leave: bool = False, reader: Reader | None = None
    ) -> None:
        start = block << self._shift

        def produce(view: memoryview) -> None:
            self._image.read_into(start, view)

        try:
            self._cache.fill(block, produce, deadline, leave, reader)
        except ImageReadError as exc:
            self._report(start, exc)
            raise

    def begin(self) -> None:
        """Read the first block, which whoever attaches a device looks at: for a partition table."""
        self._ahead_pool.run(self._fill_first)

    def _fill_first(self) -> None:
        try:
            self._fill_ahead(FIRST)
        finally:
            self._cache.let_go(FIRST)

    @property
    def busy(self) -> bool:
        """Whether blocks are being read ahead."""
        return self._ahead_pool.busy

    def _moved(self, block: int) -> None:
        """Read ahead, if who reads goes from block to block."""
        # Half of the cache is for what is read, however small it is.
        most = min(max(self._image.ahead, _AHEAD * self._workers), self._cache.capacity // 2)
        for number in self._window.move(block, not self._cache.present(block), max(1, most)):
            if not self._cache.present(number):
                self._ahead_pool.run(lambda number=number: self._fill_ahead(number))  # type: ignore[misc]

    def _fill_ahead(self, block: int) -> None:
        start = block << self._shift
        if self._cache.present(block) or self._image.is_zero(start, 1):
            return
        try:
            self._fill(block, time.monotonic() + _PATIENCE, leave=True)
        except OSError:
            pass  # whoever asks for it will be told
