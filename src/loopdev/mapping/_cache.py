# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The cache of decoded blocks that the worker processes of one map share.

The blocks live in frames, a fixed number of block-sized places in shared memory, and a table says
which block is in which frame (:mod:`loopdev.mapping._cachetable`). Frames, and not a sparse file
with the image's own offsets: a frame that is used again needs no fresh pages from the kernel
(which cost 1.7 ms for 4 MiB, decoding takes about 5), no page tables grow with the image, and the
limit cannot be passed, whoever is killed when.

Two kinds of locks, which a process loses when it dies: one for each block, held by who fills or
evicts it, and one of eviction. The rules:

1. ``owners[f]`` changes to b + 1 only under the lock of eviction, by who holds the locks of b and
   of the block that owned f before.
2. ``places[b]`` changes only under the lock of b: to f by who owns f for b, after the data are
   whole, and to 0 before f gets another owner.
3. The bytes of f change only by who holds the lock of b while f is owned by b and
   ``places[b] != f``.

So nobody writes where somebody else writes, and a block is never held twice. Nothing needs a
repair when a process is killed at any point: its locks are free; a frame that it owned, filled or
half filled, is one whose owner's place is elsewhere or nowhere, and the clock takes it as it comes
by; it was counted all the time.

Readers take no lock. To read block b, a reader loads f = ``places[b]``, stores f in its own pin,
loads ``places[b]`` again, and goes on only if that is f still; when it is done it clears the pin.
Who evicts f stores ``places[b] = 0``, executes a barrier, and looks at all pins: if one is f, it
stores ``places[b] = f`` again (nothing has happened) and tries another frame. Else it executes one
more barrier, and f is its own. Who has filled f executes a barrier before it stores the place. A
barrier is membarrier(2): each thread of each worker executes a full memory barrier at some point
in it. (The interpreter does not reorder what a program says; processors do.) Then:

- A reader that goes on is seen. Its thread passes the first barrier at a point P. Was P before its
  second load, then that load saw ``places[b] == 0``, and it did not go on (or it saw a place that
  was stored later, when f was filled again: of that, the same is true). Was P after it, then also
  after the store to the pin, which who evicts has therefore seen, unless it is cleared.
- A reader that is done is done. Was its pin seen cleared, then the store that cleared it lies
  before the point where it passes the second barrier, and so do its loads from f: they are over
  before f is written.
- A reader that sees f sees its data. The loads of the place that give f come after the barrier that
  followed the last byte written, and the loads from f come after them: no thread can have executed
  them before that barrier, unless it loaded the place before it, too, and did not see f.

Who has filled a block may pin its frame for itself before it lets the lock of the block go: who
evicts it has that lock afterwards, and so sees the pin.

Who waits for a block that another one fills sleeps on its place (futex(2)), and is woken when that
has ended, well or not. A death wakes nobody, so it looks for itself now and then, too.

A pin of a worker that is dead is in nobody's way: each worker holds a third kind of lock while it
lives, and who finds a pinned frame tries to take that. A worker that is stopped keeps its pins, a
frame each, and its locks; others wait for those till their deadline, which hurts all fills only if
it was stopped within the microseconds in which it evicts.
"""

from __future__ import annotations

import math
import os
import time

from loopdev._backoff import backoff
from loopdev._value import Value
from loopdev.errors import InvalidValueError, WaitTimeoutError
from loopdev.kernel import membarrier
from loopdev.kernel.fds import OwnedFd
from loopdev.mapping._bytelocks import ByteLocks
from loopdev.mapping._cachereader import Reader
from loopdev.mapping._cachetable import EVICTIONS, FILLS, READERS, Geometry, Table
from loopdev.mapping._frames import Frames

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SMALLEST_BLOCK = 4096
# How long a worker's predecessor may take to be gone, in seconds.
_SUCCESSION = 10.0
# How often to look whether who fills a block is dead, which wakes nobody, in seconds.
_LONGEST_WAIT = 0.02


class CacheStats(Value):
    """What a cache holds and has done.

    Attributes:
        blocks: How many are present.
        bytes: The memory of the blocks, whole or not: once it was used, a frame keeps its own.
        limit: What that can be at most.
        fills: How many were begun.
        evictions: How many blocks made way for another.
    """

    blocks: int
    bytes: int
    limit: int
    fills: int
    evictions: int


class Cache:
    """Decoded blocks of one image. See :meth:`create`."""

    def __init__(self, table: Table, lock_file: OwnedFd) -> None:
        self._table, self._lock_file = table, lock_file
        self._geometry = table.geometry
        self._places = table.places
        self._readers = range(0)
        self._locks: ByteLocks | None = None
        self._reserved: ByteLocks | None = None

    @classmethod
    def create(cls, size: int, block_size: int, limit: int, workers: int) -> Cache:
        """Make an empty cache, which takes no memory until it is used; before the fork.

        Args:
            size: The image's, in bytes.
            block_size: Bytes; a power of two.
            limit: How many bytes of blocks to hold, in whole blocks; at least one for each worker
                and one more are held.
            workers: How many processes will use it, at one time.

        Raises:
            InvalidValueError: A number is out of its range.
        """
        if size < 1:
            raise InvalidValueError("size", size, "must be at least 1")
        if block_size < _SMALLEST_BLOCK or block_size & (block_size - 1):
            raise InvalidValueError("block_size", block_size, "must be a power of 2 from 4096 on")
        if workers < 1:
            raise InvalidValueError("workers", workers, "must be at least 1")
        blocks = -(-size // block_size)
        frames = min(blocks, max(limit // block_size, workers + 1))
        geometry = Geometry(
            size=size, block_size=block_size, blocks=blocks, frames=frames, workers=workers
        )
        file = os.memfd_create("loopdev-cache-locks", os.MFD_CLOEXEC)
        lock_file = OwnedFd(file, "the locks of the cache")
        try:
            return cls(Table(geometry), lock_file)
        except BaseException:
            lock_file.close()
            raise

    @property
    def capacity(self) -> int:
        """How many blocks it can hold."""
        return self._geometry.frames

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors that have to stay open, as long as workers may be forked."""
        return (self._lock_file.fileno(),)

    def reserve(self, block: int) -> None:
        """Leave the first fill of a block to the worker that is forked next, while it lives.

        So none of the others gets what that one has under way already. Right after the fork,
        :meth:`let_go` is to be called here; there, if it does not fill the block.
        """
        reserved = self._open_locks()
        try:
            reserved.reserve(block)
        except BaseException:
            reserved.close()
            raise
        self._reserved = reserved

    def let_go(self, block: int) -> None:
        """Let go what is reserved still, in the process that reserved it or in that worker."""
        reserved, self._reserved = self._reserved, None
        if reserved is not None:
            reserved.close()
        elif self._locks is not None and self._locks.try_acquire(block):
            self._locks.release(block)
            self._table.wake(block)

    def enter(self, worker: int) -> None:
        """Begin to use the cache as *worker*, right after the fork and before any thread starts.

        Args:
            worker: Its number, from 0 on; that of a dead one if it takes its place.

        Raises:
            WaitTimeoutError: Another process is this worker and lives.
            KernelError: ENOSYS, EPERM: there is no membarrier(2).
        """
        membarrier.register()
        locks, self._reserved = self._reserved or self._open_locks(), None
        frames = Frames(self._table, locks)
        if not locks.acquire(frames.life_lock(worker), time.monotonic() + _SUCCESSION):
            locks.close()
            raise WaitTimeoutError("the cache", f"worker {worker} is still alive", _SUCCESSION)
        frames.clear_pins(worker)
        self._locks, self._frames = locks, frames
        self._readers = range(worker * READERS, (worker + 1) * READERS)

    def _open_locks(self) -> ByteLocks:
        # A description of its own, for the locks of one process.
        path = f"/proc/self/fd/{self._lock_file.fileno()}"
        return ByteLocks(OwnedFd.open(path, os.O_RDWR))

    def reader(self) -> Reader:
        """Return what one thread of this worker reads with; each has its own.

        Raises:
            InvalidValueError: This worker has too many of them.
        """
        if not self._readers:
            raise InvalidValueError("readers", READERS, "no more of them, and only in a worker")
        slot, self._readers = self._readers[0], self._readers[1:]
        return Reader(self._table, slot)

    def present(self, block: int) -> bool:
        """Return whether a block is held at this moment."""
        return self._places[block] != 0

    def filling(self, block: int) -> bool:
        """Return whether somebody fills a block at this moment (or evicts it: this is a hint)."""
        return self._worker_locks().is_held(block)

    def fill(
        self,
        block: int,
        produce: Callable[[memoryview], None],
        deadline: float | None = None,
        leave: bool = False,
        reader: Reader | None = None,
    ) -> None:
        """Make a block present, or wait until another thread or process has.

        It can be evicted again at any time, so this and a read are tried in turn.

        Args:
            block: Its number.
            produce: Writes every byte of the view it is given, which is the block's length and
                ends with the image; it must not use the view afterwards. What it raises passes,
                and the block stays absent.
            deadline: In seconds of :func:`time.monotonic`; None waits for ever. It does not
                interrupt *produce*.
            leave: If others fill this block already, leave it to them and return.
            reader: If this thread has filled it, the block stays for this reader of its, as if it
                had read it, until :meth:`Reader.done`. Without that, where there are more threads
                than frames, another one can take it away before it is read, again and again.

        Raises:
            WaitTimeoutError: The deadline passed while others filled this block or had all
                frames. It is a TimeoutError.
        """
        begin, locks = time.monotonic(), self._worker_locks()
        while not self._places[block]:
            if locks.try_acquire(block):
                try:
                    if not self._places[block]:
                        self._fill(block, produce, deadline, begin)
                    if leave:
                        # It was read ahead: unread as it is, it would be the next to make way.
                        self._table.used[self._places[block]] = 1
                    elif reader is not None:
                        reader.hold(block)
                finally:
                    locks.release(block)
                    self._table.wake(block)
                return
            if leave:
                return
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise self._late(block, begin)
            self._table.wait(block, min(left, _LONGEST_WAIT))

    def stats(self) -> CacheStats:
        """Count what is held; in any process that has the cache."""
        table, geometry = self._table, self._geometry
        owners = [(frame, owner) for frame, owner in enumerate(table.owners.tolist()) if owner]
        return CacheStats(
            blocks=sum(table.places[owner - 1] == frame for frame, owner in owners),
            bytes=len(owners) * geometry.block_size,
            limit=geometry.frames * geometry.block_size,
            fills=table.counters[FILLS],
            evictions=table.counters[EVICTIONS],
        )

    def close(self) -> None:
        """Stop using it, when no thread reads or fills any more.

        The memory is free when all processes have done so, and no view is left.
        """
        if self._locks is not None:
            self._locks.close()
        self._lock_file.close()
        self._table.close()

    def _worker_locks(self) -> ByteLocks:
        if self._locks is None:
            raise InvalidValueError("cache", "not entered", "only a worker fills it")
        return self._locks

    def _fill(
        self,
        block: int,
        produce: Callable[[memoryview], None],
        deadline: float | None,
        begin: float,
    ) -> None:
        frame = self._take_frame(block, deadline)
        if frame is None:
            raise self._late(block, begin)
        size = self._geometry.block_size
        view = self._table.frame(frame)
        length = self._geometry.size - block * size
        if length < size:
            # The image ends in this block: behind it are zeros, not what was there before.
            view[length:] = bytes(size - length)
            view = view[:length]
        try:
            produce(view)
        except BaseException:
            self._frames.give_back(frame, deadline)
            raise
        membarrier.barrier()
        self._places[block] = frame

    def _take_frame(self, block: int, deadline: float | None) -> int | None:
        # All can be in use: pinned, or being filled.
        for _ in backoff(math.inf if deadline is None else deadline, longest=0.005):
            frame = self._frames.take(block, deadline)
            if frame is not None:
                return frame
        return None

    def _late(self, block: int, begin: float) -> WaitTimeoutError:
        return WaitTimeoutError("the cache", f"block {block} is not read", time.monotonic() - begin)
