# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""An HTTP proxy that knows CONNECT, for tests."""

from __future__ import annotations

import base64
import socket
import threading


class HttpProxy:
    """The proxy. Use it in a ``with``; *port* is known then.

    Attributes:
        asked: Where it was to connect, in order.
        names: Addresses of names that only the proxy knows.
        credentials: "user:password" that it demands, or "".
        answer: What it says instead of connecting; b"": nothing; None: it does what it is asked.
        stays: Whether it keeps the connection when it has said that.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.names: dict[str, str] = {}
        self.credentials = ""
        self.answer: bytes | None = None
        self.stays = False
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> HttpProxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._sockets):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1)
            answer = self._decide(head.decode())
            if answer is None:
                self._connect(client)
                return
            client.sendall(answer)
            if not self.stays:
                client.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def _decide(self, head: str) -> bytes | None:
        first, *lines = head.split("\r\n")
        method, target, version = first.split(" ")
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        assert (method, version, headers["host"]) == ("CONNECT", "HTTP/1.1", target)
        self.asked.append(target)
        if self.answer is not None:
            return self.answer
        given = headers.get("proxy-authorization", "")
        expected = f"Basic {base64.b64encode(self.credentials.encode()).decode()}".lower()
        if self.credentials and given != expected:
            return b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
        return None

    def _connect(self, client: socket.socket) -> None:
        host, _, port = self.asked[-1].rpartition(":")
        try:
            server = socket.create_connection((self.names.get(host, host), int(port)))
        except OSError:
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
            client.shutdown(socket.SHUT_RDWR)
            return
        self._sockets.append(server)
        client.sendall(b"HTTP/1.1 200 Connection established\r\nVia: a test\r\n\r\n")
        back = threading.Thread(target=_copy, args=(server, client), daemon=True)
        back.start()
        _copy(client, server)


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass
