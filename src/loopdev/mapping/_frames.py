# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Who gets which frame of a cache: a clock with one use bit.

The rules that make this safe are in the docstring of :mod:`loopdev.mapping._cache`.
"""

from __future__ import annotations

from loopdev.kernel import membarrier
from loopdev.mapping._cachetable import EVICTIONS, FILLS, FRESH, HAND, READERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.mapping._bytelocks import ByteLocks
    from loopdev.mapping._cachetable import Table


class Frames:
    """The frames, as one worker sees them."""

    def __init__(self, table: Table, locks: ByteLocks) -> None:
        self._table = table
        self._locks = locks
        # The bytes below are the locks of the blocks.
        self._eviction_lock = table.geometry.blocks

    def life_lock(self, worker: int) -> int:
        """Return the lock that a worker holds while it lives."""
        return self._eviction_lock + 1 + worker

    def clear_pins(self, worker: int) -> None:
        """Take away the pins of a dead worker, whose life lock the caller holds."""
        for slot in range(worker * READERS, (worker + 1) * READERS):
            self._table.pins[slot] = 0

    def take(self, block: int, deadline: float | None) -> int | None:
        """Make a frame the property of *block*, whose lock the caller holds and which is absent.

        Returns:
            The frame, or None when all are in use, or the deadline passed.
        """
        if not self._locks.acquire(self._eviction_lock, deadline):
            return None
        try:
            return self._sweep(block)
        finally:
            self._locks.release(self._eviction_lock)

    def give_back(self, frame: int, deadline: float | None) -> None:
        """Make a frame that could not be filled the next to be taken.

        Else a damaged block that is read again and again would drive all others out. The caller
        holds the lock of the frame's block.
        """
        if not self._locks.acquire(self._eviction_lock, deadline):
            return  # the hand will come by
        try:
            self._table.counters[HAND] = frame - 1
        finally:
            self._locks.release(self._eviction_lock)

    def _sweep(self, block: int) -> int | None:
        table, count = self._table, self._table.geometry.frames
        # As long as there are frames that nobody had, nothing has to make way.
        if table.counters[FRESH] < count:
            table.counters[FRESH] += 1
            if self._make_way(table.counters[FRESH], block):
                table.counters[FILLS] += 1
                return table.counters[FRESH]
        # The first round may find all of them used.
        for _ in range(2 * count):
            frame = table.counters[HAND] % count + 1
            table.counters[HAND] = frame
            if table.used[frame]:
                table.used[frame] = 0
            elif self._make_way(frame, block):
                table.counters[FILLS] += 1
                return frame
        return None

    def _make_way(self, frame: int, block: int) -> bool:
        owner = self._table.owners[frame] - 1
        if owner in (-1, block):
            return self._change_owner(frame, owner, block)
        if not self._locks.try_acquire(owner):
            return False  # it is being filled
        try:
            return self._change_owner(frame, owner, block)
        finally:
            self._locks.release(owner)

    def _change_owner(self, frame: int, owner: int, block: int) -> bool:
        table = self._table
        held = owner >= 0 and table.places[owner] == frame
        if held:
            table.places[owner] = 0
        membarrier.barrier()
        if self._is_pinned(frame):
            if held:
                table.places[owner] = frame
            return False
        membarrier.barrier()
        table.owners[frame] = block + 1
        table.counters[EVICTIONS] += held
        return True

    def _is_pinned(self, frame: int) -> bool:
        pins = self._table.pins.tolist()
        return frame in pins and any(
            not self._bury(slot // READERS) for slot, pin in enumerate(pins) if pin == frame
        )

    def _bury(self, worker: int) -> bool:
        # Clear the pins of a worker if it is dead, and return whether it is.
        lock = self.life_lock(worker)
        if not self._locks.try_acquire(lock):
            return False
        try:
            self.clear_pins(worker)
        finally:
            self._locks.release(lock)
        return True
