# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A disk image in a snapshot on a server."""

from __future__ import annotations

import _thread
import time
from mmap import mmap

from loopdev._backoff import backoff
from loopdev._value import Value
from loopdev.errors import ImageFormatError, LoopdevError, ServerError
from loopdev.images import map_name
from loopdev.images.pbs import _zstd, blob, names
from loopdev.images.pbs._handover import Handover
from loopdev.images.pbs._link import STREAMS, Link
from loopdev.images.pbs.image import PbsImage, load_key
from loopdev.images.pbs.index import FixedIndex, check_index, zeros_digest
from loopdev.images.pbs.manifest import Manifest, find_image, key_of
from loopdev.images.pbs.server import REQUEST_TIMEOUT, Rest, Server, find_server, refusal
from loopdev.images.pbs.session import Session
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from loopdev.images.pbs._http2 import Reply
    from loopdev.images.pbs._wire import Connection
    from loopdev.images.pbs.keys import CryptKey
    from loopdev.images.pbs.manifest import FileEntry
    from loopdev.images.pbs.names import ArchiveName, Snapshot
    from loopdev.images.pbs.repository import Repository

# How long a read may wait for the server, in seconds, where nobody has said it.
_TIMEOUT = 60.0
_ENCODED_MAX = blob.CHUNK_MAX + blob.HEADER_MAX
_MANIFEST_MAX = 16 << 20
_INDEX_MAX = 1 << 30  # of an image of 128 TiB
# Blocks to read ahead: on any way, for each second of a round trip (so many can be decoded in one),
# and at most, which is 1 Gbit/s of chunks that are half their size and 200 ms away.
_AHEAD, _AHEAD_RATE, _AHEAD_MOST = 6, 300, 20
# A server that is in trouble is asked again after such pauses, in seconds.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0


class RemoteSource(Value):
    """An image whose index is in memory and trusted; see :class:`loopdev.images.Source`.

    As with a local one, the index is in memory that forked processes share. A process that opens
    it has a session of its own; the first one has that in which the index came.
    """

    description: str
    identity: str
    name: str
    index: FixedIndex
    memory: mmap
    key: CryptKey | None
    zero_digest: bytes
    server: Server
    snapshot: Snapshot
    filename: str
    handover: Handover

    def open(self) -> RemoteImage:
        """Return the image; it connects when it is first read, or is to serve."""
        return RemoteImage(self)

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors that open() needs; they stay owned here."""
        return (self.handover.fileno(),)

    def close(self) -> None:
        """Close what is open; images that were opened stay."""
        self.handover.close()


class RemoteImage(PbsImage):
    """An image made of chunks that a server has; see :class:`loopdev.images.Image`.

    Args:
        source: It.
    """

    def __init__(self, source: RemoteSource) -> None:
        super().__init__(
            source.description,
            source.index,
            OwnedFd(-1, "no directory"),
            source.key,
            source.zero_digest,
        )
        self._source = source
        self._timeout = _TIMEOUT
        self._say: Callable[[str], None] = lambda _: None
        self._lock = _thread.allocate_lock()
        self._link: Link | None = None
        self._handover, self._wanted = source.handover.copy(), True
        self._delay = 0.0

    streams = STREAMS

    @property
    def ahead(self) -> int:
        """How many blocks to have under way for who reads in order: more on a longer way."""
        return min(_AHEAD + int(self._delay * _AHEAD_RATE), _AHEAD_MOST)

    def serve(self, timeout: float, say: Callable[[str], None], first: bool) -> None:
        """Connect, in the background, and stay connected: that keeps the snapshot, too."""
        self._timeout, self._say, self._wanted = timeout, say, first
        self._linked()

    def _linked(self) -> Link:
        with self._lock:
            if self._link is None:
                self._link = Link(self._source.server.name, self._connect, self._say, self._timeout)
            return self._link

    def _connect(self, deadline: float) -> Session:
        """Return a session that gives out this image's chunks, before the deadline."""
        session = self._handover.take() if self._wanted else None
        session = session or self._new_session(deadline)
        self._delay = session.connection.delay
        return session

    def _new_session(self, deadline: float) -> Session:
        source = self._source
        server = source.server
        try:
            session = Session.open(server, source.snapshot, deadline)
        except ServerError as exc:
            if exc.status != 401 or not server.forget_ticket():
                raise
            session = Session.open(server, source.snapshot, deadline)
        try:
            reply = session.download(source.filename, _INDEX_MAX)
            session.finish([reply], deadline)
            if reply.error or reply.status != 200:
                raise _refused(server, source.snapshot, source.filename, reply)
            if not _is_same(source.index, reply):
                reason = f"{source.filename} is not the one any more that was mapped"
                raise ServerError(server.name, reason)
        except BaseException:
            session.close()
            raise
        return session

    def _load(self, digest: bytes, target: memoryview) -> None:
        reply = self._fetch(digest, time.monotonic() + self._timeout)
        try:
            self._decode(reply.data, digest, target)
        finally:
            self._linked().release(reply)

    def _fetch(self, digest: bytes, deadline: float) -> Reply:
        """Return an encoded chunk; trouble that is the server's, not the chunk's, is waited out."""
        link, path = self._linked(), _chunk_path(digest)
        reason = "does not answer"
        for _ in backoff(deadline, _FIRST_PAUSE, _LONGEST_PAUSE):
            reply = link.fetch(path, _ENCODED_MAX, deadline)
            if reply.status == 200 and not reply.error:
                return reply
            status, reason = reply.status, reply.error or f"{reply.text} ({reply.status})"
            too_long = reply.length + 1 > _ENCODED_MAX or reply.error.startswith("is more")
            link.release(reply)
            if too_long or status in (400, 403, 404):
                # The server has it damaged, or not at all; it is asked again by the next read.
                raise ImageFormatError(
                    None, 0, f"the server says: {reason}" if status != 200 else reason
                )
            if status == 401:
                # The session has forgotten the index.
                link.reconnect()
        raise ServerError(self._source.server.name, reason)

    def close(self) -> None:
        """End the session; the snapshot may be removed then."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()
        self._handover.close()
        self._last = (-1, bytearray())


def _chunk_path(digest: bytes) -> str:
    return f"/chunk?digest={digest.hex()}"


def _is_same(index: FixedIndex, reply: Reply) -> bool:
    other = FixedIndex.parse(reply.data)
    same = (other.size, other.chunk_size) == (index.size, index.chunk_size)
    return same and other.csum() == index.csum()


def resolve_remote(
    text: str,
    repository: Repository,
    namespace: str = "",
    keyfile: str | None = None,
    fingerprint: str | None = None,
) -> RemoteSource:
    """Find an image on a server; see :func:`loopdev.images.resolve`."""
    archive = names.parse_archive(text, namespace)
    _zstd.backend()
    key = load_key(keyfile)
    server = find_server(repository, fingerprint)
    deadline = time.monotonic() + REQUEST_TIMEOUT
    early = _Early(server, deadline)
    try:
        snapshot = _find_snapshot(server, archive)
        session = Session.open(server, snapshot, deadline, early.connection())
    finally:
        early.close()
    try:
        return _resolve_in(session, server, snapshot, archive.filename, key, deadline)
    except BaseException:
        session.close()
        raise


class _Early:
    """A connection for the session, made while another one logs in: that saves two round trips."""

    def __init__(self, server: Server, deadline: float) -> None:
        self._made: Connection | None = None
        self._failure: Exception | None = None
        self._done = _thread.allocate_lock()
        self._done.acquire()
        _thread.start_new_thread(self._make, (server, deadline))

    def _make(self, server: Server, deadline: float) -> None:
        try:
            self._made = server.connect(deadline)
        except Exception as exc:  # noqa: BLE001 - it is raised where the connection is wanted
            self._failure = exc
        finally:
            self._done.release()

    def connection(self) -> Connection:
        """Return it; it is the caller's.

        Raises:
            ServerError: It could not be made.
        """
        self.wait()
        made, self._made = self._made, None
        if made is None:
            assert self._failure is not None
            raise self._failure
        return made

    def wait(self) -> None:
        """Wait until it is made, or cannot be."""
        self._done.acquire()
        self._done.release()

    def close(self) -> None:
        """Close what nobody has taken."""
        self.wait()
        if self._made is not None:
            self._made.close()


def _find_snapshot(server: Server, archive: ArchiveName) -> Snapshot:
    """Log in, where that is needed, and find the newest snapshot, where that is meant."""
    rest = Rest(server)
    try:
        if archive.time is not None:
            rest.log_in()
            return archive.group.snapshot(archive.time)
        from loopdev.images.pbs.catalog import Catalog

        return Catalog(rest).latest(archive.group)
    finally:
        rest.close()


def _resolve_in(
    session: Session,
    server: Server,
    snapshot: Snapshot,
    filename: str,
    key: CryptKey | None,
    deadline: float,
) -> RemoteSource:
    # What is asked for at once comes in one round trip; most names are those of indexes.
    guess = filename.removesuffix(names.INDEX_SUFFIX) + names.INDEX_SUFFIX
    index_reply = session.download(guess, _INDEX_MAX)
    manifest_reply = session.download(names.MANIFEST, _MANIFEST_MAX)
    session.finish([index_reply, manifest_reply], deadline)
    if manifest_reply.error or manifest_reply.status != 200:
        raise _refused(server, snapshot, names.MANIFEST, manifest_reply)
    manifest = Manifest.parse(bytes(manifest_reply.data), f"{server.name}: {names.MANIFEST}")
    manifest.check_snapshot(snapshot)
    manifest.check_key(key)
    entry = find_image(manifest, filename, snapshot)
    chunk_key = key_of(entry, manifest, key)
    if entry.filename != guess:
        index_reply = session.download(entry.filename, _INDEX_MAX)
        session.finish([index_reply], deadline)
    if index_reply.error or index_reply.status != 200:
        raise _refused(server, snapshot, entry.filename, index_reply)
    memory = mmap(-1, max(index_reply.length, 1))
    memory[: index_reply.length] = index_reply.data
    data = memoryview(memory)[: index_reply.length]
    index = check_index(data, f"{server.name}: {snapshot.full_name}/{entry.filename}", entry)
    return _source(session, server, snapshot, entry, memory, index, chunk_key)


def _refused(server: Server, snapshot: Snapshot, name: str, reply: Reply) -> LoopdevError:
    where = f"{snapshot.full_name}/{name}"
    if reply.error:
        return ServerError(server.name, f"{where} {reply.error}")
    return refusal(server.name, reply.status, reply.text, "archive", where)


def _source(
    session: Session,
    server: Server,
    snapshot: Snapshot,
    entry: FileEntry,
    memory: mmap,
    index: FixedIndex,
    key: CryptKey | None,
) -> RemoteSource:
    archive = entry.filename.removesuffix(names.INDEX_SUFFIX)
    repository, zero_digest = server.repository, zeros_digest(index, key)
    if index.digest(0) != zero_digest:
        # Whatever the image is wanted for, its first bytes are what is read first: they come while
        # the device is made.
        path = _chunk_path(index.digest(0))
        session.early[path] = session.get(path, _ENCODED_MAX)
    place = (repository.server, repository.store, snapshot.namespace, str(snapshot), archive)
    return RemoteSource(
        description=f"{repository}: {snapshot.full_name}/{archive}",
        identity="pbs:" + ":".join(place),
        name=map_name(f"{snapshot.namespace}-{snapshot}-{archive.removesuffix('.img')}"),
        index=index,
        memory=memory,
        key=key,
        zero_digest=zero_digest,
        server=server,
        snapshot=snapshot,
        filename=entry.filename,
        handover=Handover.put(session),
    )
