# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A session that is made again whenever it is lost, for the threads of one process.

One thread owns the connection. The others hand it their requests and wait, each no longer than
its own deadline. A connection that is lost is nobody's error: what was asked for is asked for again
in the next one. So that one that is dead is known to be, the server is asked for a sign of life
when it is silent.
"""

from __future__ import annotations

import _thread
import os
import select
import time

from loopdev.errors import LoopdevError, ServerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from loopdev.images.pbs._http2 import Reply
    from loopdev.images.pbs.session import Session

# Chunks under way at once, with what is not decoded yet: so many buffers of up to 4 MiB there are.
STREAMS = 10
# How long to wait before the next try to connect, in seconds: twice as long each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# For one try.
_CONNECT_TIMEOUT = 30.0
# When to ask a silent server for a sign of life, with requests under way and without, and how long
# to wait for it, in seconds.
_QUIET, _IDLE, _GRACE = 5.0, 60.0, 5.0
# One that lives, but has answered nothing for so long, is asked again in another session.
_STALL = 20.0
_CLOSING = 2.0


class _Request:
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
    """A session for many threads.

    Args:
        server: Its name, for errors.
        connect: Makes a session that is ready for requests, before a deadline.
        say: Told when the connection is lost, and when it is there again.
        patience: No request waits longer than this, in seconds.
    """

    def __init__(
        self,
        server: str,
        connect: Callable[[float], Session],
        say: Callable[[str], None],
        patience: float,
    ) -> None:
        self._server, self._connect, self._say = server, connect, say
        # A dead connection must be known, and another one made, before those who wait give up.
        self._quiet = min(_QUIET, patience / 8)
        self._grace = min(_GRACE, patience / 8)
        self._stall = min(_STALL, patience / 3)
        self._lock = _thread.allocate_lock()
        self._queue: list[_Request] = []
        self._buffers: list[bytearray] = []
        self._out = 0  # buffers that are in use
        self._trouble = ""
        self._closing = self._renew = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended = _thread.allocate_lock()
        self._ended.acquire()
        _thread.start_new_thread(self._run, ())

    def fetch(self, path: str, limit: int, deadline: float) -> Reply:
        """Return the reply to a GET; give it back by :meth:`release`.

        Raises:
            ServerError: It has not come before the deadline.
        """
        request = _Request(path, limit)
        with self._lock:
            self._queue.append(request)
        self._wake_up()
        request.gate.acquire(True, max(0.0, min(deadline - time.monotonic(), 1e6)))
        with self._lock:
            reply = request.reply
            request.given_up = reply is None
            trouble = self._trouble
        if reply is None:
            self._wake_up()
            raise ServerError(self._server, trouble or "does not answer in time")
        return reply

    def release(self, reply: Reply) -> None:
        """Be told that a reply is not needed any more."""
        with self._lock:
            self._buffers.append(reply.take_buffer())
            self._out -= 1
            waiting = bool(self._queue)
        if waiting:
            self._wake_up()

    def reconnect(self) -> None:
        """Make a new session, since the server does not do what it should in this one."""
        self._renew = True
        self._wake_up()

    def close(self) -> None:
        """End the session; whoever waits gives up at his deadline."""
        self._closing = True
        self._wake_up()
        self._ended.acquire(True, _CLOSING)

    def _wake_up(self) -> None:
        try:
            os.eventfd_write(self._wake, 1)
        except OSError:
            pass  # it is closed

    def _run(self) -> None:
        """Be the thread that owns the connection."""
        try:
            while not self._closing:
                session = self._connected()
                if session is not None:
                    try:
                        self._serve(session)
                    finally:
                        session.close()
        finally:
            wake, self._wake = self._wake, -1
            os.close(wake)
            self._ended.release()

    def _connected(self) -> Session | None:
        """Try until there is a session; None: it is not wanted any more."""
        begin, pause = time.monotonic(), _FIRST_PAUSE
        while not self._closing:
            try:
                session = self._connect(time.monotonic() + _CONNECT_TIMEOUT)
            except Exception as exc:  # noqa: BLE001 - without this thread no read would ever end well
                self._note(exc)
                # os.urandom and not the module random: many that were cut off come back apart.
                self._sleep(pause * (0.5 + os.urandom(1)[0] / 512))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if self._trouble:
                    self._say(
                        f"{self._server}: connected again after {time.monotonic() - begin:.1f} s"
                    )
                self._trouble = ""
                return session
        return None

    def _note(self, exc: Exception) -> None:
        """Say what is wrong, once."""
        trouble = exc.reason if isinstance(exc, ServerError) else str(exc)
        if not isinstance(exc, LoopdevError):
            trouble = f"{type(exc).__name__}: {exc}"
        if trouble != self._trouble:
            self._trouble = trouble
            self._say(f"{self._server}: {trouble}; reads wait, and it is tried again")

    def _sleep(self, seconds: float) -> None:
        """Sleep until it is over or the link is closed; requests do not wake it."""
        until = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._closing and (left := until - time.monotonic()) > 0:
            poll.poll(left * 1000)
            self._clear_wake()

    def _clear_wake(self) -> None:
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass

    def _serve(self, session: Session) -> None:
        """Serve requests until the session is lost."""
        active: dict[Reply, _Request] = {}
        try:
            pinged = 0.0
            while not self._closing:
                if self._renew:
                    self._renew = False
                    return
                self._drop_given_up(session, active)
                self._begin(session, active)
                for reply in session.round(self._pause(active, pinged), self._wake):
                    if reply in active:  # else nobody has asked for it yet
                        self._finish(active.pop(reply), reply)
                self._clear_wake()
                pinged = self._check_life(session, active, pinged)
        except Exception as exc:  # noqa: BLE001 - as above
            self._note(exc)
        finally:
            with self._lock:
                # In front: they have waited longest.
                self._queue[:0] = active.values()
                self._out -= len(active)

    def _begin(self, session: Session, active: dict[Reply, _Request]) -> None:
        while session.room > 0:
            with self._lock:
                self._queue = [request for request in self._queue if not request.given_up]
                if not self._queue or self._out >= STREAMS:
                    return
                request = self._queue.pop(0)
                early = session.early.pop(request.path, None)
                buffer = self._buffers.pop() if self._buffers and early is None else bytearray()
                self._out += 1
            request.asked = time.monotonic()
            try:
                reply = early or session.get(request.path, request.limit, buffer)
            except ServerError:
                with self._lock:
                    self._queue.insert(0, request)
                    self._out -= 1
                raise
            if reply.ended:
                self._finish(request, reply)
            else:
                active[reply] = request

    def _finish(self, request: _Request, reply: Reply) -> None:
        with self._lock:
            request.reply = reply
            given_up = request.given_up
        if given_up:
            self.release(reply)
        else:
            request.gate.release()

    def _drop_given_up(self, session: Session, active: dict[Reply, _Request]) -> None:
        for reply in [reply for reply, request in active.items() if request.given_up]:
            del active[reply]
            session.cancel(reply)
            self.release(reply)

    def _pause(self, active: dict[Reply, _Request], pinged: float) -> float:
        return self._grace if pinged else self._quiet if active else _IDLE

    def _check_life(self, session: Session, active: dict[Reply, _Request], pinged: float) -> float:
        """Ask a silent server for a sign of life; return when, 0: there is no need."""
        now = time.monotonic()
        oldest = min((request.asked for request in active.values()), default=now)
        if now - max(oldest, session.answered) >= self._stall:
            raise ServerError(self._server, "answers no requests any more")
        if pinged and session.heard < pinged:
            if now - pinged >= self._grace:
                raise ServerError(self._server, "does not answer any more")
            return pinged
        if now - session.heard < (self._quiet if active else _IDLE):
            return 0.0
        session.ping()
        return now
