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
        self._most, self._threads, self._unfinished = most, 0, 0
        self._jobs: _queue.SimpleQueue[Job] = _queue.SimpleQueue()
        self.lock = _thread.allocate_lock()

    def run(self, job: Job) -> None:
        """Have *job* called by a thread, in the order of the calls here."""
        with self.lock:
            start = self._threads <= self._unfinished and self._threads < self._most
            self._threads += start
            self._unfinished += 1
        self._jobs.put(job)
        if start:
            _thread.start_new_thread(self._work, ())

    @property
    def busy(self) -> bool:
        """Whether there are jobs that have not ended."""
        return self._unfinished > 0

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:  # noqa: BLE001 - a bug of ours must not cost a thread
                sys.excepthook(*sys.exc_info())
            with self.lock:
                self._unfinished -= 1
