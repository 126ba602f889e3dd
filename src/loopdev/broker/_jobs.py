# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the broker's event loop and its workers tell each other, and how: JSON and descriptors.

Both ends are ours, in one version; so it is not documented and not checked.
"""

from __future__ import annotations

import array
import json
import os
import socket
from typing import NotRequired, TypedDict

from loopdev.broker.messages import encode_error
from loopdev.errors import RemoteProtocolError

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
# The kernel's limit for one message.
MAX_FDS = 253


class Client(TypedDict):
    """Who asks, as the kernel says."""

    uid: int
    gid: int
    groups: list[int]
    pid: int


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

    ``file`` is st_dev and st_ino of the backing file, ``made`` what attach() put into /dev,
    ``directory`` where the nodes are: mount namespace, st_dev, st_ino and path.
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
    directory: NotRequired[list[object]]


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
        """Close them."""
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def send(sock: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    """Send a message; the descriptors stay the caller's."""
    data = json.dumps(message, separators=(",", ":")).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary)


def receive(sock: socket.socket) -> tuple[dict[str, object], Fds] | None:
    """Return the next message and its descriptors, None when the other end is closed."""
    data, fds, _ = receive_raw(sock, _MAX_MESSAGE, MAX_FDS)
    if not data:
        fds.close()
        return None
    message: dict[str, object] = json.loads(data)
    return message, fds


def receive_raw(
    sock: socket.socket, size: int, most: int, flags: int = 0
) -> tuple[bytes, Fds, int]:
    """Return one message, its descriptors, and MSG_TRUNC and MSG_CTRUNC if it was cut.

    Every descriptor that came is in the result; more than *most* the kernel has closed.
    """
    space = socket.CMSG_SPACE(most * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(size, space, flags | socket.MSG_CMSG_CLOEXEC)
    fds = Fds()
    for level, kind, body in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found = array.array("i")
            found.frombytes(body[: len(body) - len(body) % found.itemsize])
            for fd in found:
                fds.add(fd)
    return data, fds, flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)


def receive_descriptors(sock: socket.socket, size: int, count: int) -> Fds:
    """Take the message that the event loop has read already, for its descriptors.

    Raises:
        RemoteProtocolError: They are not *count*.
    """
    _, fds, flags = receive_raw(sock, size, count, socket.MSG_DONTWAIT)
    if len(fds) != count or flags & socket.MSG_CTRUNC:
        fds.close()
        raise RemoteProtocolError(f"it needs {count} descriptors to come with it, no more or less")
    return fds


def failed(exc: LoopdevError) -> dict[str, object]:
    """Return the result of a job that has failed: what the client is told, and the log."""
    return {"error": encode_error(exc).decode(), "text": str(exc)}
