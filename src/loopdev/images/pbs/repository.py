# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Repository strings and URLs: which datastore on which server, and who asks. No I/O.

Source: pbs-client/src/backup_repo.rs, pbs-api-types/src/lib.rs.
"""

from __future__ import annotations

import re

from loopdev._value import Value
from loopdev.errors import InvalidValueError

SCHEME = "pbs://"
PORT = 8007
_DEFAULT_HOST, _DEFAULT_USER = "localhost", "root@pam"
_LENGTH_MAX = 256
_SAFE = r"[A-Za-z0-9_][A-Za-z0-9._\-]*"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9\-]*[A-Za-z0-9])?"
# A user may have an "@" in his name, so the realm follows the last one.
_USER = rf"[^\s:/\x00-\x1f\x7f]+@[A-Za-z0-9_][A-Za-z0-9._\-]{{1,31}}(?:!{_SAFE})?"
_HOST = rf"\[[0-9A-Fa-f:.]+\]|{_LABEL}(?:\.{_LABEL})*"
_FORM = re.compile(
    rf"(?:(?:(?P<user>{_USER})@)?(?P<host>{_HOST})(?::(?P<port>[0-9]{{1,5}}))?:)?"
    r"(?P<store>[A-Za-z0-9_][A-Za-z0-9._\-]{2,31})"
)


class Repository(Value):
    """A datastore on a server.

    Attributes:
        auth_id: Who asks: "user@realm", or "user@realm!token".
        auth_id_given: Whether that was said, or is what is meant when nothing is.
        host: A name or address; an IPv6 address in brackets.
        port: From 1 on.
        port_given: Whether that was said.
        host_given: Whether that was said.
        store: The datastore's name.
    """

    auth_id: str
    auth_id_given: bool
    host: str
    host_given: bool
    port: int
    port_given: bool
    store: str

    def __str__(self) -> str:
        if self.auth_id_given:
            return f"{self.auth_id}@{self.host}:{self.port}:{self.store}"
        if self.port_given:
            return f"{self.host}:{self.port}:{self.store}"
        return f"{self.host}:{self.store}" if self.host_given else self.store

    @property
    def server(self) -> str:
        """The server's name and port."""
        return f"{self.host}:{self.port}"

    @property
    def address(self) -> str:
        """The host as a resolver takes it: without brackets."""
        return self.host.strip("[]")

    @property
    def is_token(self) -> bool:
        """Whether the one who asks is an API token."""
        return "!" in self.auth_id.rpartition("@")[2]


def parse_repository(text: str) -> Repository:
    """Return the repository of "[[user@realm[!token]@]host[:port]:]datastore".

    Raises:
        InvalidValueError: It is none. Something that may be a password is not repeated.
    """
    found = _FORM.fullmatch(text) if len(text) <= _LENGTH_MAX else None
    port = int(found["port"] or PORT) if found else 0
    if found is None or not 0 < port < 1 << 16:
        reason = "is no repository, such as backup@pbs@host:8007:datastore, nor a directory"
        raise InvalidValueError("repository", _without_password(text), reason)
    return Repository(
        auth_id=found["user"] or _DEFAULT_USER,
        auth_id_given=found["user"] is not None,
        host=found["host"] or _DEFAULT_HOST,
        host_given=found["host"] is not None,
        port=port,
        port_given=found["port"] is not None,
        store=found["store"],
    )


def parse_url(text: str) -> tuple[Repository, str]:
    """Return the repository of "pbs://[user@realm@]host[:port]/datastore[/...]", and the rest.

    Names are written as in repository strings: nothing is percent-encoded.

    Raises:
        InvalidValueError: It is no such URL.
    """
    authority, _, path = text.removeprefix(SCHEME).partition("/")
    store, _, rest = path.partition("/")
    try:
        return parse_repository(f"{authority}:{store}"), rest
    except InvalidValueError as exc:
        reason = "is no URL of a datastore, such as pbs://backup@pbs@host:8007/datastore"
        raise InvalidValueError("repository", _without_password(text), reason) from exc


def _without_password(text: str) -> str:
    """Return *text* without what follows the first colon of who asks: people write passwords."""
    scheme = SCHEME if text.startswith(SCHEME) else ""
    who, at, where = text.removeprefix(scheme).rpartition("@")
    name, colon, _ = who.partition(":")
    return f"{scheme}{name}{colon}***{at}{where}" if colon else text
