# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A worker that stays with a client for a moment, and answers what it asks next.

A request that goes through the event loop wakes three processes, one that a worker takes off the
connection itself only two; and each waking costs as much as a third of an attach. So a worker that
has made a device stays until the client is quiet, the event loop wants it back, or something is
asked that the event loop must count, know or write down first. Until then nobody else reads the
connection.
"""

from __future__ import annotations

import select
import time

from loopdev.broker import messages
from loopdev.broker._answers import peek
from loopdev.broker._jobs import Fds, attach_facts
from loopdev.errors import RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import cast

    from loopdev.broker._jobs import Connection, Device, Link, Payload, Result

    Run = Callable[[Payload, Fds], Result]
else:

    def cast(_, value):
        return value


# Milliseconds without a request, and seconds altogether: what was done is told at the end.
_QUIET = 10
_LONGEST = 0.05
# Characters of names in what is to be told, which is one message.
_TOLD = 32 << 10
# Requests to attach, as they came: a client that makes many devices says the same each time.
_parsed: dict[bytes, messages.Attach] = {}
_PARSED = 64


class Visit:
    """The requests of one client, from the one that the event loop gave away.

    Args:
        link: To the event loop.
        run: Does a job; its errors are in the result.
        payload: The job that was given, an attach.
        fds: What is to be closed when the event loop has been told.

    Attributes:
        events: What is to be told, as the log has it.
    """

    def __init__(self, link: Link, run: Run, payload: Payload, fds: Fds) -> None:
        self._link, self._run, self._payload, self._fds = link, run, payload, fds
        self._connection: Connection = payload["connection"]
        self._left: int = payload["stay"]
        self._told = 0
        self._device: Device | None = None
        self._pin = Fds()
        self.events: list[tuple[str, dict[str, object]]] = []

    def run(self, result: dict[str, object], out: list[int]) -> Result:
        """Go on from an attach that has not been answered; return the state in the end.

        Raises:
            ConnectionError: The event loop has gone.
        """
        self._attached(result, out)
        with self._pin:
            waiting = select.poll()
            waiting.register(self._connection.socket, select.POLLIN)
            waiting.register(self._link.socket, select.POLLIN)
            ours, end = self._connection.socket.fileno(), time.monotonic() + _LONGEST
            result = {}
            while not result and self._may_go_on() and time.monotonic() < end:
                ready = waiting.poll(_QUIET)
                if not ready or ready[0][0] != ours or len(ready) > 1:
                    break  # quiet, or wanted back
                request = _next(self._connection.socket)
                if request is None:
                    break
                self._left -= 1
                result = self._handle(request)
            final = {"bound": False, **result, "events": self.events, "unused": self._left}
            return {**final, "device": self._device}, [self._pin.take(fd) for fd in self._pin]

    def _may_go_on(self) -> bool:
        return self._left > 0 and self._told < _TOLD

    def _handle(self, request: messages.Attach | messages.Detach) -> dict[str, object]:
        """Do and answer what was asked; a result ends the visit."""
        if isinstance(request, messages.Attach):
            if self._device is not None:
                self._left += 1
                return {"passed": True}  # the event loop finds it on the connection
            return self._attach(request)
        device = self._device
        if device is None or (request.number, request.diskseq) != (
            device["number"],
            device["diskseq"],
        ):
            self._left += 1
            return {"passed": True}
        self._connection.drop()
        return self._detach(device, request.timeout)

    def _attach(self, request: messages.Attach) -> dict[str, object]:
        asked = {**messages.BY_DEFAULT, **vars(request)}
        result, out = self._run({**self._payload, "fresh": False, "request": asked}, self._fds)
        if "reply" not in result:
            return {**result, "what": "attach"}
        self._attached(result, out)
        return {}

    def _attached(self, result: dict[str, object], out: list[int]) -> None:
        for fd in out:
            self._pin.add(fd)
        device = cast("Device", result["device"])
        self._connection.answer(cast("bytes", result["reply"]))
        self._device = device
        self._tell("attach", attach_facts(device))

    def _tell(self, event: str, facts: dict[str, object]) -> None:
        self.events.append((event, facts))
        self._told += sum(len(value) for value in facts.values() if isinstance(value, str))

    def _detach(self, device: Device, timeout: float) -> dict[str, object]:
        for fd in self._pin:
            self._fds.add(self._pin.take(fd))
        payload = {**self._payload, "job": "detach", "device": device, "timeout": timeout}
        result, out = self._run(payload, self._fds)
        if "reply" not in result:
            for fd in out:
                self._pin.add(fd)
            return {**result, "what": "detach"}
        self._device = None
        number = device["number"]
        for problem in result["problems"]:  # type: ignore[attr-defined]
            self._tell("problem", {"number": number, "reason": problem})
        self._tell("detach", {"number": number})
        self._connection.answer(cast("bytes", result["reply"]))
        return {"bound": True} if result["bound"] else {}


def _next(connection: socket.socket) -> messages.Attach | messages.Detach | None:
    """Return the next request, which stays on the connection; None: it is the event loop's."""
    try:
        data, descriptors = peek(connection, messages.MAX_REQUEST + 1)
        request = _parsed.get(data) or messages.parse_request(data)
    except (BlockingIOError, RemoteProtocolError):
        return None  # closed, too, or nothing that can be understood
    if isinstance(request, messages.Attach):
        if len(_parsed) < _PARSED:
            _parsed[data] = request
        # What needs something written down before it is answered is not for us.
        return request if messages.is_plain(request) else None
    if isinstance(request, messages.Detach) and not descriptors:
        return request
    return None
