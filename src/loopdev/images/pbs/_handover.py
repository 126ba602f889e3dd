# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""An open session for whichever process wants it first.

Who resolves an image has a session by then, and the process that reads needs one: to make another
takes four round trips. What the session knows is in memory, which forked processes have, too; its
socket is put into a queue, from which the kernel gives it to one process only. That one goes on.
"""

from __future__ import annotations

import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs.session import Session


class Handover:
    """The session, and the queue that its socket is in. See :meth:`put`."""

    def __init__(self, session: Session, queue: socket.socket) -> None:
        self._session, self._queue = session, queue

    @classmethod
    def put(cls, session: Session) -> Handover:
        """Put a session into a queue; nobody may use it before he has taken it.

        What is under way in it goes along.
        """
        giving, taking = socket.socketpair()
        taking.setblocking(False)
        with giving, session.connection.take_socket() as sock:
            socket.send_fds(giving, [b"s"], [sock.fileno()])
        return cls(session, taking)

    def take(self) -> Session | None:
        """Return the session to one taker of all, in whatever process; None to the others."""
        try:
            _, fds, _, _ = socket.recv_fds(self._queue, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
        if not fds:
            return None
        self._session.connection.adopt(fds[0])
        return self._session

    def copy(self) -> Handover:
        """Return another one of the same queue, which is good when this one is closed."""
        return Handover(self._session, self._queue.dup())

    def fileno(self) -> int:
        """Return the queue's descriptor, which stays owned here."""
        return self._queue.fileno()

    def close(self) -> None:
        """Close the queue; if it was the last one, a session that nobody has taken ends."""
        self._queue.close()
