# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A reader session: a connection that gives out the files and chunks of one snapshot.

Source: src/api2/reader/{mod,environment}.rs, pbs-client/src/backup_reader.rs.
"""

from __future__ import annotations

import time

from loopdev.errors import ServerError
from loopdev.images.pbs._http1 import Exchange
from loopdev.images.pbs._http2 import Downloads
from loopdev.images.pbs.server import refusal, target

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from loopdev.images.pbs._http2 import Reply
    from loopdev.images.pbs._wire import Connection
    from loopdev.images.pbs.names import Snapshot
    from loopdev.images.pbs.server import Server

_PROTOCOL = "proxmox-backup-reader-protocol-v1"
_UPGRADE = [("Connection", "upgrade"), ("Upgrade", _PROTOCOL)]
# What one call of round() takes at most before it looks whether others want something, in bytes.
_TURN = 4 << 20


class Session:
    """An open session; used by one thread of one process at a time. See :meth:`open`.

    Attributes:
        heard: When the last bytes came, in seconds of :func:`time.monotonic`.
        answered: When the last of those that belong to an answer came.
        early: Replies to requests that nobody has made yet, by path.
    """

    def __init__(self, connection: Connection, server: str) -> None:
        self.connection = connection
        self._downloads = Downloads(server)
        self._server = server
        self.heard = self.answered = time.monotonic()
        self.early: dict[str, Reply] = {}

    @classmethod
    def open(
        cls,
        server: Server,
        snapshot: Snapshot,
        deadline: float,
        connection: Connection | None = None,
    ) -> Self:
        """Begin a session, which keeps the snapshot from being removed.

        Args:
            server: Who has it.
            snapshot: It.
            deadline: In seconds of :func:`time.monotonic`.
            connection: A fresh one, which is owned from here on; None: make it.

        Raises:
            ImageNotFoundError: There is no such snapshot.
            AccessDeniedError: We may not read it.
            DeviceBusyError: It is being written or removed (EAGAIN).
            ServerError: Anything else goes wrong.
        """
        connection = connection or server.connect(deadline)
        try:
            return cls._upgrade(server, snapshot, deadline, connection)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def _upgrade(
        cls, server: Server, snapshot: Snapshot, deadline: float, connection: Connection
    ) -> Self:
        parameters: dict[str, str | int] = {
            "backup_type": snapshot.type,
            "backup_id": snapshot.id,
            "backup_time": snapshot.time,
            "store": server.repository.store,
            "ns": snapshot.namespace,
        }
        headers = [*server.authorize(None, deadline), *_UPGRADE]
        line = target("reader", parameters)
        answer = Exchange(connection).ask("GET", line, headers, b"", deadline)
        if answer.status != 101:
            status, text = answer.status, answer.text
            raise refusal(server.name, status, text, "snapshot", snapshot.full_name)
        if answer.headers.get("upgrade", "").lower() != _PROTOCOL:
            raise ServerError(server.name, "has switched to another protocol than was asked for")
        session = cls(connection, server.name)
        session._take(answer.rest)
        connection.send(session._downloads.data_to_send())
        return session

    @property
    def room(self) -> int:
        """How many more requests the server takes at this moment."""
        return self._downloads.room

    def download(self, name: str, limit: int) -> Reply:
        """Begin to download a file of the snapshot; that of an index allows its chunks."""
        return self.get(f"/download?file-name={name}", limit)

    def get(self, path: str, limit: int, buffer: bytearray | None = None) -> Reply:
        """Begin a request; see :meth:`round`."""
        reply = self._downloads.request(path, limit, buffer)
        self.connection.send(self._downloads.data_to_send())
        return reply

    def cancel(self, reply: Reply) -> None:
        """Want no more of a reply."""
        self._downloads.cancel(reply)

    def ping(self) -> None:
        """Ask the server for a sign of life."""
        self._downloads.ping()

    def round(self, timeout: float, wake: int | None = None) -> list[Reply]:
        """Send and receive what can be; return the replies that have ended.

        Args:
            timeout: How long to wait if there is nothing, in seconds.
            wake: A descriptor that ends the wait, too.

        Raises:
            ServerError: The session is over.
        """
        ended, taken, progress = [], 0, self._downloads.progress
        self.connection.send(self._downloads.data_to_send())
        while taken < _TURN:
            buffer = self._downloads.buffer()
            count = self.connection.read_into(buffer)
            if count is None:
                if taken or timeout <= 0:
                    break
                self.connection.poll(timeout, wake)
                timeout = 0.0
                continue
            if count == 0:
                raise ServerError(self._server, "has ended the connection")
            taken += count
            ended += self._downloads.received(count)
        if taken:
            self.heard = time.monotonic()
            if progress != self._downloads.progress:
                self.answered = self.heard
            self.connection.send(self._downloads.data_to_send())
        return ended

    def finish(self, replies: list[Reply], deadline: float) -> None:
        """Wait for replies.

        Raises:
            ServerError: They do not all come before the deadline.
        """
        left = {id(reply) for reply in replies}
        while left:
            wait = deadline - time.monotonic()
            if wait <= 0:
                raise ServerError(self._server, "does not answer")
            left -= {id(reply) for reply in self.round(wait)}

    def _take(self, data: bytes) -> None:
        while data:
            buffer = self._downloads.buffer()
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            data = data[count:]
            self._downloads.received(count)

    def close(self) -> None:
        """End the session."""
        self.connection.close()
