# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""TLS connections to a server, and whether it is the one that it should be.

TLS works on memory, and the socket is apart from it: so nothing waits longer than it was told to,
one call of recv() fetches many records (OpenSSL's own way takes two calls for each), and a
connection can be handed to another process (see ``_handover``).
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import time

from loopdev.errors import CertificateError, ServerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn, Self

    from loopdev.images.pbs._proxy import Proxy
    from loopdev.images.pbs.repository import Repository

CONNECT_TIMEOUT = 10.0
_RECEIVE = 256 << 10  # bytes in one call; more is not quicker
# Of what several addresses have in common: one that does not answer must not take all the time.
_SHARE = 2
_MIN_RTT = struct.Struct("=148xI")  # tcpi_min_rtt in <linux/tcp.h>, microseconds, Linux 4.6


class Connection:
    """A TLS connection; used by one thread of one process at a time. See :meth:`open`.

    Every deadline is in seconds of :func:`time.monotonic`. All errors are ServerError.

    Attributes:
        server: Its name, for errors.
    """

    def __init__(self, server: str, sock: socket.socket, context: ssl.SSLContext, host: str):
        self.server, self._sock = server, sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._scratch = memoryview(bytearray(_RECEIVE))
        self._unsent = memoryview(b"")
        self._poll = select.poll()
        self._watched: dict[int, int] = {}
        self._ended = False
        # How long a round trip through a proxy took, in seconds: the kernel sees the proxy alone.
        self._way = 0.0

    @classmethod
    def open(cls, repository: Repository, context: ssl.SSLContext, deadline: float) -> Self:
        """Connect, and agree on keys; nothing is known of the server but what *context* checks.

        Raises:
            ServerError: It cannot be reached, or does not speak TLS.
            ssl.SSLCertVerificationError: The context does not like its certificate.
        """
        server = repository.server
        proxy, way = _find_proxy(), 0.0
        if proxy is None:
            sock = _connect(server, repository.address, repository.port, deadline)
        else:
            sock = _connect(f"{server} through the proxy", proxy.host, proxy.port, deadline)
        try:
            if proxy is not None:
                way = proxy.open_way(sock, repository, deadline)
            connection = cls(server, sock, context, repository.address)
            connection._way = way
            connection._shake_hands(deadline)
        except BaseException:
            sock.close()
            raise
        return connection

    def _shake_hands(self, deadline: float) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError:
                raise
            except ssl.SSLError as exc:
                self._fail(f"does not speak TLS as it should ({exc.reason or exc})", exc)
            else:
                self.flush()
                return
            while not self._fetch():
                self.wait(deadline)
            if self._ended and not self._incoming.pending:
                self._fail("ended the connection instead of speaking TLS")

    def fingerprint(self) -> bytes:
        """Return the SHA-256 of the server's certificate."""
        from _hashlib import openssl_sha256

        return openssl_sha256(self._tls.getpeercert(binary_form=True) or b"").digest()

    @property
    def delay(self) -> float:
        """How long a round trip takes, in seconds: the least that the kernel has seen."""
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
        known = len(info) == _MIN_RTT.size
        return max(self._way, float(_MIN_RTT.unpack(info)[0] / 1e6) if known else 0.0)

    def fileno(self) -> int:
        """Return the socket's descriptor, which stays owned here."""
        return self._sock.fileno()

    def read_into(self, buffer: memoryview) -> int | None:
        """Put some bytes into *buffer*; return how many, 0 at the end, None: there are none now."""
        while True:
            try:
                return self._tls.read(len(buffer), buffer)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                if self._ended:
                    return 0
                if not self._fetch() and not self._ended:
                    return None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0
            except ssl.SSLError as exc:
                self._fail(f"sent what is no TLS ({exc.reason or exc})", exc)

    def _fetch(self) -> bool:
        """Take what the socket has; return whether there was something, or the end."""
        try:
            count = self._sock.recv_into(self._scratch)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as exc:
            self._fail(f"the connection was lost ({exc.strerror or exc})", exc)
        if count:
            self._incoming.write(self._scratch[:count])
        else:
            self._ended = True
        return True

    def send(self, data: bytes) -> None:
        """Queue *data*, and send what can be sent without waiting."""
        if data:
            try:
                self._tls.write(data)
            except ssl.SSLError as exc:
                self._fail(f"the connection was lost ({exc.reason or exc})", exc)
        self.flush()

    def flush(self) -> bool:
        """Send what can be sent without waiting; return whether that was all.

        Where sending is not possible any more, that is for reading to find out: the server may
        have said why.
        """
        while True:
            if not self._unsent:
                self._unsent = memoryview(self._outgoing.read())
                if not self._unsent:
                    return True
            try:
                count = self._sock.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                count = len(self._unsent)
            self._unsent = self._unsent[count:]

    def poll(self, timeout: float, wake: int | None = None) -> None:
        """Wait until something can be read or, if there is something left, be sent.

        Args:
            timeout: The longest wait, in seconds.
            wake: A descriptor that ends the wait, too, when it can be read.
        """
        events = select.POLLIN | (0 if self.flush() else select.POLLOUT)
        wanted = {self._sock.fileno(): events} | ({wake: select.POLLIN} if wake is not None else {})
        if wanted != self._watched:
            self._poll = select.poll()
            for fd, mask in wanted.items():
                self._poll.register(fd, mask)
            self._watched = wanted
        self._poll.poll(max(0.0, timeout) * 1000)

    def wait(self, deadline: float) -> None:
        """Wait as poll() does.

        Raises:
            ServerError: The deadline has passed.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            self._fail("does not answer")
        self.poll(left)

    def receive(self, deadline: float) -> bytes:
        """Wait for some bytes, and return them; b"" at the end."""
        buffer = memoryview(bytearray(64 << 10))
        while (count := self.read_into(buffer)) is None:
            self.wait(deadline)
        return bytes(buffer[:count])

    def close(self) -> None:
        """Close the socket. Nothing is said to the server: another process may go on with it."""
        self._sock.close()

    def take_socket(self) -> socket.socket:
        """Give the socket away: what is left is of use only with :meth:`adopt`."""
        sock, self._sock = self._sock, socket.socket()
        self._sock.close()
        self._watched = {}
        return sock

    def adopt(self, fd: int) -> None:
        """Go on with a socket that was given away, in this process or one that made this one."""
        self._sock = socket.socket(fileno=fd)
        self._sock.setblocking(False)

    def _fail(self, reason: str, exc: Exception | None = None) -> NoReturn:
        raise ServerError(self.server, reason) from exc


def _find_proxy() -> Proxy | None:
    if not os.environ.get("ALL_PROXY"):
        return None  # and nothing to import
    from loopdev.images.pbs._proxy import find_proxy

    return find_proxy()


def _connect(server: str, host: str, port: int, deadline: float) -> socket.socket:
    """Return a connected socket that does not block."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise ServerError(server, f"unknown host ({reason})") from exc
    failure: OSError | None = None
    for number, (family, kind, protocol, _, address) in enumerate(found):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(left if number + 1 == len(found) else left / _SHARE)
            sock.connect(address)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
        except OSError as exc:
            sock.close()
            failure = exc
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ServerError(server, _why(failure)) from failure


def _why(exc: OSError | None) -> str:
    if exc is None or isinstance(exc, TimeoutError):
        return "does not answer"
    if isinstance(exc, ConnectionRefusedError):
        return "cannot be connected to: nothing listens on this port"
    return f"cannot be connected to ({exc.strerror or exc})"


class Trust:
    """How to tell that a server is the right one.

    Its certificate has the expected fingerprint, or it is valid for the host's name: either will
    do, as for the official client. The fingerprint is looked at first: that takes one connection.

    Args:
        fingerprint: 32 bytes, or None.
    """

    def __init__(self, fingerprint: bytes | None) -> None:
        self._fingerprint = fingerprint
        self._contexts: dict[bool, ssl.SSLContext] = {}

    def connect(self, repository: Repository, deadline: float) -> Connection:
        """Return a connection to a server that is trusted.

        Raises:
            CertificateError: It is not.
            ServerError: It cannot be reached.
        """
        if self._fingerprint is not None:
            connection = Connection.open(repository, self._context(verify=False), deadline)
            if connection.fingerprint() == self._fingerprint:
                return connection
            connection.close()
        try:
            return Connection.open(repository, self._context(verify=True), deadline)
        except ssl.SSLCertVerificationError as exc:
            seen = Connection.open(repository, self._context(verify=False), deadline)
            fingerprint = seen.fingerprint().hex(":")
            seen.close()
            raise CertificateError(repository.server, self._reason(exc), fingerprint) from exc

    def _context(self, verify: bool) -> ssl.SSLContext:
        if verify not in self._contexts:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if verify:
                context.load_default_certs()
            else:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._contexts[verify] = context
        return self._contexts[verify]

    def _reason(self, exc: ssl.SSLCertVerificationError) -> str:
        if self._fingerprint is not None:
            return f"its certificate is not the expected one, nor valid ({exc.verify_message})"
        return f"its certificate is not trusted ({exc.verify_message})"
