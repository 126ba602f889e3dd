# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the workers of a map have done so far, in memory that others can look at.

Each worker writes its own row, so a worker that hangs, or is stopped, still tells what it did.
The page is a file in the map's directory, and it outlives them all until the map is removed.
"""

from __future__ import annotations

import fcntl
import os
import time
from mmap import MAP_SHARED, PROT_READ, PROT_WRITE, mmap

from loopdev._value import Value
from loopdev.errors import kernel_error
from loopdev.kernel.fds import OwnedFd

_MAGIC = int.from_bytes(b"loopdev1", "little")
_HEADER = 8  # in 64-bit words, like all lengths here
_ROW = 16
# How many damaged places are told one by one.
DAMAGES = 1000

# The header
_WORKERS, _RESTARTS, _STARTED, _DAMAGES = 1, 2, 3, 4
# A worker's row. What its loop counts, and what the threads of its pool count under their lock.
_PID, _TAKEN, _ANSWERED, _READS, _BYTES, _WAITED, _LATE, _LATE_BYTES, _ERRORS = range(9)


class Totals(Value):
    """The sum over all workers, since the map began.

    Attributes:
        requests: FUSE requests that were taken.
        bytes: Bytes that were sent.
        hits: Reads that were answered at once.
        misses: Reads that had to wait.
        errors: Reads that failed.
        damaged: Places that cannot be read.
        restarts: Workers that were replaced.
        uptime: In seconds.
        workers: The processes' numbers.
    """

    requests: int
    bytes: int
    hits: int
    misses: int
    errors: int
    damaged: int
    restarts: int
    uptime: float
    workers: tuple[int, ...]


class Counters:
    """The page of one map."""

    def __init__(self, file: OwnedFd, length: int, writable: bool) -> None:
        self._file = file
        self._map = mmap(
            file.fileno(), length, MAP_SHARED, PROT_READ | (PROT_WRITE if writable else 0)
        )
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, path: str, workers: int) -> Counters:
        """Make the file, and all its memory: a filesystem that is full later does no harm.

        Raises:
            KernelError: ENOSPC and its like.
        """
        length = (_HEADER + workers * _ROW + DAMAGES) * 8
        try:
            file = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), path)
            os.posix_fallocate(file.fileno(), 0, length)
        except OSError as exc:
            raise kernel_error(exc, path, "write") from exc
        counters = cls(file, length, writable=True)
        words = counters._words
        words[_WORKERS], words[_STARTED] = workers, time.monotonic_ns()
        words[0] = _MAGIC
        return counters

    @classmethod
    def look(cls, path: str) -> Counters | None:
        """Open a page to read it; None: there is none, or it is not whole."""
        try:
            file = OwnedFd.open(path, os.O_RDONLY)
        except OSError:
            return None
        length = os.fstat(file.fileno()).st_size
        if length < (_HEADER + _ROW) * 8:
            file.close()
            return None
        counters = cls(file, length, writable=False)
        words = counters._words
        if words[0] == _MAGIC and length == (_HEADER + words[_WORKERS] * _ROW + DAMAGES) * 8:
            return counters
        counters.close()
        return None

    def fileno(self) -> int:
        """Return the file's descriptor, which stays owned here."""
        return self._file.fileno()

    def row(self, worker: int) -> Row:
        """Return what one worker counts with."""
        start = _HEADER + worker * _ROW
        return Row(self._words[start : start + _ROW])

    def restarted(self) -> None:
        """Count a worker that was replaced; called by the supervisor alone."""
        self._words[_RESTARTS] += 1

    def progress(self, worker: int) -> tuple[int, int]:
        """Return how many requests a worker has taken, and how many of them it still has."""
        row = self._words[_HEADER + worker * _ROW :]
        return row[_TAKEN], row[_TAKEN] - row[_ANSWERED] - row[_LATE]

    def note_damage(self, block: int) -> bool:
        """Remember a damaged block; False: it was known, or there are too many to tell."""
        first = len(self._words) - DAMAGES
        # Not the descriptor that the workers share: its lock would be theirs, too.
        with OwnedFd.open(f"/proc/self/fd/{self._file.fileno()}", os.O_RDWR) as own:
            fcntl.flock(own.fileno(), fcntl.LOCK_EX)
            count = self._words[_DAMAGES]
            if count >= DAMAGES or block + 1 in self._words[first : first + count].tolist():
                return False
            self._words[first + count] = block + 1
            self._words[_DAMAGES] = count + 1
        return True

    def totals(self) -> Totals:
        """Return the sums."""
        words = self._words
        rows = [
            words[_HEADER + worker * _ROW : _HEADER + (worker + 1) * _ROW].tolist()
            for worker in range(words[_WORKERS])
        ]
        waited = sum(row[_WAITED] for row in rows)
        return Totals(
            requests=sum(row[_TAKEN] for row in rows),
            bytes=sum(row[_BYTES] + row[_LATE_BYTES] for row in rows),
            hits=sum(row[_READS] for row in rows),
            misses=waited,
            errors=sum(row[_ERRORS] for row in rows),
            damaged=words[_DAMAGES],
            restarts=words[_RESTARTS],
            uptime=(time.monotonic_ns() - words[_STARTED]) / 1e9,
            workers=tuple(row[_PID] for row in rows if row[_PID]),
        )

    def close(self) -> None:
        """Let go of the page."""
        self._words.release()
        try:
            self._map.close()
        except BufferError:
            pass  # a row is still in use; it goes with the process
        self._file.close()


class Row:
    """What one worker counts: its loop by some methods, the threads of its pool by others."""

    __slots__ = ("_words",)

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def begin(self, pid: int) -> None:
        """Start as a new process; what a dead one had taken is in nobody's hands."""
        words = self._words
        words[_PID] = pid
        words[_ANSWERED] = words[_TAKEN] - words[_LATE]

    def end(self) -> None:
        """Say that no process is behind this row."""
        self._words[_PID] = 0

    def take(self) -> None:
        """Count a request."""
        self._words[_TAKEN] += 1

    def answer(self) -> None:
        """Count an answer of the loop that was no read."""
        self._words[_ANSWERED] += 1

    def answer_read(self, size: int) -> None:
        """Count a read that the loop answered."""
        words = self._words
        words[_ANSWERED] += 1
        words[_READS] += 1
        words[_BYTES] += size

    def wait(self) -> None:
        """Count a read that has to wait."""
        self._words[_WAITED] += 1

    def answer_late(self, size: int, failed: bool) -> None:
        """Count the answer of a read that had to wait; by one thread at a time."""
        words = self._words
        words[_LATE] += 1
        if failed:
            words[_ERRORS] += 1
        else:
            words[_LATE_BYTES] += size
