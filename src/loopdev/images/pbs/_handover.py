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
    """The session, and the queue that its socket is in.

    Args:
        session: It must not be used any more by who gives it away; what is under way goes with it.
    """

    def __init__(self, session: Session) -> None:
        self._session: Session | None = session
        self._giving, self._taking = socket.socketpair()
        self._taking.setblocking(False)
        with session.connection.take_socket() as sock:
            socket.send_fds(self._giving, [b"s"], [sock.fileno()])

    def take(self) -> Session | None:
        """Return the session, in one process of all; None in the others."""
        session, self._session = self._session, None
        if session is None:
            return None
        try:
            _, fds, _, _ = socket.recv_fds(self._taking, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return None
        if not fds:
            return None
        session.connection.adopt(fds[0])
        return session

    def filenos(self) -> tuple[int, ...]:
        """Return the queue's descriptors, which stay owned here."""
        return self._giving.fileno(), self._taking.fileno()

    def close(self) -> None:
        """Close the queue; a session that nobody has taken ends."""
        self._session = None
        self._giving.close()
        self._taking.close()
