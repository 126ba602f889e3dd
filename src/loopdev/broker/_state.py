# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the broker has, written down before anybody can use it, for the next start after a SIGKILL.

One JSON object a line: a number, and what it is. Appending one costs some microseconds; when most
lines are of the past, a new file takes the place of the old one. Nothing is synced: after a crash
of the machine there are no devices either, which the boot's id tells.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os

from loopdev.errors import BrokerError
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    Entry = dict[str, object]

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
# Lines of the past that are put up with, beside as many as there are of the present.
_SLACK = 1000


class State:
    """The numbers that are ours, in a file that is locked for as long as this object is open.

    Attributes:
        path: The file.
        live: By number, what was written down last.
        directories: Those in which nodes of ours are.
    """

    def __init__(
        self, path: str, fd: OwnedFd, live: dict[int, Entry], directories: list[str]
    ) -> None:
        self.path, self._fd, self.live, self.directories = path, fd, live, directories
        self._lines = 0
        self._identity = (0, 0)

    @classmethod
    def open(cls, path: str) -> Self:
        """Take over what an earlier broker has left, and go on from there.

        Raises:
            BrokerError: EADDRINUSE: another broker uses it; or it cannot be opened.
        """
        fd = _open_locked(path)
        try:
            state = cls(path, fd, *_read(fd.fileno()))
            state._rewrite()
        except BaseException:
            fd.close()
            raise
        return state

    def identity(self) -> tuple[int, int]:
        """Return st_dev and st_ino of the file."""
        return self._identity

    def use(self, directories: list[str]) -> None:
        """Write down where nodes are, before there are any."""
        self.directories = directories
        self._rewrite()

    def put(self, number: int, **facts: object) -> None:
        """Write down what a number is."""
        self.live[number] = facts
        self._append({"number": number, **facts})

    def drop(self, number: int) -> None:
        """Write down that a number is ours no longer."""
        if self.live.pop(number, None) is not None:
            self._append({"number": number, "gone": True})

    def _append(self, entry: Entry) -> None:
        if self._lines > 2 * len(self.live) + _SLACK:
            self._rewrite()
        else:
            os.write(self._fd.fileno(), _line(entry))
            self._lines += 1

    def _rewrite(self) -> None:
        """Put a file in place that has only what is so now."""
        lines = [_line({"boot": _boot(), "directories": self.directories})]
        lines += [_line({"number": number, **facts}) for number, facts in self.live.items()]
        temporary = f"{self.path}.new"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = OwnedFd(os.open(temporary, flags, 0o600), temporary)
        try:
            # Locked before it has the name, so that there is no moment without a lock.
            fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd.fileno(), b"".join(lines))
            os.rename(temporary, self.path)
        except BaseException:
            fd.close()
            raise
        self._fd.close()
        self._fd, self._lines = fd, len(lines)
        status = os.fstat(fd.fileno())
        self._identity = status.st_dev, status.st_ino

    def close(self) -> None:
        """Let go of the file, and remove it if nothing is left to be done."""
        if not self._fd.closed:
            if not self.live and not self.directories:
                os.unlink(self.path)
            self._fd.close()


def _open_locked(path: str) -> OwnedFd:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        try:
            fd = OwnedFd(os.open(path, flags, 0o600), path)
        except OSError as exc:
            code = exc.errno or errno.EIO
            raise BrokerError(code, path, f"cannot be opened: {exc.strerror}") from exc
        if os.fstat(fd.fileno()).st_uid != os.geteuid():
            fd.close()
            raise BrokerError(errno.EPERM, path, "belongs to another user, who could mislead us")
        try:
            fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another one may have put its file in place since.
            if os.path.samestat(os.fstat(fd.fileno()), os.stat(path)):
                return fd
        except BlockingIOError as exc:
            fd.close()
            reason = "another broker is running with this socket"
            raise BrokerError(errno.EADDRINUSE, path, reason) from exc
        except FileNotFoundError:
            pass
        fd.close()


def _read(fd: int) -> tuple[dict[int, Entry], list[str]]:
    with open(fd, "rb", closefd=False) as file:
        lines = [entry for line in file if (entry := _parse(line)) is not None]
    if not lines or lines[0].get("boot") != _boot():
        return {}, []
    found = lines[0].get("directories")
    directories = [str(path) for path in found] if isinstance(found, list) else []
    live: dict[int, Entry] = {}
    for entry in lines[1:]:
        number = entry.pop("number", None)
        if isinstance(number, int):
            live.pop(number, None)
            if not entry.get("gone"):
                live[number] = entry
    return live, directories


def _parse(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None  # cut off by a SIGKILL
    return entry if isinstance(entry, dict) else None


_ENCODER = json.JSONEncoder(separators=(",", ":"))


def _line(entry: Entry) -> bytes:
    return _ENCODER.encode(entry).encode() + b"\n"


def _boot() -> str:
    with open(_BOOT_ID) as file:
        return file.read().strip()
