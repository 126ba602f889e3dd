# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Threads for what may wait, started as they are needed."""

from __future__ import annotations

import _queue
import _thread
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Job = Callable[[], None]


class Pool:
    """Up to *most* threads, which live as long as the process does.

    Not concurrent.futures: its import costs more than a whole request, and its end waits for
    threads that a dead store may hold for ever.

    Attributes:
        lock: For what the jobs write in common.
    """

    def __init__(self, most: int) -> None:
        self._most, self._threads, self._idle = most, 0, 0
        self._jobs: _queue.SimpleQueue[Job] = _queue.SimpleQueue()
        self.lock = _thread.allocate_lock()

    def run(self, job: Job) -> None:
        """Have *job* called by a thread, in the order of the calls here."""
        with self.lock:
            start = self._idle <= self._jobs.qsize() and self._threads < self._most
            if start:
                self._threads += 1
        self._jobs.put(job)
        if start:
            _thread.start_new_thread(self._work, ())

    @property
    def queued(self) -> int:
        """How many jobs no thread has begun."""
        return self._jobs.qsize()

    @property
    def busy(self) -> bool:
        """Whether any thread is at work."""
        return self._idle < self._threads

    def _work(self) -> None:
        while True:
            with self.lock:
                self._idle += 1
            job = self._jobs.get()
            with self.lock:
                self._idle -= 1
            try:
                job()
            except Exception:
                sys.excepthook(*sys.exc_info())
