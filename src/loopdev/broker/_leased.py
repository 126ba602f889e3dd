# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What both clients share: the device that a broker gave, and what is said to get one."""

from __future__ import annotations

import array
import errno
import os
import socket
from functools import lru_cache

from loopdev._value import Value
from loopdev.broker import messages
from loopdev.errors import BackingFileError, BrokerError, InvalidValueError, RemoteProtocolError
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from loopdev.broker._jobs import Fds


class LeasedPartition(Value):
    """A partition of a device that a broker gave.

    Attributes:
        number: 1 or more.
        name: Its node's name, "loop1000p1".
        rdev: Its device number, as in st_rdev.
        start: First byte, counted from the start of the device.
        size: Bytes.
        type: GPT: the type's GUID; MBR: "0x83".
        label: GPT: its name.
        uuid: As in /dev/disk/by-partuuid.
    """

    number: int
    name: str
    rdev: int
    start: int
    size: int
    type: str | None
    label: str | None
    uuid: str | None


class Lease(Value):
    """A device that a broker gave, as it was then.

    Attributes:
        number: The host's number of it.
        name: "loop1000": the name of its node, too.
        rdev: Its device number, as in st_rdev.
        diskseq: The number of this attachment; None before Linux 5.15.
        size: Bytes.
        sector_size: Logical block size in bytes.
        read_only: Whether it takes no writes.
        direct_io: Whether the file is read and written past its page cache.
        partitions: Those that were found.
        nodes: The names in the directory that was given; no others were made.
    """

    number: int
    name: str
    rdev: int
    diskseq: int | None
    size: int
    sector_size: int
    read_only: bool
    direct_io: bool
    partitions: tuple[LeasedPartition, ...]
    nodes: tuple[str, ...]


def lease_of(result: dict[str, object]) -> Lease:
    """Return the device that a reply describes.

    Raises:
        RemoteProtocolError: It does not.
    """
    fields: dict[str, Any] = {name: result.get(name) for name in Lease.__annotations__}
    try:
        fields["rdev"] = os.makedev(*fields["rdev"])
        fields["nodes"] = tuple(str(name) for name in fields["nodes"])
        fields["partitions"] = tuple(_partition(entry) for entry in fields["partitions"])
        fields["name"] = str(fields["name"])
    except (TypeError, ValueError, KeyError) as exc:
        raise RemoteProtocolError("the reply describes no device") from exc
    return Lease(**fields)


def _partition(entry: dict[str, Any]) -> LeasedPartition:
    fields: dict[str, Any] = {name: entry.get(name) for name in LeasedPartition.__annotations__}
    return LeasedPartition(**{**fields, "rdev": os.makedev(*entry["rdev"])})


class HeldFd:
    """A leased device's own descriptor, if one was asked for, and the lease.

    Attributes:
        lease: What it is.
        fd: An open descriptor of the device, for as long as the object is not closed; or None.
    """

    def __init__(self, lease: Lease, fd: OwnedFd | None) -> None:
        self.lease, self.fd = lease, fd

    @property
    def number(self) -> int:
        """The host's number of the device."""
        return self.lease.number

    @property
    def name(self) -> str:
        """The name of the device and of its node: "loop1000"."""
        return self.lease.name

    @property
    def partitions(self) -> tuple[LeasedPartition, ...]:
        """The partitions that were found when it was attached."""
        return self.lease.partitions

    def fileno(self) -> int:
        """Return the descriptor of the device, which stays this object's.

        Raises:
            InvalidValueError: None was asked for.
        """
        if self.fd is None:
            raise InvalidValueError("want_fd", False, "was not asked for")
        return self.fd.fileno()

    def close_fd(self) -> None:
        """Close the descriptor; the device stays."""
        if self.fd is not None:
            self.fd.close()


def rights(fds: list[int]) -> list[tuple[int, int, array.array[int]]]:
    """Return descriptors as sendmsg() takes them."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


def lost(path: str, exc: OSError | None) -> BrokerError:
    """Return the error for a broker that has gone."""
    code = exc.errno if exc is not None and exc.errno else errno.ECONNRESET
    return BrokerError(code, path, "the broker has closed the connection")


def check_reply(path: str, data: memoryview, fds: Fds, cut: bool, problem: OSError | None) -> None:
    """Refuse what is no whole reply, and close what came with it.

    Raises:
        BrokerError: The broker has closed the connection.
        RemoteProtocolError: It is too long, or brings too many descriptors.
    """
    if data and not cut:
        return
    fds.close()
    if not data:
        raise lost(path, problem)
    raise RemoteProtocolError("the reply is too long, or brings too many descriptors")


def connection_to(path: str) -> socket.socket:
    """Return a socket that is connected.

    Raises:
        BrokerError: There is no broker.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(path)
    except OSError as exc:
        connection.close()
        code = exc.errno or errno.EIO
        raise BrokerError(code, path, f"no broker: {exc.strerror or exc}") from exc
    return connection


class AttachCall:
    """The request to attach an open file, and what its reply means; None is the default.

    Args:
        fd: The file.
        directory: What is to get the nodes, or None.
        options: The fields of messages.Attach.

    Raises:
        InvalidValueError: Something out of range.

    Attributes:
        data: The message.
        fds: What goes with it.
    """

    def __init__(self, fd: int, directory: int | None, **options: Any) -> None:
        self.fds = [fd] if directory is None else [fd, directory]
        if any(each < 0 for each in self.fds):
            raise InvalidValueError("fd", min(self.fds), "must be an open descriptor")
        self._want_fd = bool(options["want_fd"])
        self.data = _attach_request(len(self.fds) > 1, **options)

    def finish(self, result: dict[str, object], received: Fds) -> HeldFd:
        """Return the device of a reply.

        Raises:
            RemoteProtocolError: It describes none.
        """
        with received:
            lease = lease_of(result)
            if not self._want_fd:
                return HeldFd(lease, None)
            if not received:
                raise RemoteProtocolError("the reply brings no descriptor")
            return HeldFd(lease, OwnedFd(received.take(received[0]), f"/dev/{lease.name}"))


# Those who make many devices ask for the same each time.
@lru_cache(64, typed=True)
def _attach_request(directory: bool, **options: Any) -> bytes:
    given = {name: value for name, value in options.items() if value is not None}
    try:
        request = messages.checked(messages.Attach(**given, directory=directory))
    except RemoteProtocolError as exc:
        raise InvalidValueError("request", given, exc.reason) from exc
    return messages.encode_request(request)


class OpenFile:
    """A file for as long as it takes to pass it on."""

    def __init__(self, path: str | os.PathLike[str], read_only: bool) -> None:
        self._path = os.fspath(path)
        self._flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC

    def __enter__(self) -> int:
        try:
            self._fd = os.open(self._path, self._flags)
        except OSError as exc:
            code = exc.errno or errno.EIO
            reason = exc.strerror or os.strerror(code)
            raise BackingFileError(code, self._path, reason) from exc
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


class NodeDirectory:
    """The directory that gets the nodes.

    Args:
        path: It; None: /dev where that can be written, else a new one that is removed at the end.

    Attributes:
        path: Its path.
        fd: A descriptor of it.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._made = False
        if path is not None:
            self.path = os.fspath(path)
        elif os.access("/dev", os.W_OK | os.X_OK):
            self.path = "/dev"
        else:
            import tempfile

            self.path = tempfile.mkdtemp(prefix="loopdev-", dir=os.environ.get("XDG_RUNTIME_DIR"))
            self._made = True

    def __enter__(self) -> Self:
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            code = exc.errno or errno.EIO
            raise BackingFileError(code, self.path, f"cannot get nodes: {exc.strerror}") from exc
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        os.close(self.fd)
        if self._made:
            try:
                os.rmdir(self.path)
            except OSError:
                pass  # the broker has gone, and takes its nodes away at its next start
