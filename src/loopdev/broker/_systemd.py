# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What systemd says to a service, and a service to it: sockets, readiness, watchdog, journal.

Source: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3) and the native journal protocol.
"""

from __future__ import annotations

import errno
import os
import socket
import sys

from loopdev.errors import BrokerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_FIRST_FD = 3
_JOURNAL = "/run/systemd/journal/socket"
_SYSLOG_INFO, _SYSLOG_WARNING = "6", "4"
# Events that somebody should look at.
_WARNINGS = ("problem", "refused", "failed", "lost", "cut off", "policy kept")


def listening_socket() -> socket.socket | None:
    """Return the socket that systemd listens on for us, None if it does not.

    Raises:
        BrokerError: There is more than one, or it is of another kind.
    """
    mine = os.environ.get("LISTEN_PID") == str(os.getpid())
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # not for those whom we start
    if not mine or not count.isdecimal() or count == "0":
        return None
    if count != "1":
        raise BrokerError(errno.EINVAL, "LISTEN_FDS", f"{count} sockets were passed, and not one")
    try:
        found = socket.socket(fileno=_FIRST_FD)
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as exc:
        raise BrokerError(errno.ENOTSOCK, "LISTEN_FDS", "what was passed is no socket") from exc
    os.set_inheritable(_FIRST_FD, False)
    if (found.family, found.type, listens) != (socket.AF_UNIX, socket.SOCK_SEQPACKET, 1):
        reason = "the socket must be ListenSequentialPacket="
        raise BrokerError(errno.EPROTOTYPE, "LISTEN_FDS", reason)
    return found


def notify(message: str) -> None:
    """Tell systemd; nobody listens where we were not started by it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(message.encode(), address)
        except OSError:
            pass  # it will find out for itself


def watchdog_interval() -> float | None:
    """Return how often to send WATCHDOG=1, in seconds; None: nobody watches."""
    wanted = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID")
    if not wanted.isdecimal() or (pid is not None and pid != str(os.getpid())):
        return None
    return int(wanted) / 2e6


class EventLog:
    """Writes events to the journal with a field for each fact, or as lines to standard error."""

    def __init__(self) -> None:
        self._journal = _journal() if _stderr_is_journal() else None

    def __call__(self, event: str, facts: dict[str, object]) -> None:
        """Write one event."""
        known = {key: value for key, value in facts.items() if value is not None}
        line = " ".join([event, *(f"{key}={_quoted(value)}" for key, value in known.items())])
        if self._journal is None:
            try:
                print(line, file=sys.stderr, flush=True)  # noqa: T201 - this is the log
            except OSError:
                pass  # ENOSPC, EPIPE: as with the journal
            return
        fields = {
            "MESSAGE": line,
            "PRIORITY": _SYSLOG_WARNING if event in _WARNINGS else _SYSLOG_INFO,
            "SYSLOG_IDENTIFIER": "loopdev",
            "LOOPDEV_EVENT": event,
            **{f"LOOPDEV_{key.upper()}": str(value) for key, value in known.items()},
        }
        try:
            self._journal.send(b"".join(_field(key, value) for key, value in fields.items()))
        except OSError:
            pass  # a journal that is full or restarting must not stop the broker


def _quoted(value: object) -> str:
    text = str(value)
    return ascii(text) if not text.isprintable() or " " in text or not text else text


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"


def _stderr_is_journal() -> bool:
    stream = os.environ.get("JOURNAL_STREAM", "")
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def _journal() -> socket.socket | None:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(_JOURNAL)
    except OSError:
        sock.close()
        return None
    sock.setblocking(False)
    return sock


def watch(every: Callable[[float, Callable[[], None]], None]) -> None:
    """Have the watchdog told that the event loop is alive, if there is one."""
    interval = watchdog_interval()
    if interval is not None:
        every(interval, lambda: notify("WATCHDOG=1"))
