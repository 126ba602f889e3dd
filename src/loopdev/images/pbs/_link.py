# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Sessions that are made again whenever they are lost, for the threads of one process.

Threads hand in their requests and wait, each no longer than its own deadline. A connection that is
lost is nobody's error: what was asked for is asked for again in the next one.

On a long way there is more than one connection, each with a thread of its own (see ``_lane``):
what a server has sent and not seen acknowledged is 4 MiB of a connection at most, where it is set
up as Linux comes, so one round trip brings no more than that.
"""

from __future__ import annotations

import _thread
import time

from loopdev.errors import LoopdevError, ServerError
from loopdev.images.pbs._lane import Lane

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container

    from loopdev.images.pbs._http2 import Reply
    from loopdev.images.pbs.session import Session

# Chunks under way at once, with what is not decoded yet: so many buffers of up to 4 MiB there are.
STREAMS = 10
# One more connection for so much of a round trip, in seconds, and how many at most.
_LANE_DELAY, _LANES = 0.01, 3
_CLOSING = 2.0


class Request:
    """What a thread waits for."""

    __slots__ = ("asked", "gate", "given_up", "limit", "path", "reply")

    def __init__(self, path: str, limit: int) -> None:
        self.path, self.limit = path, limit
        self.reply: Reply | None = None
        self.given_up = False
        self.asked = 0.0  # when it was sent
        self.gate = _thread.allocate_lock()
        self.gate.acquire()


class Link:
    """Sessions for many threads.

    Args:
        server: Its name, for errors.
        connect: Makes a session that is ready for requests, before a deadline.
        say: Told when a connection is lost, and when it is there again.
        patience: No request waits longer than this, in seconds.
    """

    def __init__(
        self,
        server: str,
        connect: Callable[[float], Session],
        say: Callable[[str], None],
        patience: float,
    ) -> None:
        self._server, self.connect, self._say = server, connect, say
        self._patience = patience
        self._lock = _thread.allocate_lock()
        self._queue: list[Request] = []
        self._buffers: list[bytearray] = []
        self._out = 0  # buffers that are in use
        self._trouble = ""
        self._closing = False
        self._wanted = 1  # lanes
        self._lanes: list[Lane] = []
        self._add_lane()

    def fetch(self, path: str, limit: int, deadline: float) -> Reply:
        """Return the reply to a GET; give it back by :meth:`release`.

        Raises:
            ServerError: It has not come before the deadline.
        """
        request = Request(path, limit)
        with self._lock:
            self._queue.append(request)
        self._wake_one()
        request.gate.acquire(True, max(0.0, min(deadline - time.monotonic(), 1e6)))
        with self._lock:
            reply = request.reply
            request.given_up = reply is None
            trouble = self._trouble
        if reply is None:
            self._wake_all()
            raise ServerError(self._server, trouble or "does not answer in time")
        return reply

    def release(self, reply: Reply) -> None:
        """Be told that a reply is not needed any more."""
        with self._lock:
            self._buffers.append(reply.take_buffer())
            self._out -= 1
            waiting = bool(self._queue)
        if waiting:
            self._wake_one()

    def reconnect(self) -> None:
        """Make new sessions, since the server does not do what it should in these."""
        for lane in self._lanes:
            lane.reconnect()

    def close(self) -> None:
        """End the sessions; whoever waits gives up at his deadline."""
        with self._lock:
            self._closing = True
        for lane in self._lanes:
            lane.close()
        until = time.monotonic() + _CLOSING
        for lane in self._lanes:
            lane.wait(max(0.0, until - time.monotonic()))

    def _add_lane(self) -> None:
        with self._lock:
            if not self._closing:
                self._lanes.append(Lane(self, self._server, self._patience))

    def _wake_one(self) -> None:
        """Wake the lane with the least to do; those that connect look by themselves."""
        ready = [lane for lane in self._lanes if lane.ready]
        if ready:
            min(ready, key=_load).wake()

    def _wake_all(self) -> None:
        for lane in self._lanes:
            lane.wake()

    # For the lanes

    def take(self, load: int, early: Container[str]) -> tuple[Request, bytearray] | None:
        """Return a request that is to be made, and memory for its answer.

        Args:
            load: How many the lane has under way.
            early: What it has asked for by itself.
        """
        with self._lock:
            self._queue = [request for request in self._queue if not request.given_up]
            # Each lane gets its share, or the first that is ready would take all there are.
            if not self._queue or self._out >= STREAMS or load * self._wanted >= STREAMS:
                return None
            request = self._queue.pop(0)
            reuse = self._buffers and request.path not in early
            self._out += 1
            return request, self._buffers.pop() if reuse else bytearray()

    def put_back(self, requests: list[Request]) -> None:
        """Be given what was not answered; it has waited longest, so it is next."""
        if not requests:
            return
        with self._lock:
            self._queue[:0] = requests
            self._out -= len(requests)
        self._wake_one()

    def finish(self, request: Request, reply: Reply) -> None:
        """Be given a reply."""
        with self._lock:
            request.reply = reply
            given_up = request.given_up
        if given_up:
            self.release(reply)
        else:
            request.gate.release()

    def note(self, exc: Exception) -> None:
        """Say what is wrong with a connection, once."""
        trouble = exc.reason if isinstance(exc, ServerError) else str(exc)
        if not isinstance(exc, LoopdevError):
            trouble = f"{type(exc).__name__}: {exc}"
        if trouble != self._trouble:
            self._trouble = trouble
            self._say(f"{self._server}: {trouble}; reads wait, and it is tried again")

    def note_connected(self, lane: Lane, session: Session, seconds: float) -> None:
        """Be told of a session, and have another one made where it is a long way."""
        if self._trouble:
            self._say(f"{self._server}: connected again after {seconds:.1f} s")
        self._trouble = ""
        self._wanted = min(1 + int(session.connection.delay / _LANE_DELAY), _LANES)
        # One after the other: each downloads the index, which is not small for a large disk.
        with self._lock:  # a lane can be here before it is in the list
            more = lane is self._lanes[-1] and len(self._lanes) < self._wanted
        if more:
            self._add_lane()


def _load(lane: Lane) -> int:
    return lane.load
