# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""LoopClient: loop devices from a broker, for a program that cannot have them itself."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from loopdev.broker import messages
from loopdev.broker._jobs import Inbox
from loopdev.broker._leased import (
    AttachCall,
    HeldFd,
    NodeDirectory,
    OpenFile,
    check_reply,
    connection_to,
    lost,
    rights,
)
from loopdev.errors import ClosedError, LoopdevError, WaitTimeoutError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any, Self

    from loopdev.broker._jobs import Fds


_NOSIGNAL = int(socket.MSG_NOSIGNAL)


class BrokerDevice(HeldFd):
    """A loop device that a broker gave; in a ``with`` it is detached at the end.

    It lives as long as the connection: when that is closed, or this process ends, the broker
    detaches it.
    """

    def __init__(self, client: LoopClient, held: HeldFd) -> None:
        super().__init__(held.lease, held.fd)
        self._client = client

    def resize(self) -> int:
        """Take over the size of a backing file that grew or shrank, and return it in bytes."""
        request = messages.Resize(number=self.lease.number, diskseq=self.lease.diskseq)
        return int(str(self._client.request(request)["size"]))

    def sync(self) -> None:
        """Write all that was written to the device to the backing file, and that to its disk.

        Raises:
            KernelError: EIO, ENOSPC: data was lost.
        """
        request = messages.Sync(number=self.lease.number, diskseq=self.lease.diskseq)
        self._client.request(request)

    def detach(self, timeout: float = 5.0) -> None:
        """Detach: when this returns, the backing file is free and has all the data.

        The descriptor of the device, if there is one, is closed first.

        Args:
            timeout: Seconds to wait for others to close the device, at most 60.

        Raises:
            DeviceBusyError: It is in use. It stays as it was.
            NotBoundError: It was detached before.
        """
        self.close_fd()
        request = messages.Detach(
            number=self.lease.number, diskseq=self.lease.diskseq, timeout=timeout
        )
        self._client.request(request)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            self.detach()
        except LoopdevError:
            # What went wrong here must not hide what went wrong in the block.
            if exc is None:
                raise


class LoopClient:
    """A connection to a broker. Its devices live as long as it does. Threads may share it.

    Args:
        path: The broker's socket.
        timeout: Seconds to wait for an answer; None: for ever. After a timeout it is closed.

    Raises:
        BrokerError: There is no broker at this path.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float | None = None) -> None:
        self.path = os.fspath(path)
        self._timeout = timeout
        self._turn = threading.Lock()
        self._inbox = Inbox(messages.MAX_REPLY, most=1)
        self._connection: socket.socket | None = connection_to(self.path)
        self._connection.settimeout(timeout)

    def fileno(self) -> int:
        """Return the connection's descriptor, which stays this object's.

        Raises:
            ClosedError: It is closed; so does everything else here.
        """
        return self._open().fileno()

    def _open(self) -> socket.socket:
        if self._connection is None:
            raise ClosedError(f"the connection to {self.path}")
        return self._connection

    def close(self) -> None:
        """Give everything back; doing so again is no error. The broker detaches all devices."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def request(self, request: messages.Request) -> dict[str, object]:
        """Send a request and return the result.

        Raises:
            LoopdevError: As the broker says.
            BrokerError: It has gone.
        """
        result, fds = self._exchange(messages.encode_request(request), [])
        fds.close()
        return result

    def _exchange(self, request: bytes, fds: list[int]) -> tuple[dict[str, object], Fds]:
        with self._turn:
            connection = self._open()
            try:
                data, received = self._talk(connection, request, fds)
            except BaseException:
                # An answer that is still to come would be taken for the next one.
                self.close()
                raise
            try:
                return messages.parse_reply(data), received
            except BaseException:
                received.close()
                raise

    def _talk(
        self, connection: socket.socket, request: bytes, fds: list[int]
    ) -> tuple[memoryview, Fds]:
        problem: OSError | None = None
        try:
            try:
                connection.sendmsg([request], rights(fds), _NOSIGNAL)
            except ConnectionError as exc:
                problem = exc  # it may have said why
            data, received, cut = self._inbox.raw(connection)
        except TimeoutError as exc:
            raise WaitTimeoutError(self.path, "no answer", self._timeout or 0) from exc
        except ConnectionError as exc:
            raise lost(self.path, exc) from exc
        check_reply(self.path, data, received, cut, problem)
        return data, received

    def hello(self) -> dict[str, object]:
        """Return the broker's version, features, and this user's limits."""
        return self.request(messages.Hello())

    def devices(self) -> list[dict[str, Any]]:
        """Return the devices of this user; root is told of everybody's."""
        found: list[dict[str, Any]] = []
        while True:
            after = found[-1]["number"] if found else -1
            result: dict[str, Any] = self.request(messages.List(after=after))
            found += result["devices"]
            if not result["more"]:
                return found

    def attach(
        self,
        fd: int,
        *,
        offset: int | None = None,
        sizelimit: int | None = None,
        sector_size: int | None = None,
        read_only: bool = False,
        partscan: bool = False,
        direct_io: bool | None = None,
        force: bool = False,
        lock: bool = False,
        directory: int | None = None,
        want_fd: bool = False,
    ) -> BrokerDevice:
        """Have a loop device made of an open file.

        Args:
            fd: The file, which stays the caller's. If it is open for reading only, the device is
                read-only.
            offset: As for :func:`loopdev.attach`; so are the others up to *force*.
            sizelimit: Bytes; None: to the end of the file.
            sector_size: Bytes; None: that of the file's GPT, else the kernel's choice.
            read_only: Take no writes.
            partscan: Read the partition table, and have a node for each partition.
            direct_io: Read and write past the file's page cache; None: where the file can.
            force: Take a file whose end is no multiple of the sector size.
            lock: Keep the device locked, so that udev leaves it alone.
            directory: A descriptor of the directory that is to get the nodes, which this process
                can write; None: no nodes.
            want_fd: Get a descriptor of the device, too.

        Raises:
            RefusedError: The broker's policy does not allow it.
            BackingFileError: The file cannot be used.
            LoopdevError: And all else that :func:`loopdev.attach` raises.
        """
        call = AttachCall(
            fd,
            directory,
            offset=offset,
            sizelimit=sizelimit,
            sector_size=sector_size,
            read_only=read_only,
            partscan=partscan,
            direct_io=direct_io,
            force=force,
            lock=lock,
            want_fd=want_fd,
        )
        return BrokerDevice(self, call.finish(*self._exchange(call.data, call.fds)))

    @contextlib.contextmanager
    def device(
        self,
        filename: str | os.PathLike[str],
        offset: int | None = None,
        sizelimit: int | None = None,
        lock: bool = False,
        partscan: bool = False,
        read_only: bool = False,
        sector_size: int = 512,
        *,
        directory: str | os.PathLike[str] | None = None,
    ) -> Iterator[str]:
        """Have the path of a loop device for as long as a ``with`` lasts.

        The nodes of its partitions, with *partscan*, are beside it: its path and "p1", ...

        Args:
            filename: The file.
            offset: First byte of it to show.
            sizelimit: Bytes from there.
            lock: As for attach().
            partscan: As for attach().
            read_only: As for attach().
            sector_size: Bytes.
            directory: Where the nodes are to be; None: /dev where this process can write that,
                else a new directory.
        """
        with NodeDirectory(directory) as place, OpenFile(filename, read_only) as fd:
            made = self.attach(
                fd,
                offset=offset,
                sizelimit=sizelimit,
                sector_size=sector_size,
                read_only=read_only,
                partscan=partscan,
                lock=lock,
                directory=place.fd,
            )
            with made:
                yield os.path.join(place.path, made.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
