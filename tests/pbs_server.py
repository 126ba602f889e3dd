# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A Proxmox Backup Server for tests, over a datastore directory: TLS, login, lists, sessions.

It is written from the protocol's description, shares no code with what is tested, and refuses what
the real one refuses. It can be told to misbehave; see Faults.

Usage, as a program: python tests/pbs_server.py STORE [--port N] [--forks] [--latency S] ...
"""

from __future__ import annotations

import argparse
import base64
import datetime as dt
import hashlib
import hmac
import json
import mmap
import os
import re
import signal
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

import h2.config
import h2.connection
import h2.events
import h2.settings
import h11
import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PROTOCOL = "proxmox-backup-reader-protocol-v1"
STORE = "store1"
USER, PASSWORD = "backup@pbs", "correct horse"
TOKEN, SECRET = "backup@pbs!map", "0b7c9e36-6d4f-4a52-9d5c-5d6a0f3f8a11"
SLOW_FRAME = 64 << 10
SAFE = r"[A-Za-z0-9_][A-Za-z0-9._\-]*"
TIME = "%Y-%m-%dT%H:%M:%SZ"
TICKET_LIFE = 7200
WRONG = "parameter verification failed"


class RefusedError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status, self.text = status, text


class GoneError(Exception):
    """The connection is to end now."""


@dataclass
class Faults:
    """How to misbehave; all that a connection does is told here, too.

    Attributes:
        latency: Seconds before each answer in a session.
        bandwidth: Bytes a second, for each session.
        reset_after: Reset a session's connection when so many bytes of it were sent.
        end_after: The same, but end it: mostly in the middle of a frame.
        goaway_after: Say goodbye after so many requests in a session.
        answers: (status, text) for a path, or for a prefix of it, instead of what it would be.
        times: How often that is done for each fault but latency and bandwidth; -1: always.
        wrong_length: Announce more bytes than are sent.
        wrong_bytes: Change a byte of each chunk.
        swap: Answer each chunk request with this other chunk.
        too_much: Send this many bytes for a chunk.
        silent: Answer nothing more in sessions that there are, not even a ping.
        deaf: Answer no request in sessions, but all pings.
        hangs: Accept connections, and say nothing.
        plain: Speak no TLS.
        garbage: Send this instead of HTTP/2.
        upgrade: (status, text) for each reader request.
    """

    latency: float = 0.0
    bandwidth: float = 0.0
    reset_after: int = -1
    end_after: int = -1
    goaway_after: int = -1
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    times: int = -1
    wrong_length: bool = False
    wrong_bytes: bool = False
    swap: str = ""
    too_much: int = 0
    silent: bool = False
    deaf: bool = False
    hangs: bool = False
    plain: bool = False
    garbage: bytes = b""
    upgrade: tuple[int, str] | None = None

    def due(self) -> bool:
        """Return whether to misbehave this time."""
        if self.times > 0:
            self.times -= 1
            return True
        return self.times < 0


def make_certificate(directory: Path, *hosts: str) -> tuple[Path, str]:
    """Write a key with its own certificate, and return that and its fingerprint."""
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pbs test")])
    now = dt.datetime.now(dt.UTC)
    names: list[x509.GeneralName] = []
    for host in hosts or ("localhost", "127.0.0.1", "::1"):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = directory / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    der = certificate.public_bytes(serialization.Encoding.DER)
    return path, hashlib.sha256(der).hexdigest()


def with_colons(fingerprint: str) -> str:
    return ":".join(fingerprint[i : i + 2] for i in range(0, 64, 2))


class Store:
    """The datastore directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def namespace(self, name: str) -> Path:
        parts = name.split("/") if name else []
        if len(parts) > 7 or not all(re.fullmatch(SAFE, part) for part in parts):
            raise RefusedError(
                400, f"parameter verification failed - 'ns': invalid namespace '{name}'"
            )
        path = self.root.joinpath(*(step for part in parts for step in ("ns", part)))
        if not path.is_dir():
            raise RefusedError(400, f"namespace '{name}' does not exist")
        return path

    def namespaces(self, parent: str, depth: int) -> list[str]:
        found = [parent]
        inside = self.namespace(parent) / "ns"
        if depth and inside.is_dir():
            for path in inside.iterdir():
                found += self.namespaces(f"{parent}/{path.name}".strip("/"), depth - 1)
        return found

    def groups(self, ns: str) -> list[tuple[str, str]]:
        root = self.namespace(ns)
        return [
            (kind, path.name)
            for kind in ("host", "vm", "ct")
            if (root / kind).is_dir()
            for path in (root / kind).iterdir()
        ]

    def times(self, ns: str, kind: str, name: str) -> list[int]:
        directory = self.namespace(ns) / kind / name
        if not directory.is_dir():
            return []
        names = [path.name for path in directory.iterdir() if path.is_dir()]
        return [seconds_of(when) for when in names]

    def snapshot(self, ns: str, kind: str, name: str, seconds: int) -> Path:
        when = time.strftime(TIME, time.gmtime(seconds))
        path = self.namespace(ns) / kind / name / when
        if not path.is_dir():
            raise RefusedError(400, f"snapshot {kind}/{name}/{when} does not exist.")
        return path

    def describe(self, ns: str, kind: str, name: str, seconds: int) -> dict[str, object]:
        path = self.snapshot(ns, kind, name, seconds)
        found: dict[str, object] = {
            "backup-type": kind,
            "backup-id": name,
            "backup-time": seconds,
            "protected": (path / ".protected").exists(),
            "owner": "root@pam",
        }
        present = sorted(
            file.name for file in path.iterdir() if re.fullmatch(r".*\.([fd]idx|blob)", file.name)
        )
        try:
            manifest = json.loads(decode((path / "index.json.blob").read_bytes()))
        except (OSError, ValueError):
            found["files"] = [{"filename": file} for file in present]
            return found
        files = [
            {
                "filename": f["filename"],
                "crypt-mode": f.get("crypt-mode", "none"),
                "size": f["size"],
            }
            for f in manifest["files"]
        ]
        size = (path / "index.json.blob").stat().st_size
        files.append({"filename": "index.json.blob", "crypt-mode": "none", "size": size})
        known = [file["filename"] for file in files]
        files += [{"filename": file} for file in present if file not in known]
        unprotected = manifest.get("unprotected") or {}
        if "key-fingerprint" in unprotected:
            found["fingerprint"] = unprotected["key-fingerprint"]
        if "notes" in unprotected:
            found["comment"] = unprotected["notes"].partition("\n")[0]
        if "verify_state" in unprotected:
            found["verification"] = unprotected["verify_state"]
        return found | {"files": files, "size": sum(file["size"] for file in manifest["files"])}


def seconds_of(when: str) -> int:
    import calendar

    return calendar.timegm(time.strptime(when, TIME))


def decode(blob: bytes) -> bytes:
    """Return what is in a blob that is not encrypted."""
    magic, crc = struct.unpack_from("<8sI", blob)
    body = blob[12:]
    if zlib.crc32(body) != crc:
        raise ValueError("crc")
    for text in ("uncompressed", "zstd compressed"):
        if magic == hashlib.sha256(f"Proxmox Backup {text} blob v1.0".encode()).digest()[:8]:
            return (
                zstandard.ZstdDecompressor().decompressobj().decompress(body)
                if "z" in text
                else body
            )
    raise ValueError("magic")


class PbsServer:
    """The server. Use it in a ``with``; *port* is known then.

    Attributes:
        faults: How it misbehaves.
        log: (method, path) of all requests that came, those in sessions as "H2".
        privileges: Who may do what: "audit" (lists) and "read".
        delays: Whether refusals take as long as the real one's.
        busiest: How many requests came in the session that had most.
    """

    def __init__(self, store: Path, certificate: Path, host: str = "127.0.0.1", port: int = 0):
        self.store = Store(store)
        self.certificate = certificate
        self.faults = Faults()
        self.log: list[tuple[str, str]] = []
        self.users = {USER: PASSWORD, "root@pam": "root password"}
        self.tokens = {TOKEN: SECRET}
        self.privileges = {who: {"audit", "read"} for who in (*self.users, *self.tokens)}
        self.second_factor: set[str] = set()
        self.locked: set[str] = set()
        self.delays, self.busiest = False, 0
        self.max_streams: int | None = None
        self._secret = os.urandom(32)
        self.valid_from = 0  # tickets that are older are not taken any more
        self.host, self.port = host, port
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None

    def __enter__(self) -> PbsServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def repository(self) -> str:
        return f"{USER}@{self.host}:{self.port}:{STORE}"

    @property
    def token_repository(self) -> str:
        return f"{TOKEN}@{self.host}:{self.port}:{STORE}"

    def listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listener = socket.create_server(
            (self.host.strip("[]"), self.port), family=family, backlog=64
        )
        self.port = listener.getsockname()[1]
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate)
        return listener

    def start(self) -> None:
        """Listen, on the same port each time."""
        self._listener = self.listen()
        accepting = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._threads = [accepting]
        accepting.start()

    def stop(self) -> None:
        """End all connections, and listen no more."""
        listener, self._listener = self._listener, None
        if listener is not None:
            try:
                listener.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            listener.close()
        self.drop()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def drop(self) -> None:
        """End all connections, without a word."""
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    @property
    def sessions(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def requests(self, start: str) -> list[str]:
        return [path for _, path in self.log if path.startswith(start)]

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            self.serve(sock)
        finally:
            with self._lock:
                self._connections.discard(sock)
            sock.close()

    def serve(self, sock: socket.socket) -> None:
        """Serve one connection until it ends."""
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.faults.hangs:
                while sock.recv(65536):
                    pass
                return
            if self.faults.plain:
                sock.recv(65536)
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                return
            # The socket stays ours: it is what drop() shuts down.
            with socket.socket(fileno=os.dup(sock.fileno())) as copy:
                with self._context.wrap_socket(copy, server_side=True) as tls:
                    Http1(self, tls, sock).run()
        except (OSError, GoneError, h11.RemoteProtocolError):
            pass

    # Who somebody is

    def ticket(self, user: str, when: float | None = None) -> str:
        text = f"PBS:{user}:{int(time.time() if when is None else when):08X}"
        return f"{text}::{self._sign(text)}"

    def _sign(self, text: str) -> str:
        digest = hmac.digest(self._secret, text.encode(), "sha256")
        return base64.b64encode(digest).decode().rstrip("=")

    def user_of(self, ticket: str) -> str | None:
        text, _, signature = ticket.partition("::")
        parts = text.split(":")
        if (
            len(parts) != 3
            or parts[0] != "PBS"
            or not hmac.compare_digest(signature, self._sign(text))
        ):
            return None
        issued = int(parts[2], 16)
        if not -300 <= time.time() - issued <= TICKET_LIFE or issued < self.valid_from:
            return None
        return parts[1]

    def log_in(self, body: bytes) -> dict[str, object]:
        try:
            given = json.loads(body)
            user, password = given["username"], given["password"]
        except (ValueError, KeyError, TypeError):
            raise RefusedError(
                400, "parameter verification failed - 'username': parameter is missing"
            ) from None
        if set(given) - {"username", "password", "path", "privs", "port", "tfa-challenge"}:
            raise RefusedError(400, "parameter verification failed: additional properties")
        if user not in self.users or (
            password != self.users[user] and self.user_of(password) != user
        ):
            raise RefusedError(401, "permission check failed.")
        if user in self.second_factor:
            return {"username": user, "ticket": "PBS:!tfa!%7B%22totp%22%3Atrue%7D:65A1B2C3::c2ln"}
        now = f"{int(time.time()):08X}"
        return {
            "username": user,
            "ticket": self.ticket(user),
            "CSRFPreventionToken": f"{now}:{self._sign(now + user)}",
        }

    def authenticate(self, headers: dict[str, str], method: str) -> str:
        kind, mark, value = (headers.get("authorization") or "").partition("=")
        if not mark:
            kind, _, value = kind.partition(" ")
        if kind == "PBSAPIToken":
            name, _, secret = value.rpartition(":")
            if name in self.tokens and self.tokens[name] == unquote(secret):
                return name
            raise RefusedError(401, "authentication failed")
        for part in (headers.get("cookie") or "").split(";"):
            name, _, ticket = part.strip().partition("=")
            if name in ("PBSAuthCookie", "__Host-PBSAuthCookie"):
                user = self.user_of(unquote(ticket))
                if user is not None:
                    token = headers.get("csrfpreventiontoken", "")
                    if method != "GET" and token[9:] != self._sign(token[:8] + user):
                        raise RefusedError(401, "authentication failed - invalid CSRF token")
                    return user
        raise RefusedError(401, "authentication failed")

    def may(self, user: str, privilege: str) -> bool:
        return privilege in self.privileges.get(user, ())

    # REST

    def rest(self, path: str, query: dict[str, str], user: str) -> object:
        if path == "/version":
            check(query, set(), set())
            return {"version": "3.2", "release": "4", "repoid": "test"}
        if path == "/admin/datastore":
            check(query, set(), set())
            return [{"store": STORE}]
        found = re.fullmatch(r"/admin/datastore/([^/]+)/(namespace|groups|snapshots|files)", path)
        if found is None:
            raise RefusedError(404, f"Path '/api2/json{path}' not found.")
        if found[1] != STORE:
            raise RefusedError(400, f"no such datastore '{found[1]}'")
        if not self.may(user, "audit"):
            raise RefusedError(403, "permission check failed")
        return getattr(self, f"_{found[2]}")(query)

    def _namespace(self, query: dict[str, str]) -> object:
        check(query, set(), {"parent", "max-depth"})
        depth = int(query.get("max-depth", 7))
        return [{"ns": name} for name in self.store.namespaces(query.get("parent", ""), depth)]

    def _groups(self, query: dict[str, str]) -> object:
        check(query, set(), {"ns"})
        ns = query.get("ns", "")
        found = []
        for kind, name in self.store.groups(ns):
            times = self.store.times(ns, kind, name)
            if times:
                found.append(
                    {
                        "backup-type": kind,
                        "backup-id": name,
                        "last-backup": max(times),
                        "backup-count": len(times),
                        "files": [],
                    }
                )
        return found

    def _snapshots(self, query: dict[str, str]) -> object:
        check(query, set(), {"ns", "backup-type", "backup-id"})
        ns = query.get("ns", "")
        found = [
            self.store.describe(ns, kind, name, seconds)
            for kind, name in self.store.groups(ns)
            if query.get("backup-type", kind) == kind and query.get("backup-id", name) == name
            for seconds in self.store.times(ns, kind, name)
        ]
        # The order is nobody's to rely on.
        return sorted(found, key=lambda raw: hashlib.sha256(repr(raw).encode()).digest())

    def _files(self, query: dict[str, str]) -> object:
        kind, name, seconds = backup(query, {"ns"})
        return self.store.describe(query.get("ns", ""), kind, name, seconds)["files"]


def check(query: dict[str, str], needed: set[str], allowed: set[str]) -> None:
    for name in needed - set(query):
        raise RefusedError(
            400,
            f"{WRONG} - '{name}': parameter is missing and it is not optional.",
        )
    for name in set(query) - needed - allowed:
        raise RefusedError(
            400,
            f"{WRONG} - '{name}': schema does not allow additional properties.",
        )


def backup(query: dict[str, str], allowed: set[str]) -> tuple[str, str, int]:
    check(query, {"backup-type", "backup-id", "backup-time"}, allowed)
    kind, name, when = query["backup-type"], query["backup-id"], query["backup-time"]
    if kind not in ("vm", "ct", "host") or not re.fullmatch(SAFE, name) or not when.isdecimal():
        raise RefusedError(
            400, "parameter verification failed - 'backup-type': value does not match"
        )
    return kind, name, int(when)


class Http1:
    """The HTTP/1.1 of one connection."""

    def __init__(self, server: PbsServer, tls: ssl.SSLSocket, sock: socket.socket) -> None:
        self._server, self._tls, self._sock = server, tls, sock
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=8192)

    def run(self) -> None:
        while True:
            request, body = self._receive()
            self._answer(request, body)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    def _receive(self) -> tuple[h11.Request, bytes]:
        request, body = None, b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(self._tls.recv(65536))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                return request, body
            elif event is h11.PAUSED and request is not None:
                return request, body
            else:
                raise GoneError

    def _answer(self, request: h11.Request, body: bytes) -> None:
        headers = {name.decode(): value.decode() for name, value in request.headers}
        parts = urlsplit(request.target.decode())
        method = request.method.decode()
        self._server.log.append((method, parts.path))
        faults = self._server.faults
        try:
            if len(request.target) > 3072:
                raise RefusedError(400, "request line too long")
            for path, (status, text) in faults.answers.items():
                if parts.path.startswith(path) and faults.due():
                    raise RefusedError(status, text)
            query = dict(
                parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            )
            if parts.path == "/api2/json/access/ticket" and method == "POST":
                if headers.get("content-type") != "application/json":
                    raise RefusedError(400, "unsupported content type")
                return self._send(200, json.dumps({"data": self._server.log_in(body)}))
            user = self._server.authenticate(headers, method)
            if not parts.path.startswith("/api2/json") or method != "GET":
                raise RefusedError(404, f"Path '{parts.path}' not found.")
            if parts.path == "/api2/json/reader":
                return self._upgrade(request, headers, query, user)
            data = self._server.rest(parts.path.removeprefix("/api2/json"), query, user)
            return self._send(200, json.dumps({"data": data, "total": 1}))
        except RefusedError as exc:
            if self._server.delays:
                time.sleep({401: 3, 403: 0.5}.get(exc.status, 0))
            # The type lies, as the real one's does.
            return self._send(exc.status, exc.text)

    def _send(self, status: int, body: str) -> None:
        data = body.encode()
        headers = [
            ("content-type", "application/json;charset=UTF-8"),
            ("content-length", str(len(data))),
        ]
        head = h11.Response(status_code=status, headers=headers)
        for event in (head, h11.Data(data=data), h11.EndOfMessage()):
            self._tls.sendall(self._http.send(event) or b"")

    def _upgrade(
        self, request: h11.Request, headers: dict[str, str], query: dict[str, str], user: str
    ) -> None:
        server = self._server
        if server.faults.upgrade is not None and server.faults.due():
            raise RefusedError(*server.faults.upgrade)
        kind, name, seconds = backup(query, {"store", "ns", "debug"})
        check(query, {"store"}, set(query))
        if query["store"] != STORE:
            raise RefusedError(400, f"no such datastore '{query['store']}'")
        if not server.may(user, "read"):
            raise RefusedError(400, f"no permissions on /datastore/{STORE}")
        if request.http_version != b"1.1":
            raise RefusedError(400, "unexpected http version")
        protocol = headers.get("upgrade")
        if protocol is None or "upgrade" not in headers.get("connection", "").lower():
            raise RefusedError(400, "missing Upgrade header")
        if protocol != PROTOCOL:
            raise RefusedError(400, "invalid protocol name")
        path = server.store.snapshot(query.get("ns", ""), kind, name, seconds)
        if f"{kind}/{name}" in server.locked:
            raise RefusedError(400, f"snapshot {kind}/{name} is locked by another operation")
        if not (path / "index.json.blob").exists():
            raise RefusedError(400, f"snapshot {kind}/{name} does not exist.")
        reply = h11.InformationalResponse(
            status_code=101, headers=[("connection", "upgrade"), ("upgrade", PROTOCOL)]
        )
        self._tls.sendall(self._http.send(reply) or b"")
        Session(server, self._tls, self._sock, path).run(self._http.trailing_data[0])


class Session:
    """A reader session."""

    def __init__(self, server: PbsServer, tls: ssl.SSLSocket, sock: socket.socket, snapshot: Path):
        self._server = server
        self._tls, self._sock, self._snapshot = tls, sock, snapshot
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self._h2 = h2.connection.H2Connection(config)
        settings = {
            h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 33554432,
            h2.settings.SettingCodes.MAX_FRAME_SIZE: 4 << 20,
        }
        if server.max_streams is not None:
            settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = server.max_streams
        self._h2.local_settings = h2.settings.Settings(client=False, initial_values=settings)
        self._allowed: set[str] = set()
        self._due: list[tuple[float, int, str]] = []
        self._bodies: dict[int, memoryview] = {}
        self._sent = self._asked = 0
        self._mute = False

    @property
    def _faults(self) -> Faults:
        return self._server.faults

    def run(self, first: bytes) -> None:
        if self._faults.garbage and self._faults.due():
            self._tls.sendall(self._faults.garbage)
            raise GoneError
        self._h2.initiate_connection()
        self._flush()
        data = first
        while True:
            if data:
                for event in self._h2.receive_data(data):
                    self._hear(event)
                self._flush()
            self._answer_due()
            self._send_bodies()
            data = self._receive()

    def _receive(self) -> bytes:
        if self._bodies and self._tls.pending() == 0:
            wait = 0.0
        else:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
        self._tls.settimeout(wait)
        try:
            data = self._tls.recv(65536)
        except (TimeoutError, ssl.SSLWantReadError):
            return b""
        finally:
            self._tls.settimeout(None)
        if not data:
            raise GoneError
        return data

    def _hear(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            headers = dict(event.headers)
            self._server.log.append(("H2", headers[":path"]))
            self._asked += 1
            self._server.busiest = max(self._server.busiest, self._asked)
            if self._faults.deaf:
                return
            if 0 <= self._faults.goaway_after < self._asked and self._faults.due():
                self._h2.close_connection(last_stream_id=0)
                self._flush()
                raise GoneError
            when = time.monotonic() + self._faults.latency
            self._due.append(
                (when, event.stream_id, headers[":path"] if headers[":method"] == "GET" else "/?")
            )
        elif isinstance(event, h2.events.StreamReset):
            self._bodies.pop(event.stream_id, None)
            self._due = [due for due in self._due if due[1] != event.stream_id]
        elif isinstance(event, h2.events.ConnectionTerminated):
            raise GoneError

    def _answer_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, stream, path = self._due.pop(0)
            try:
                for start, (status, text) in self._faults.answers.items():
                    if path.startswith(start) and self._faults.due():
                        raise RefusedError(status, text)
                self._answer(stream, 200, self._body(path))
            except RefusedError as exc:
                if self._server.delays and exc.status == 401:
                    time.sleep(3)
                self._answer(stream, exc.status, exc.text.encode())

    def _body(self, target: str) -> bytes | mmap.mmap:
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        if len(parts.query) > 4096:
            raise RefusedError(400, "query too long")
        if parts.path == "/download":
            check(query, {"file-name"}, set())
            return self._download(query["file-name"])
        if parts.path == "/chunk":
            check(query, {"digest"}, set())
            return self._chunk(query["digest"])
        if parts.path == "/speedtest":
            return b"A" * (1 << 20)
        raise RefusedError(404, f"Path '{parts.path}' not found.")

    def _download(self, name: str) -> bytes:
        path = self._snapshot / name
        if not re.fullmatch(r"[^/]*\.(fidx|didx|blob)", name):
            raise RefusedError(400, "wrong file extension")
        try:
            data = path.read_bytes()
        except OSError:
            status = 404 if name.endswith(".blob") else 400
            raise RefusedError(status, f'open file "{path}" failed - not found') from None
        size = {"fidx": 32, "didx": 40}.get(name.rpartition(".")[2])
        if size is not None:
            digests = (data[at : at + size][-32:] for at in range(4096, len(data), size))
            self._allowed |= {digest.hex() for digest in digests}
        return data

    def _chunk(self, digest: str) -> bytes | mmap.mmap:
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise RefusedError(
                400, "parameter verification failed - 'digest': value does not match"
            )
        if digest not in self._allowed:
            raise RefusedError(401, f"download chunk {digest} not allowed")
        name = self._faults.swap or digest
        path = self._server.store.root / ".chunks" / name[:4] / name
        try:
            with open(path, "rb") as file:
                # What is mapped is not copied.
                flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
                data = mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ)
        except OSError as exc:
            raise RefusedError(400, f'reading file "{path}" failed: {exc.strerror}') from None
        if self._faults.too_much and self._faults.due():
            return bytes(self._faults.too_much)
        if self._faults.wrong_bytes and self._faults.due():
            data = data[:-1] + bytes([data[-1] ^ 1])
        return data

    def _answer(self, stream: int, status: int, body: bytes | mmap.mmap) -> None:
        headers = [(":status", str(status)), ("content-type", "application/octet-stream")]
        if self._faults.wrong_length and status == 200 and self._faults.due():
            headers.append(("content-length", str(len(body) + 1)))
        self._h2.send_headers(stream, headers, end_stream=not body)
        if body:
            self._bodies[stream] = memoryview(body)

    def _send_bodies(self) -> None:
        """Send a frame of each answer that is under way, one after the other."""
        for stream in [*self._bodies]:
            left = self._bodies[stream]
            most = SLOW_FRAME if self._faults.bandwidth else self._h2.max_outbound_frame_size
            count = min(self._h2.local_flow_control_window(stream), most, len(left))
            if count <= 0:
                continue
            self._send_data(stream, left[:count], end=count == len(left))
            if count == len(left):
                del self._bodies[stream]
            else:
                self._bodies[stream] = left[count:]
        self._flush()

    def _send_data(self, stream: int, data: memoryview, end: bool) -> None:
        """Send a DATA frame as the real one does: its head, and what is in it, uncopied.

        h2 would copy it three times, so it only keeps count here.
        """
        self._flush()
        if end:
            self._h2.send_data(stream, b"", end_stream=True)
            self._h2.data_to_send()
        else:
            self._h2.streams[stream].outbound_flow_control_window -= len(data)
        self._h2.outbound_flow_control_window -= len(data)
        high, low = divmod(len(data), 1 << 16)
        self._send(struct.pack(">BHBBI", high, low, 0, int(end), stream))
        self._send(data)

    def _flush(self) -> None:
        self._send(self._h2.data_to_send())

    def _send(self, data: bytes | memoryview) -> None:
        self._mute = self._mute or self._faults.silent
        if not data or self._mute:
            return
        for limit, end in ((self._faults.reset_after, self._reset), (self._faults.end_after, None)):
            if 0 <= limit < self._sent + len(data) and self._faults.due():
                self._tls.sendall(data[: limit - self._sent])
                if end is not None:
                    end()
                raise GoneError
        self._sent += len(data)
        if self._faults.bandwidth:
            time.sleep(len(data) / self._faults.bandwidth)
        self._tls.sendall(data)

    def _reset(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def main() -> int:
    """Serve until a signal comes; prints the port and the fingerprint, in one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--forks", action="store_true", help="a process for each connection")
    parser.add_argument("--congestion", default="", help="how TCP controls it, with --forks")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--directory", type=Path, required=True, help="for the certificate")
    args = parser.parse_args()
    certificate, fingerprint = make_certificate(args.directory, args.host)
    server = PbsServer(args.store, certificate, args.host, args.port)
    server.faults.latency = args.latency
    server.delays = True
    if not args.forks:
        server.start()
        print(server.port, with_colons(fingerprint), flush=True)
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = server.listen()
    if args.congestion:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, args.congestion.encode())
    print(server.port, with_colons(fingerprint), flush=True)
    while True:
        sock, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            server.serve(sock)
            os._exit(0)
        sock.close()


if __name__ == "__main__":
    sys.exit(main())
