# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The memory that the processes of a cache share, and where in it what is.

Everything is an integer of its natural alignment, which the processor reads and writes as one.
Nothing is allocated before it is written, except where a lookup reads a page of ``places``.
"""

from __future__ import annotations

from loopdev._value import Value
from loopdev.kernel import futex
from loopdev.kernel.hugepages import HUGE_PAGE, SharedMemory

# How many threads of one worker can read.
READERS = 64

# Indices of ``counters``
HAND = 0
FILLS = 1
EVICTIONS = 2
FRESH = 3  # frames that were ever taken

_PAGE = 4096


class Geometry(Value):
    """The measures of a cache.

    Attributes:
        size: The image's, in bytes.
        block_size: Bytes; a power of two.
        blocks: How many the image has.
        frames: How many blocks are held at most.
        workers: How many processes there are.
    """

    size: int
    block_size: int
    blocks: int
    frames: int
    workers: int


class Table:
    """What is where, and who uses it. Frames count from 1, so that 0 says: none.

    Attributes:
        counters: The clock's hand, the fills begun and the evictions, under the lock of eviction.
        pins: For each of the READERS of each worker, the frame it reads.
        owners: For each frame, the block that it was given to last, plus 1; under the same lock.
        used: For each frame, 1 if it was read since the hand passed.
        made: For each frame, 1 when it has its memory.
        places: For each block, the frame that holds it; 0 when it is absent.
        mapped: For each frame, 1 if this process has touched all of its pages; not shared.
        data: The frames, one behind the other; frame 0 is never touched.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        sizes = (
            8 * 4,
            4 * READERS * geometry.workers,
            8 * (geometry.frames + 1),
            geometry.frames + 1,
            geometry.frames + 1,
            4 * geometry.blocks,
        )
        starts, end = _layout(sizes)
        self._table = SharedMemory(end)
        table = self._table.data
        parts = [table[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        self.counters = parts[0].cast("Q")
        self.pins = parts[1].cast("I")
        self.owners = parts[2].cast("Q")
        self.used = parts[3]
        self.made = parts[4]
        self.places = parts[5].cast("I")
        self._places_address = self._table.address + starts[5]
        self._memory = SharedMemory((geometry.frames + 1) * geometry.block_size)
        self.mapped = bytearray(geometry.frames + 1)
        self.data = self._memory.data

    def frame(self, frame: int) -> memoryview:
        """Return the bytes of a frame, for who owns it and is to fill it."""
        size = self.geometry.block_size
        if not self.made[frame] and size % HUGE_PAGE == 0:
            self._memory.make(frame * size, size)
            self.made[frame] = 1
        return self.data[frame * size : (frame + 1) * size]

    def wait(self, block: int, seconds: float) -> None:
        """Wait until an absent block may be there, for *seconds* at most."""
        futex.wait(self._places_address + 4 * block, 0, seconds)

    def wake(self, block: int) -> None:
        """Wake who waits for a block."""
        futex.wake(self._places_address + 4 * block)

    def close(self) -> None:
        """Unmap it: no part of the table can be used any more."""
        views = (self.counters, self.pins, self.owners, self.used, self.made, self.places)
        for view in views:
            view.release()
        self._table.close()
        self._memory.close()


def _layout(sizes: tuple[int, ...]) -> tuple[list[int], int]:
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // _PAGE) * _PAGE
    return starts, end
