# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Where a map says what happens: the journal, a file, or the terminal it runs on.

Writing a message never raises and never waits: a full disk, a journal that is gone or a terminal
that was stopped must not hurt a map. No more than a bounded number of messages a second is
written; the others are counted.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from loopdev.errors import kernel_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class _Sink(Protocol):
        def write(self, priority: int, message: str) -> None: ...
        def close(self) -> None: ...
        def filenos(self) -> tuple[int, ...]: ...


# Priorities of syslog(3)
ERROR = 3
WARNING = 4
NOTICE = 5
INFO = 6

JOURNAL = "/run/systemd/journal/socket"

# How many messages each process writes in a second: enough to see what happens.
_RATE = 20
# A file that is as large as this is not written to, until somebody else has cut it; in bytes.
_LARGEST_FILE = 64 << 20
# What a message is cut to, in characters.
_LONGEST_MESSAGE = 256 << 10


class Log:
    """The place for the messages of one map. Its processes inherit it.

    Args:
        sink: Where they go; owned from here on.
    """

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self._second = 0
        self._count = 0

    def log(self, message: str, priority: int = INFO) -> None:
        """Write a message; whatever goes wrong with that is ignored.

        Args:
            message: Any text; it may have several lines.
            priority: ERROR, WARNING, NOTICE or INFO.
        """
        unwritten, second = 0, int(time.monotonic())
        if second != self._second:
            unwritten = max(0, self._count - _RATE)
            self._second, self._count = second, 0
        self._count += 1
        if self._count > _RATE:
            return
        if unwritten:
            self._write(WARNING, f"{unwritten} messages more were not written")
        self._write(priority, message[:_LONGEST_MESSAGE])

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors that are open for it; they stay owned here."""
        return self._sink.filenos()

    def close(self) -> None:
        """Close the file or socket: what is logged after that is lost."""
        self._sink.close()

    def _write(self, priority: int, message: str) -> None:
        try:
            self._sink.write(priority, message)
        except OSError:
            pass  # full, gone, or closed: there is nobody to tell


def open_log(target: str | None, name: str, fallback: str) -> Log:
    """Open the place for the messages of a map.

    Args:
        target: ``journal``, ``stderr``, the path of a file that is appended to, or None: the
            journal where there is one, else *fallback*.
        name: The map's.
        fallback: The path of the file where there is no journal. It and its directory are made
            when there is something to say; if they cannot be, that is lost.

    Raises:
        KernelError: The file cannot be opened, or there is no journal.
    """
    if target is None and not os.path.exists(JOURNAL):
        # Made with the first message: most maps have nothing to say.
        return Log(_File(fallback, name))
    if target == "stderr":
        return Log(_Terminal(name))
    if target in (None, "journal"):
        return Log(_Journal(name))
    assert target is not None
    file = _File(target, name)
    try:
        file.open()
    except OSError as exc:
        raise kernel_error(exc, target, "openat") from exc
    return Log(file)


def _printable(message: str) -> str:
    # Messages quote names that others chose: none may pass for another line, or steer a terminal.
    lines = message.rstrip("\n").split("\n")
    return "\n    ".join(
        line if line.isprintable() else line.encode("unicode_escape").decode() for line in lines
    )


class _Journal:
    """journald, by its native protocol. Source: systemd.io/JOURNAL_NATIVE_PROTOCOL."""

    def __init__(self, name: str) -> None:
        import _socket  # the module socket costs 6 ms

        try:
            os.stat(JOURNAL)
            # Not connected: the journal may be started again, and have another socket.
            kind = _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC
            self._socket = _socket.socket(_socket.AF_UNIX, kind)
        except OSError as exc:
            raise kernel_error(exc, JOURNAL, "socket") from exc
        self._flags = _socket.MSG_DONTWAIT
        self._rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
        self._name = name

    def write(self, priority: int, message: str) -> None:
        entry = _entry(
            MESSAGE=message,
            PRIORITY=str(priority),
            SYSLOG_IDENTIFIER="loopdev",
            LOOPDEV_MAP=self._name,
        )
        try:
            self._socket.sendto(entry, self._flags, JOURNAL)
        except OSError as exc:
            if exc.errno != errno.EMSGSIZE:
                raise
            self._send_as_file(entry)

    def filenos(self) -> tuple[int, ...]:
        return (self._socket.fileno(),)

    def close(self) -> None:
        self._socket.close()

    def _send_as_file(self, entry: bytes) -> None:
        import fcntl

        fd = os.memfd_create("loopdev-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(fd, entry)
            # The journal takes only what nobody can change any more.
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            rights = (*self._rights, fd.to_bytes(4, sys.byteorder))
            self._socket.sendmsg([b""], [rights], self._flags, JOURNAL)
        finally:
            os.close(fd)


def _entry(**fields: str) -> bytes:
    parts = []
    for key, text in fields.items():
        value = text.encode(errors="backslashreplace")
        if b"\n" in value:
            parts.append(b"%s\n%s%s\n" % (key.encode(), len(value).to_bytes(8, "little"), value))
        else:
            parts.append(b"%s=%s\n" % (key.encode(), value))
    return b"".join(parts)


class _File:
    """A line for each message, in one write, so that those of several processes do not mix."""

    def __init__(self, path: str, name: str) -> None:
        self._path, self._name = os.path.abspath(path), name
        self._fd, self._closed = -1, False

    def open(self) -> None:
        # O_NONBLOCK, in case it is a pipe that nobody empties.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        self._fd = os.open(self._path, flags, 0o640)

    def write(self, _priority: int, message: str) -> None:
        if self._closed:
            return
        if self._fd < 0:
            os.makedirs(os.path.dirname(self._path), 0o750, exist_ok=True)
            self.open()
        if os.fstat(self._fd).st_size >= _LARGEST_FILE:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        os.write(self._fd, f"{now} {self._name}: {_printable(message)}\n".encode())

    def filenos(self) -> tuple[int, ...]:
        return (self._fd,) if self._fd >= 0 else ()

    def close(self) -> None:
        fd, self._fd, self._closed = self._fd, -1, True
        if fd >= 0:
            os.close(fd)


class _Terminal:
    """The standard error of the command, which is somebody's terminal, a pipe, or a file."""

    def __init__(self, name: str) -> None:
        self._name = name

    def write(self, _priority: int, message: str) -> None:
        import select

        # It is shared with others, so O_NONBLOCK is not ours to set. What is ready takes that much
        # without a wait.
        poll = select.poll()
        poll.register(2, select.POLLOUT)
        left = f"loopdev: {self._name}: {_printable(message)}\n".encode()
        while left and poll.poll(0):
            left = left[os.write(2, left[: select.PIPE_BUF]) :]

    def filenos(self) -> tuple[int, ...]:
        return (2,)

    def close(self) -> None:
        pass
