# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""HTTP/1.1: one request and its answer. h11 does the protocol."""

from __future__ import annotations

import h11

from loopdev._value import Value
from loopdev.errors import ServerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopdev.images.pbs._wire import Connection

_BODY_MAX = 256 << 20  # a list of all snapshots can be long
_USER_AGENT = ("User-Agent", "loopdev")


class Answer(Value):
    """What a server answered; *rest* is what came behind the head of a 101."""

    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes

    @property
    def text(self) -> str:
        """The body as a message for people: one line, not too long."""
        return " ".join(self.body.decode(errors="replace").split())[:1000]


class Exchange:
    """Requests on one connection, one after the other.

    Args:
        connection: Owned from here on.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._http = h11.Connection(h11.CLIENT)

    def ask(
        self,
        method: str,
        target: str,
        headers: Sequence[tuple[str, str]],
        body: bytes,
        deadline: float,
    ) -> Answer:
        """Send a request, and return the answer.

        Raises:
            ServerError: There is none before the deadline, or it is no HTTP.
        """
        head = [("Host", self.connection.server), _USER_AGENT, *headers]
        if body:
            head.append(("Content-Length", str(len(body))))
        try:
            request = h11.Request(method=method, target=target, headers=head)
            for event in (request, h11.Data(data=body), h11.EndOfMessage()):
                self.connection.send(self._http.send(event) or b"")
            return self._receive(deadline)
        except h11.RemoteProtocolError as exc:
            raise ServerError(self.connection.server, f"does not speak HTTP: {exc}") from exc
        except h11.LocalProtocolError:
            # Its text repeats the header, which may be a secret.
            reason = "what is sent to it has a character that it must not have"
            raise ServerError(self.connection.server, reason) from None

    def _receive(self, deadline: float) -> Answer:
        status, headers, body = 0, {}, bytearray()
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(self.connection.receive(deadline))
            elif isinstance(event, h11.InformationalResponse | h11.Response):
                status = event.status_code
                headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                if status == 101:
                    rest = bytes(self._http.trailing_data[0])
                    return Answer(status=status, headers=headers, body=b"", rest=rest)
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > _BODY_MAX:
                    reason = f"answers with more than {_BODY_MAX} bytes"
                    raise ServerError(self.connection.server, reason)
            elif isinstance(event, h11.EndOfMessage):
                return Answer(status=status, headers=headers, body=bytes(body), rest=b"")
            else:
                raise ServerError(self.connection.server, "ended the connection")

    def next(self) -> bool:
        """Get ready for the next request; False: the server takes no more on this connection."""
        if self._http.our_state is h11.IDLE:
            return True
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()
