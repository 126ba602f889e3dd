# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""An event loop: descriptors that became ready, and things to do later. Nothing in it waits."""

from __future__ import annotations

import heapq
import itertools
import os
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

IN, OUT, ONESHOT = select.EPOLLIN, select.EPOLLOUT, select.EPOLLONESHOT
HUP, RDHUP = select.EPOLLHUP, select.EPOLLRDHUP


class Poller:
    """Calls handlers in one thread; only wake() may be called from another, or a signal handler."""

    def __init__(self) -> None:
        self._epoll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.on_wake: Callable[[], None] = lambda: None
        self._stopped = False
        self.watch(self._wake, self._woken)

    def watch(self, fd: int, handler: Callable[[int], None], events: int = IN) -> None:
        """Call *handler* with the events whenever the descriptor has some."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def rearm(self, fd: int, events: int) -> None:
        """Go on with a descriptor that is watched with ONESHOT."""
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Watch a descriptor no longer; to be called before it is closed."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def later(self, delay: float, call: Callable[[], None]) -> None:
        """Call once, in *delay* seconds."""
        heapq.heappush(self._later, (time.monotonic() + delay, next(self._order), call))

    def wake(self) -> None:
        """Have on_wake() called in the loop's thread."""
        os.eventfd_write(self._wake, 1)

    def _woken(self, _: int) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            return
        self.on_wake()

    def run(self) -> None:
        """Go on until stop()."""
        self._stopped = False
        while not self._stopped:
            self._once()

    def stop(self) -> None:
        """Let run() return."""
        self._stopped = True

    def _once(self) -> None:
        timeout = max(0.0, self._later[0][0] - time.monotonic()) if self._later else -1
        ready = [
            (fd, self._handlers.get(fd), events) for fd, events in self._epoll.poll(timeout, 64)
        ]
        for fd, handler, events in ready:
            # Unless it was closed in this round; its number may be another's by now.
            if handler is not None and self._handlers.get(fd) is handler:
                handler(events)
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()

    def close(self) -> None:
        """Give the loop's own descriptors back."""
        self._epoll.close()
        os.close(self._wake)
