# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The way to a server through an HTTP proxy, which ALL_PROXY names.

Source: proxmox-http/src/proxy_config.rs.
"""

from __future__ import annotations

import os
import re
import time

from loopdev._value import Value
from loopdev.errors import InvalidValueError, ServerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import NoReturn

    from loopdev.images.pbs.repository import Repository

_VARIABLE = "ALL_PROXY"
_PORT = 1080
_HEAD_MAX = 16 << 10
_FORM = re.compile(
    r"(?:(?P<scheme>[^:/@]+)://)?(?:(?P<user>[^\s/]+)@)?"
    r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(?::(?P<port>[0-9]{1,5}))?/?",
    re.ASCII,
)


class Proxy(Value):
    """A proxy.

    Attributes:
        host: A name or address; an IPv6 address without brackets.
        port: From 1 on.
        user: "user:password", or "".
    """

    host: str
    port: int
    user: str

    def __repr__(self) -> str:
        return f"Proxy({self.host}:{self.port})"

    def fail(self, server: str, reason: str, exc: Exception | None = None) -> NoReturn:
        """Raise the error for a server to which this is no way."""
        why = f"the proxy {self.host}:{self.port} {reason}"
        raise ServerError(server, why) from exc

    def open_way(self, sock: socket.socket, repository: Repository, deadline: float) -> float:
        """Have the proxy connect to a server; what is sent then goes there.

        Args:
            sock: Connected to the proxy; it does not block, before and after.
            repository: The server.
            deadline: In seconds of :func:`time.monotonic`.

        Returns:
            How long that took, in seconds.

        Raises:
            ServerError: The proxy refuses, or is none.
        """
        server, begin = repository.server, time.monotonic()
        head = b""
        try:
            sock.settimeout(max(deadline - begin, 0.001))
            sock.sendall(self._request(server))
            # What follows the head would be the server's, but that waits for us to say something.
            while b"\r\n\r\n" not in head and len(head) <= _HEAD_MAX:
                sock.settimeout(max(deadline - time.monotonic(), 0.001))
                more = sock.recv(4096)
                if not more:
                    self.fail(server, "has ended the connection")
                head += more
            sock.setblocking(False)
        except TimeoutError as exc:
            self.fail(server, "does not answer", exc)
        except OSError as exc:
            self.fail(server, f"has ended the connection ({exc.strerror or exc})", exc)
        self._hear(server, head)
        return time.monotonic() - begin

    def _request(self, server: str) -> bytes:
        lines = [f"CONNECT {server} HTTP/1.1", f"Host: {server}"]
        if self.user:
            from binascii import b2a_base64

            credentials = b2a_base64(os.fsencode(self.user), newline=False).decode()
            lines.append(f"Proxy-Authorization: Basic {credentials}")
        return "\r\n".join([*lines, "", ""]).encode()

    def _hear(self, server: str, head: bytes) -> None:
        first = head.partition(b"\r\n")[0].decode("latin-1")
        protocol, _, rest = first.partition(" ")
        status, _, reason = rest.partition(" ")
        if not protocol.startswith("HTTP/1.") or not head.endswith(b"\r\n\r\n"):
            self.fail(server, "is no HTTP proxy")
        if status != "200":
            why = reason[:100] or "no reason given"
            self.fail(server, f"does not let us through: {why} ({status})")


def find_proxy() -> Proxy | None:
    """Return the proxy to use; None: there is none.

    Raises:
        InvalidValueError: ALL_PROXY is no proxy, or not of this kind. It may have a password in
            it, so it is not repeated.
    """
    text = os.environ.get(_VARIABLE, "")
    return parse_proxy(text) if text else None


def parse_proxy(text: str) -> Proxy:
    """Return the proxy of "[http://][user:password@]host[:port]".

    Raises:
        InvalidValueError: It is none.
    """
    found = _FORM.fullmatch(text)
    port = int(found["port"] or _PORT) if found else 0
    if found is None or not 0 < port < 1 << 16:
        reason = "is no proxy, such as http://user:password@host:port"
        raise InvalidValueError(_VARIABLE, None, reason)
    if (found["scheme"] or "http").lower() != "http":
        reason = f"names a {found['scheme']} proxy; only http ones can be used"
        raise InvalidValueError(_VARIABLE, None, reason)
    return Proxy(host=found["host"].strip("[]"), port=port, user=found["user"] or "")
