# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the broker's event loop and its workers tell each other, and how.

Both ends are ours and run the same interpreter, so it is marshal and not JSON, at a tenth of the
time; and it is neither documented nor checked.
"""

from __future__ import annotations

import array
import marshal
import os
import socket
from typing import NotRequired, TypedDict, cast

from loopdev.broker.messages import encode_error, encode_result
from loopdev.errors import RefusedError, RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType
    from typing import Any, Self

    from loopdev.errors import LoopdevError

    Payload = dict[str, Any]
    Result = tuple[dict[str, object], list[int]]

# A device with 255 partitions and their nodes fits.
_MAX_MESSAGE = 192 << 10
# Plain numbers: socket's are an enum, whose "|" costs more than the system call.
_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
_CTRUNC = int(socket.MSG_CTRUNC)
_CUT = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_DONTWAIT = int(socket.MSG_DONTWAIT)
_NOSIGNAL = int(socket.MSG_NOSIGNAL)
_INT = array.array("i").itemsize
# The kernel's limit for one message.
MAX_FDS = 253


class Client(TypedDict):
    """Who asks, as the kernel says; ``overrides``: with CAP_DAC_OVERRIDE on the host."""

    uid: int
    gid: int
    groups: list[int]
    pid: int
    overrides: bool


class Node(TypedDict):
    """A node in a client's directory; inode is that of the name in it."""

    name: str
    rdev: int
    how: str
    inode: int


class Partition(TypedDict):
    """A partition, as the client is told of it."""

    number: int
    name: str
    rdev: list[int]
    start: int
    size: int
    type: str | None
    label: str | None
    uuid: str | None


class Device(TypedDict):
    """A device of a client.

    ``file`` is st_dev and st_ino of the backing file; ``made`` what attach() put into /dev;
    ``reopens``: a descriptor was given out for which there is a node of ours; ``directory`` where
    the nodes are: mount namespace, st_dev, st_ino and path.
    """

    number: int
    diskseq: int | None
    rdev: int
    size: int
    sector_size: int
    read_only: bool
    direct_io: bool
    partitions: list[Partition]
    backing_file: str
    file: list[int]
    made: list[list[object]]
    nodes: list[Node]
    owner: list[int]
    mode: int
    locked: bool
    reopens: bool
    directory: NotRequired[list[object]]


# What the client is told of its device; the rest is ours.
_PUBLIC = ("number", "diskseq", "size", "sector_size", "read_only", "direct_io", "partitions")


def reply_of(record: Device) -> bytes:
    """Return the answer to a client that has got a device."""
    result: dict[str, object] = {name: record[name] for name in _PUBLIC}  # type: ignore[literal-required]
    result["name"] = f"loop{record['number']}"
    result["rdev"] = [os.major(record["rdev"]), os.minor(record["rdev"])]
    result["nodes"] = [node["name"] for node in record["nodes"]]
    return encode_result(result)


def attach_facts(record: Device) -> dict[str, object]:
    """Return what the log says of a device."""
    names = ("number", "diskseq", "size", "read_only", "backing_file")
    return {name: record[name] for name in names}  # type: ignore[literal-required]


class Fds:
    """Descriptors that are closed in the end, but for those that were taken."""

    def __init__(self, fds: Sequence[int] = ()) -> None:
        self._fds = list(fds)

    def add(self, fd: int) -> int:
        """Own one more, and return it."""
        self._fds.append(fd)
        return fd

    def take(self, fd: int) -> int:
        """Own it no longer, and return it."""
        self._fds.remove(fd)
        return fd

    def __getitem__(self, index: int) -> int:
        return self._fds[index]

    def __iter__(self) -> Iterator[int]:
        return iter([*self._fds])

    def __len__(self) -> int:
        return len(self._fds)

    def close(self) -> None:
        """Close them; what their filesystems say to that (a write that failed) is the client's."""
        fds, self._fds = self._fds, []
        for fd in fds:
            try:
                os.close(fd)
            except OSError:
                pass  # it is closed all the same

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def send(sock: socket.socket, message: dict[str, object], fds: Sequence[int] = ()) -> None:
    """Send a message; the descriptors stay the caller's."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([marshal.dumps(message)], ancillary)


class Inbox:
    """Receives messages with descriptors, all into one buffer: a new one each time costs more.

    Args:
        size: Bytes of the longest message.
        most: How many descriptors one may bring; what is more the kernel closes.
    """

    def __init__(self, size: int = _MAX_MESSAGE, most: int = MAX_FDS) -> None:
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)
        self._space = socket.CMSG_SPACE(most * _INT)

    def raw(self, sock: socket.socket, flags: int = 0) -> tuple[memoryview, Fds, bool]:
        """Return one message, its descriptors, and whether something of it was cut off.

        The message is valid until the next one. Every descriptor that came is in the result.
        """
        size, ancillary, found, _ = sock.recvmsg_into([self._buffer], self._space, flags | _CLOEXEC)
        return self._view[:size], _descriptors(ancillary), bool(found & _CUT)

    def message(self, sock: socket.socket) -> tuple[dict[str, object], Fds] | None:
        """Return what send() sent, None when the other end is closed.

        ``{"cut": True}`` in its place says that not all of it has come: there was no room for its
        descriptors.
        """
        try:
            data, fds, cut = self.raw(sock)
        except ConnectionError:
            return None  # it has gone, and not read all that we sent
        if cut:
            return {"cut": True}, fds
        if not data:
            fds.close()
            return None
        message: dict[str, object] = marshal.loads(data)  # noqa: S302 - our own process
        return message, fds


class Link:
    """A worker's end of the socket to its broker."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)
        self._inbox = Inbox()

    def next(self) -> tuple[Payload, Fds] | None:
        """Return the next job, None when there is no broker any more."""
        while (received := self._inbox.message(self.socket)) is not None and not received[0]:
            received[1].close()  # wanted back: but here it is
        return received

    def note(self, facts: dict[str, object]) -> None:
        """Have the broker write something down in the middle of a job.

        Raises:
            ConnectionError: It has gone.
            RefusedError: It could not write it down.
        """
        send(self.socket, {"note": facts})
        received = self._inbox.message(self.socket)
        if received is None:
            raise ConnectionResetError
        if "refused" in received[0]:
            code, reason = cast("tuple[int, str]", received[0]["refused"])
            raise RefusedError(code, reason)


class Connection:
    """A client's connection, as long as a worker has it.

    Args:
        fd: It; owned from here on.

    Attributes:
        socket: It.
    """

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def receive_descriptors(self, count: int) -> Fds:
        """Take the message that was read already, for its descriptors.

        Raises:
            RemoteProtocolError: They are not *count*.
        """
        # The text is cut off here; that of the descriptors alone would be told by the flag.
        space = socket.CMSG_SPACE(count * _INT)
        _, ancillary, found, _ = self.socket.recvmsg(1, space, _DONTWAIT | _CLOEXEC)
        fds = _descriptors(ancillary)
        if len(fds) != count or found & _CTRUNC:
            fds.close()
            reason = f"it needs {count} descriptors to come with it, no more or less"
            raise RemoteProtocolError(reason)
        return fds

    def drop(self) -> None:
        """Take a message off that brought no descriptor."""
        try:
            self.socket.recv(1, _DONTWAIT)
        except OSError:
            pass  # ECONNRESET: it went just now, which the event loop hears of

    def answer(self, data: bytes) -> None:
        """Answer; a client that takes no answers is cut off, which the event loop hears of."""
        try:
            self.socket.send(data, _DONTWAIT | _NOSIGNAL)
        except OSError:
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # ENOTCONN: it has gone


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> Fds:
    fds = Fds()
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found = array.array("i")
            found.frombytes(body[: len(body) - len(body) % _INT])
            for fd in found:
                fds.add(fd)
    return fds


def failed(exc: LoopdevError) -> dict[str, object]:
    """Return the result of a job that has failed: what the client is told, and the log."""
    return {"error": encode_error(exc).decode(), "text": str(exc)}
