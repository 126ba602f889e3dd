# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""One connection of a link, and the thread that owns it.

It is made again whenever it is lost. So that one that is dead is known to be, the server is asked
for a sign of life when it is silent.
"""

from __future__ import annotations

import _thread
import os
import select
import time

from loopdev.errors import ServerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs._http2 import Reply
    from loopdev.images.pbs._link import Link, Request
    from loopdev.images.pbs.session import Session

# How long to wait before the next try to connect, in seconds: twice as long each time.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
# For one try.
_CONNECT_TIMEOUT = 30.0
# When to ask a silent server for a sign of life, with requests under way and without, and how long
# to wait for it, in seconds.
_QUIET, _IDLE, _GRACE = 5.0, 60.0, 5.0
# One that lives, but has answered nothing for so long, is asked again in another session.
_STALL = 20.0


class Lane:
    """The connection.

    Args:
        link: Who has the requests, and takes the replies.
        server: Its name, for errors.
        patience: No request waits longer than this, in seconds.

    Attributes:
        ready: Whether it takes requests at this moment.
        load: How many are under way.
    """

    def __init__(self, link: Link, server: str, patience: float) -> None:
        self._link, self._server = link, server
        # A dead connection must be known, and another one made, before those who wait give up.
        self._quiet = min(_QUIET, patience / 8)
        self._grace = min(_GRACE, patience / 8)
        self._stall = min(_STALL, patience / 3)
        self.ready = False
        self._active: dict[Reply, Request] = {}
        self._renew = self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended = _thread.allocate_lock()
        self._ended.acquire()
        _thread.start_new_thread(self._run, ())

    @property
    def load(self) -> int:
        """How many requests are under way."""
        return len(self._active)

    def wake(self) -> None:
        """Have it look at the requests that there are."""
        try:
            os.eventfd_write(self._wake, 1)
        except OSError:
            pass  # it is closed

    def reconnect(self) -> None:
        """Make a new session, since the server does not do what it should in this one."""
        self._renew = True
        self.wake()

    def close(self) -> None:
        """End the session, soon; see :meth:`wait`."""
        self._closing = True
        self.wake()

    def wait(self, timeout: float) -> None:
        """Wait for the end of the session that was closed, but no longer than so many seconds."""
        self._ended.acquire(True, timeout)

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
                session = self._link.connect(time.monotonic() + _CONNECT_TIMEOUT)
            except Exception as exc:  # noqa: BLE001 - without this thread no read would ever end well
                self._link.note(exc)
                # os.urandom and not the module random: many that were cut off come back apart.
                self._sleep(pause * (0.5 + os.urandom(1)[0] / 512))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._link.note_connected(self, session, time.monotonic() - begin)
                return session
        return None

    def _sleep(self, seconds: float) -> None:
        """Sleep until it is over or the lane is closed; requests do not wake it."""
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
        active = self._active
        try:
            self.ready, pinged = True, 0.0
            while not self._closing:
                if self._renew:
                    self._renew = False
                    return
                self._drop_given_up(session)
                self._begin(session)
                for reply in session.round(self._pause(pinged), self._wake):
                    if reply in active:  # else nobody has asked for it yet
                        self._link.finish(active.pop(reply), reply)
                self._clear_wake()
                pinged = self._check_life(session, pinged)
        except Exception as exc:  # noqa: BLE001 - as above
            self._link.note(exc)
        finally:
            self.ready = False
            lost = [*active.values()]
            active.clear()
            self._link.put_back(lost)

    def _begin(self, session: Session) -> None:
        while session.room > 0:
            found = self._link.take(self.load, session.early)
            if found is None:
                return
            request, buffer = found
            request.asked = time.monotonic()
            try:
                reply = session.early.pop(request.path, None)
                reply = reply or session.get(request.path, request.limit, buffer)
            except ServerError:
                self._link.put_back([request])
                raise
            if reply.ended:
                self._link.finish(request, reply)
            else:
                self._active[reply] = request

    def _drop_given_up(self, session: Session) -> None:
        active = self._active
        for reply in [reply for reply, request in active.items() if request.given_up]:
            del active[reply]
            session.cancel(reply)
            self._link.release(reply)

    def _pause(self, pinged: float) -> float:
        return self._grace if pinged else self._quiet if self._active else _IDLE

    def _check_life(self, session: Session, pinged: float) -> float:
        """Ask a silent server for a sign of life; return when, 0: there is no need."""
        now = time.monotonic()
        oldest = min((request.asked for request in self._active.values()), default=now)
        if now - max(oldest, session.answered) >= self._stall:
            raise ServerError(self._server, "answers no requests any more")
        if pinged and session.heard < pinged:
            if now - pinged >= self._grace:
                raise ServerError(self._server, "does not answer any more")
            return pinged
        if now - session.heard < (self._quiet if self._active else _IDLE):
            return 0.0
        session.ping()
        return now
