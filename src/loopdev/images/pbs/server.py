# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A Proxmox Backup Server: how to get to it, who we are there, and its REST calls.

Source: proxmox-auth-api/src/api/access.rs, pbs-client/src/http_client.rs.
"""

from __future__ import annotations

import json
import time
from urllib.parse import quote, urlencode

from loopdev.errors import (
    AccessDeniedError,
    DeviceBusyError,
    EncryptionKeyError,
    ImageNotFoundError,
    InvalidValueError,
    LoopdevError,
    ServerError,
)
from loopdev.images.pbs._http1 import Exchange
from loopdev.images.pbs._wire import CONNECT_TIMEOUT, Trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from loopdev.images.pbs._http1 import Answer
    from loopdev.images.pbs._wire import Connection
    from loopdev.images.pbs.repository import Repository

REQUEST_TIMEOUT = 120.0
# A ticket is good for two hours. It is renewed with some of that left, by itself; later on it takes
# the password.
_RENEW_AFTER, _GOOD_FOR = 3600.0, 7140.0
_TFA = "PBS:!tfa!"
# What stays as it is in a cookie; Source: proxmox-auth-api, percent-encoding of tickets.
_COOKIE_SAFE = "".join(chr(c) for c in range(0x21, 0x7F) if chr(c) not in '"#<>`?{}')
_COOKIES = ("__Host-PBSAuthCookie=", "PBSAuthCookie=")
_LINE_MAX = 3072
Headers = list[tuple[str, str]]


class Server:
    """A server, and who we are there.

    It opens nothing before it is used, and holds no connection, so a process that was forked may
    use its copy.

    Args:
        repository: Where it is, and who we are.
        secret: The password, or the token's secret.
        fingerprint: That of its certificate, 32 bytes; None: the certificate must be valid.
    """

    def __init__(self, repository: Repository, secret: str, fingerprint: bytes | None) -> None:
        self.repository, self._secret = repository, secret
        self._trust = Trust(fingerprint)
        self._ticket, self._csrf, self._since = "", "", -_GOOD_FOR

    @property
    def name(self) -> str:
        """Host and port."""
        return self.repository.server

    def __repr__(self) -> str:
        return f"<Server {self.repository}>"

    def connect(self, deadline: float) -> Connection:
        """Return a new connection to the server, which is the right one.

        Raises:
            ServerError: It cannot be reached.
            CertificateError: It is not the right one.
        """
        return self._trust.connect(
            self.repository, min(deadline, time.monotonic() + CONNECT_TIMEOUT)
        )

    def authorize(self, exchange: Exchange | None, deadline: float) -> Headers:
        """Return the headers that say who we are; logs in if need be, on a connection of its own.

        Args:
            exchange: A connection to use instead.
            deadline: For that.

        Raises:
            AccessDeniedError: The password is wrong.
        """
        if self.repository.is_token:
            value = f"PBSAPIToken={self.repository.auth_id}:{quote(self._secret, safe='')}"
            return [("Authorization", value)]
        age = time.monotonic() - self._since
        if age >= _RENEW_AFTER:
            self._renew(exchange, age, deadline)
        cookie = f"PBSAuthCookie={quote(self._ticket, safe=_COOKIE_SAFE)}"
        return [("Cookie", cookie), ("CSRFPreventionToken", self._csrf)]

    def forget_ticket(self) -> bool:
        """Have the next call log in anew; return whether that may help."""
        held, self._since = self._ticket != "", -_GOOD_FOR
        return held and not self.repository.is_token

    def _renew(self, exchange: Exchange | None, age: float, deadline: float) -> None:
        if self._ticket and age < _GOOD_FOR:
            try:
                return self._log_in(exchange, self._ticket, deadline)
            except AccessDeniedError:
                self._ticket = ""
        return self._log_in(exchange, self._secret, deadline)

    def _log_in(self, exchange: Exchange | None, password: str, deadline: float) -> None:
        own = Exchange(self.connect(deadline)) if exchange is None else exchange
        try:
            body = json.dumps({"username": self.repository.auth_id, "password": password})
            kind = [("Content-Type", "application/json")]
            answer = own.ask("POST", "/api2/json/access/ticket", kind, body.encode(), deadline)
        finally:
            if exchange is None:
                own.close()
        if answer.status == 401:
            reason = f"the login of {self.repository.auth_id} was refused ({answer.text})"
            raise AccessDeniedError(self.name, reason, 401)
        data = data_of(self.name, answer)
        data = data if isinstance(data, dict) else {}
        ticket = data.get("ticket") or _ticket_of(answer.headers.get("set-cookie", ""))
        if ticket.startswith(_TFA):
            reason = f"{self.repository.auth_id} needs a second factor; use an API token instead"
            raise AccessDeniedError(self.name, reason)
        if not ticket:
            raise ServerError(self.name, "has answered a login without a ticket")
        self._ticket, self._csrf = ticket, data.get("CSRFPreventionToken") or ""
        self._since = time.monotonic()


def _ticket_of(cookie: str) -> str:
    for name in _COOKIES:
        if cookie.startswith(name):
            return cookie.removeprefix(name).partition(";")[0]
    return ""


def data_of(server: str, answer: Answer) -> Any:
    """Return the data in an answer.

    Raises:
        AccessDeniedError: It is 401 or 403.
        ImageNotFoundError: It says that something does not exist.
        ServerError: It is another refusal, or no JSON.
    """
    if answer.status != 200:
        raise refusal(server, answer.status, answer.text)
    try:
        return json.loads(answer.body)["data"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise ServerError(server, "has answered what is no JSON with data in it") from exc


def refusal(server: str, status: int, text: str, what: str = "", where: str = "") -> LoopdevError:
    """Return the error for an answer that is a refusal.

    Args:
        server: Who answered.
        status: Its status.
        text: Its message. Messages change from version to version: what they are looked at for is
            only which kind of error it is.
        what: What was asked for, as ImageNotFoundError has it.
        where: Its name.
    """
    lower = text.lower()
    if status in (401, 403) or "no permissions" in lower or "owner check failed" in lower:
        return AccessDeniedError(server, text or f"access denied ({status})", status)
    if status in (400, 404) and any(word in lower for word in _ABSENT):
        for kind in ("datastore", "namespace", "snapshot"):
            if kind in lower:
                return ImageNotFoundError(kind, f"{where} ({server}: {text})".strip())
        return ImageNotFoundError(what or "object", f"{where} ({server}: {text})".strip())
    if status == 400 and "locked" in lower:
        import errno

        return DeviceBusyError(errno.EAGAIN, where or server, "GET", f"is in use: {text}")
    return ServerError(server, f"{text or 'no reason given'} ({status})", status)


_ABSENT = ("not exist", "not found", "no such", "unknown datastore")


class Rest:
    """REST calls, on one connection as long as the server keeps it.

    Args:
        server: Whom to ask.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._exchange: Exchange | None = None

    def get(self, path: str, **parameters: str | int) -> Any:
        """Return the data of a call.

        Args:
            path: Below /api2/json.
            parameters: With dashes as underscores; empty ones are left out.

        Raises:
            AccessDeniedError: The server does not let us.
            ImageNotFoundError: There is no such thing.
            ServerError: Anything else goes wrong.
        """
        line = target(path, parameters)
        answer = self._ask(line)
        if answer.status == 401 and self.server.forget_ticket():
            answer = self._ask(line)
        return data_of(self.server.name, answer)

    def log_in(self) -> None:
        """Get a ticket, where one is needed."""
        deadline = time.monotonic() + REQUEST_TIMEOUT
        if not self.server.repository.is_token:
            self.server.authorize(self._connected(deadline), deadline)

    def _ask(self, line: str) -> Answer:
        deadline = time.monotonic() + REQUEST_TIMEOUT
        kept = self._exchange is not None
        try:
            return self._ask_once(line, deadline)
        except ServerError as exc:
            # A server may close what it kept open for long, just when it is used again.
            if not kept or exc.status is not None or time.monotonic() >= deadline:
                raise
            self.close()
            return self._ask_once(line, deadline)

    def _ask_once(self, line: str, deadline: float) -> Answer:
        headers = self.server.authorize(self._connected(deadline), deadline)
        return self._connected(deadline).ask("GET", line, headers, b"", deadline)

    def _connected(self, deadline: float) -> Exchange:
        if self._exchange is not None and self._exchange.next():
            return self._exchange
        self.close()
        self._exchange = Exchange(self.server.connect(deadline))
        return self._exchange

    def close(self) -> None:
        """Close the connection."""
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None


def target(path: str, parameters: dict[str, str | int]) -> str:
    """Return a path below /api2/json with its query."""
    given = {name.replace("_", "-"): value for name, value in parameters.items() if value != ""}
    line = f"/api2/json/{path}" + (f"?{urlencode(given)}" if given else "")
    if len(line) > _LINE_MAX:
        raise InvalidValueError("source", line, "is too long for the server")
    return line


def find_server(repository: Repository, fingerprint: str | None = None) -> Server:
    """Return a server, with the password and fingerprint that the environment has.

    Args:
        repository: Where it is.
        fingerprint: That of its certificate; None: the environment may have it.

    Raises:
        AccessDeniedError: There is no password.
        InvalidValueError: The fingerprint is none.
    """
    from loopdev.images.pbs.keys import parse_fingerprint
    from loopdev.images.pbs.passwords import from_environment, password

    try:
        if fingerprint is None:
            given = from_environment("PBS_FINGERPRINT", "fingerprint")
            fingerprint = given.decode(errors="replace").strip() if given else None
        pinned = None if fingerprint is None else parse_fingerprint(fingerprint.lower())
        if fingerprint is not None and pinned is None:
            reason = "is no fingerprint: 32 pairs of hexadecimal digits with colons"
            raise InvalidValueError("fingerprint", fingerprint, reason)
        what = "Secret" if repository.is_token else "Password"
        prompt = f"{what} of {repository.auth_id} at {repository.server}: "
        secret = password(prompt, "PBS_PASSWORD", "password")
    except EncryptionKeyError as exc:
        raise AccessDeniedError(repository.server, str(exc)) from exc
    try:
        return Server(repository, secret.decode(), pinned)
    except UnicodeDecodeError:
        raise AccessDeniedError(repository.server, "the password is not UTF-8") from None
