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
import re
import stat

from loopdev.errors import BrokerError
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    Entry = dict[str, object]

_BOOT_ID = "/proc/sys/kernel/random/boot_id"
# Lines of the past that are put up with, beside as many as there are of the present.
_SLACK = 1000
_PRIVATE = re.compile(r"/dev/\.loopdev-[0-9a-f]+")


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
        self._boot = _boot()
        self._lines = 0
        # The last line may be half there: nothing can be added to the file.
        self._torn = False
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
        """Write down what a number is.

        Raises:
            BrokerError: It could not be done, and will be when something else is written down.
        """
        self.live[number] = facts
        self._append({"number": number, **facts})

    def drop(self, number: int) -> None:
        """Write down that a number is ours no longer.

        Raises:
            BrokerError: As with put().
        """
        if self.live.pop(number, None) is not None:
            self._append({"number": number, "gone": True})

    def _append(self, entry: Entry) -> None:
        if self._torn or self._lines > 2 * len(self.live) + _SLACK:
            try:
                self._rewrite()
            except BrokerError:
                if self._torn:
                    raise
            else:
                return
        try:
            _write(self._fd.fileno(), _line(entry))
        except OSError as exc:
            self._torn = True
            raise self._error(exc) from exc
        self._lines += 1

    def _error(self, exc: OSError) -> BrokerError:
        return BrokerError(exc.errno or errno.EIO, self.path, f"cannot be written: {exc.strerror}")

    def _rewrite(self) -> None:
        """Put a file in place that has only what is so now.

        Raises:
            BrokerError: It could not be done; the old file is as it was.
        """
        lines = [_line({"boot": self._boot, "directories": self.directories})]
        lines += [_line({"number": number, **facts}) for number, facts in self.live.items()]
        try:
            fd = _replace(self.path, b"".join(lines))
        except OSError as exc:
            raise self._error(exc) from exc
        self._fd.close()
        self._fd, self._lines, self._torn = fd, len(lines), False
        status = os.fstat(fd.fileno())
        self._identity = status.st_dev, status.st_ino

    def close(self) -> None:
        """Let go of the file, and remove it if nothing is left to be done."""
        if not self._fd.closed:
            if not self.live and not self.directories:
                _discard(self.path)
            self._fd.close()


def _discard(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _write(fd: int, data: bytes) -> None:
    """Write all of it: a filesystem that gets full takes a part."""
    while data:
        data = data[os.write(fd, data) :]


def _replace(path: str, data: bytes) -> OwnedFd:
    """Put a new file in the place of another; locked, as that one is."""
    temporary = f"{path}.new"
    _discard(temporary)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    fd = OwnedFd(os.open(temporary, flags, 0o600), temporary)
    try:
        # Locked before it has the name, so that there is no moment without a lock.
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write(fd.fileno(), data)
        os.rename(temporary, path)
    except BaseException:
        fd.close()
        _discard(temporary)
        raise
    return fd


def _open_locked(path: str) -> OwnedFd:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            fd = OwnedFd(os.open(path, flags, 0o600), path)
        except OSError as exc:
            code = exc.errno or errno.EIO
            raise BrokerError(code, path, f"cannot be opened: {exc.strerror}") from exc
        status = os.fstat(fd.fileno())
        if not stat.S_ISREG(status.st_mode):
            fd.close()
            raise BrokerError(errno.EINVAL, path, "is no regular file")
        if status.st_uid != os.geteuid():
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
    # What is in them is removed: no other than we make.
    directories = [
        path
        for path in (found if isinstance(found, list) else ())
        if isinstance(path, str) and _PRIVATE.fullmatch(path)
    ]
    live: dict[int, Entry] = {}
    for entry in lines[1:]:
        number = entry.pop("number", None)
        if type(number) is int and 0 <= number < 1 << 20:
            live.pop(number, None)
            if not entry.get("gone"):
                live[number] = entry
    return live, directories


def _parse(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None  # cut off by a SIGKILL
    return entry if isinstance(entry, dict) else None


_ENCODER = json.JSONEncoder(separators=(",", ":"))


def _line(entry: Entry) -> bytes:
    return _ENCODER.encode(entry).encode() + b"\n"


def _boot() -> str:
    with open(_BOOT_ID) as file:
        return file.read().strip()
