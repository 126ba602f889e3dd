# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""AsyncLoopClient: LoopClient for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

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
from loopdev.errors import ClosedError, LoopdevError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from types import TracebackType
    from typing import Any, Self

    from loopdev.broker._jobs import Fds

_NOSIGNAL = int(socket.MSG_NOSIGNAL)


class AsyncBrokerDevice(HeldFd):
    """A loop device that a broker gave; in an ``async with`` it is detached at the end."""

    def __init__(self, client: AsyncLoopClient, held: HeldFd) -> None:
        super().__init__(held.lease, held.fd)
        self._client = client

    async def resize(self) -> int:
        """Do as :meth:`BrokerDevice.resize`."""
        request = messages.Resize(number=self.lease.number, diskseq=self.lease.diskseq)
        return int(str((await self._client.request(request))["size"]))

    async def sync(self) -> None:
        """Do as :meth:`BrokerDevice.sync`."""
        request = messages.Sync(number=self.lease.number, diskseq=self.lease.diskseq)
        await self._client.request(request)

    async def detach(self, timeout: float = 5.0) -> None:
        """Do as :meth:`BrokerDevice.detach`."""
        self.close_fd()
        number, diskseq = self.lease.number, self.lease.diskseq
        await self._client.request(messages.Detach(number=number, diskseq=diskseq, timeout=timeout))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self.detach()
        except LoopdevError:
            # What went wrong here must not hide what went wrong in the block.
            if exc is None:
                raise


class AsyncLoopClient:
    """A connection to a broker, for tasks of one event loop, which may share it.

    A task that is cancelled while it waits for an answer closes the connection, since nobody could
    tell whether its request was done; the devices go with it.

    Args:
        path: The broker's socket.

    Raises:
        BrokerError: There is no broker at this path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._turn = asyncio.Lock()
        self._inbox = Inbox(messages.MAX_REPLY, most=1)
        # connect() on a Unix socket waits for room in the backlog alone.
        self._connection: socket.socket | None = connection_to(self.path)
        self._connection.setblocking(False)

    def fileno(self) -> int:
        """Return the connection's descriptor, which stays this object's."""
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

    async def request(self, request: messages.Request) -> dict[str, object]:
        """Send a request and return the result; errors are those of LoopClient.request()."""
        result, fds = await self._exchange(messages.encode_request(request), [])
        fds.close()
        return result

    async def _exchange(self, request: bytes, fds: list[int]) -> tuple[dict[str, object], Fds]:
        async with self._turn:
            connection = self._open()
            try:
                data, received = await self._talk(connection, request, fds)
            except BaseException:
                self.close()
                raise
            try:
                return messages.parse_reply(data), received
            except BaseException:
                received.close()
                raise

    async def _talk(
        self, connection: socket.socket, request: bytes, fds: list[int]
    ) -> tuple[memoryview, Fds]:
        problem: OSError | None = None
        try:
            try:
                # One request at a time: there is always room for it.
                connection.sendmsg([request], rights(fds), _NOSIGNAL)
            except ConnectionError as exc:
                problem = exc  # it may have said why
            await _readable(connection)
            data, received, cut = self._inbox.raw(connection)
        except ConnectionError as exc:
            raise lost(self.path, exc) from exc
        check_reply(self.path, data, received, cut, problem)
        return data, received

    async def hello(self) -> dict[str, object]:
        """Return the broker's version, features, and this user's limits."""
        return await self.request(messages.Hello())

    async def devices(self) -> list[dict[str, Any]]:
        """Return the devices of this user; root is told of everybody's."""
        found: list[dict[str, Any]] = []
        while True:
            after = found[-1]["number"] if found else -1
            result: dict[str, Any] = await self.request(messages.List(after=after))
            found += result["devices"]
            if not result["more"]:
                return found

    async def attach(
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
    ) -> AsyncBrokerDevice:
        """Have a loop device made of an open file: :meth:`LoopClient.attach` for asyncio."""
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
        return AsyncBrokerDevice(self, call.finish(*await self._exchange(call.data, call.fds)))

    @contextlib.asynccontextmanager
    async def device(
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
    ) -> AsyncIterator[str]:
        """Have the path of a loop device for as long as an ``async with`` lasts.

        Arguments are those of :meth:`LoopClient.device`.
        """
        with NodeDirectory(directory) as place, OpenFile(filename, read_only) as fd:
            made = await self.attach(
                fd,
                offset=offset,
                sizelimit=sizelimit,
                sector_size=sector_size,
                read_only=read_only,
                partscan=partscan,
                lock=lock,
                directory=place.fd,
            )
            async with made:
                yield os.path.join(place.path, made.name)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


async def _readable(connection: socket.socket) -> None:
    """Wait until there is something to read."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    fd = connection.fileno()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
