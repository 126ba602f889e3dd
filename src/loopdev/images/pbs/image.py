# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A disk image in a snapshot of a datastore."""

from __future__ import annotations

import os
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap

from loopdev._value import Value
from loopdev.errors import (
    EncryptionKeyError,
    ImageFormatError,
    ImageNotFoundError,
    ImageReadError,
    InvalidValueError,
    LoopdevError,
    ServerError,
)
from loopdev.images import map_name
from loopdev.images.pbs import _zstd, blob, names
from loopdev.images.pbs._locks import lock_snapshot
from loopdev.images.pbs.datastore import Datastore, chunk_path, open_regular, read_all
from loopdev.images.pbs.index import CHUNK_SIZE, HEADER_SIZE, FixedIndex, check_header
from loopdev.images.pbs.keys import CryptKey, chunk_digest
from loopdev.images.pbs.manifest import ENCRYPT, NONE
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from loopdev.images.pbs.manifest import FileEntry, Manifest
    from loopdev.images.pbs.names import ArchiveName, Snapshot

_ENCODED_MAX = blob.CHUNK_MAX + blob.HEADER_MAX
_INDEX_MAX = 4 << 30  # of an image of 512 TiB; it is kept in memory
_ZERO_DIGEST = bytes.fromhex("bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8")


class PbsImage:
    """An image made of chunks; see :class:`loopdev.images.Image`.

    Args:
        name: For messages.
        index: Which chunks; it stays its owner's.
        chunks: The directory of chunks; it is owned from here on.
        key: What the chunks are encrypted with.
        zero_digest: That of a whole chunk of zeros.
        locks: What is closed with the image.
    """

    cached = True
    streams = 1

    def __init__(
        self,
        name: str,
        index: FixedIndex,
        chunks: OwnedFd,
        key: CryptKey | None = None,
        zero_digest: bytes = b"",
        locks: tuple[OwnedFd, ...] = (),
    ) -> None:
        self.name, self.index = name, index
        self.size, self.block_size = index.size, index.chunk_size
        self._chunks, self._key, self._locks = chunks, key, locks
        self._zero_digest = zero_digest
        self._buffers: list[mmap] = []  # for encoded chunks; one for each thread, in the end
        self._last: tuple[int, bytearray] = (-1, bytearray())

    def read(self, offset: int, length: int) -> bytes:
        """Return *length* bytes from *offset* on, fewer where the image ends."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        if buffer:
            self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with what is at *offset*; whole blocks are put there without a copy."""
        if not 0 <= offset <= offset + len(buffer) <= self.size:
            raise InvalidValueError("offset", offset, "what is read must be within the image")
        done = 0
        while done < len(buffer):
            number, inside = divmod(offset + done, self.block_size)
            length = self.index.length(number)
            count = min(len(buffer) - done, length - inside)
            target = buffer[done : done + count]
            if count == length:
                self.read_chunk(number, target)
            else:
                target[:] = memoryview(self._whole(number, length))[inside : inside + count]
            done += count

    def _whole(self, number: int, length: int) -> bytearray:
        """Return a chunk of which a part is wanted; the next part will be, too."""
        last, data = self._last
        if last != number:
            data = bytearray(length)
            self.read_chunk(number, memoryview(data))
            self._last = (number, data)
        return data

    def read_chunk(self, number: int, target: memoryview, trust_zeros: bool = True) -> None:
        """Fill *target*, which is as long as the chunk, with a chunk that stood every check.

        Args:
            number: The first chunk is number 0.
            target: A writable buffer; after an error, what is in it is undefined.
            trust_zeros: Believe the index where it says zeros, and read nothing.

        Raises:
            ImageReadError: The chunk is missing or damaged.
        """
        digest = self.index.digest(number)
        if trust_zeros and self._is_zero_chunk(number, digest):
            target[:] = bytes(len(target))
            return
        try:
            self._load(digest, target)
        except (ImageFormatError, ServerError, OSError) as exc:
            reason = f"chunk {digest.hex()}: {_reason(exc)}"
            start = number * self.block_size
            raise ImageReadError(self.name, start, len(target), reason) from exc

    def _load(self, digest: bytes, target: memoryview) -> None:
        with open_regular(chunk_path(digest), self._chunks.fileno()) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _ENCODED_MAX:
                raise ImageFormatError(None, 0, f"has {size} bytes, more than a chunk can have")
            buffer = self._take_buffer(size)
            data = memoryview(buffer)[:size]
            data = data[: read_all(file, data)]
        self._decode(data, digest, target)
        self._buffers.append(buffer)

    def _decode(self, data: memoryview, digest: bytes, target: memoryview) -> None:
        blob.decode_into(data, target, self._key)
        if chunk_digest(target, self._key) != digest:
            raise ImageFormatError(None, 0, "has the content of another chunk")

    def _take_buffer(self, size: int) -> mmap:
        # Memory that was used before spares the kernel to clear it.
        try:
            buffer = self._buffers.pop()
        except IndexError:
            return _huge_buffer(max(size, self.block_size))
        return buffer if len(buffer) >= size else _huge_buffer(size)

    def is_zero(self, offset: int, length: int) -> bool:
        """Return whether the index says that a range is zeros."""
        first, last = offset // self.block_size, (offset + length - 1) // self.block_size
        return all(
            self._is_zero_chunk(number, self.index.digest(number))
            for number in range(first, last + 1)
        )

    def _is_zero_chunk(self, number: int, digest: bytes) -> bool:
        return digest == self._zero_digest and self.index.length(number) == self.block_size

    def fileno(self) -> None:
        """Return None: no file has these bytes."""
        return

    @property
    def ahead(self) -> int:
        """How many blocks to have under way for who reads in order: it is not far to them."""
        return 0

    def serve(self, timeout: float, say: Callable[[str], None], first: bool) -> None:
        """Do nothing: it is all here."""

    def close(self) -> None:
        """Close what is open; the snapshot may be removed then."""
        self._chunks.close()
        for lock in self._locks:
            lock.close()
        self._last = (-1, bytearray())
        self._buffers.clear()


def _huge_buffer(size: int) -> mmap:
    buffer = mmap(-1, size, MAP_PRIVATE | MAP_ANONYMOUS)
    try:
        buffer.madvise(MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel that has none
    return buffer


def _reason(exc: Exception) -> str:
    if isinstance(exc, FileNotFoundError):
        return "is missing"
    if isinstance(exc, ImageFormatError):
        return exc.reason
    return str(exc) if isinstance(exc, LoopdevError) else getattr(exc, "strerror", "") or str(exc)


class PbsSource(Value):
    """An image whose index is in memory and trusted; see :class:`loopdev.images.Source`.

    The index is in memory that forked processes share, whatever becomes of its file.
    """

    description: str
    identity: str
    name: str
    index: FixedIndex
    memory: mmap
    chunks: OwnedFd
    key: CryptKey | None
    zero_digest: bytes
    locks: tuple[OwnedFd, ...]

    def open(self) -> PbsImage:
        """Return the image; it needs the index of this source, and nothing else of it."""
        chunks, *locks = map(_duplicate, (self.chunks, *self.locks))
        return PbsImage(
            self.description, self.index, chunks, self.key, self.zero_digest, tuple(locks)
        )

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors that open() needs; they stay owned here."""
        return tuple(fd.fileno() for fd in (self.chunks, *self.locks))

    def close(self) -> None:
        """Close what is open; images that were opened stay."""
        for fd in (self.chunks, *self.locks):
            fd.close()


def _duplicate(fd: OwnedFd) -> OwnedFd:
    return OwnedFd(os.dup(fd.fileno()), fd.name)


def resolve_pbs(
    text: str, repository: str | None, namespace: str = "", keyfile: str | None = None
) -> PbsSource:
    """Find an image in a datastore; see :func:`loopdev.images.resolve`."""
    archive = names.parse_archive(text, namespace)
    _zstd.backend()
    store = Datastore.open(repository)
    key = load_key(keyfile)
    snapshot = _snapshot(store, archive)
    locks = _lock(store, snapshot)
    try:
        manifest = store.manifest(snapshot)
        manifest.check_snapshot(snapshot)
        manifest.check_key(key)
        entry = find_image(manifest, archive.filename, snapshot)
        chunk_key = key_of(entry, manifest, key)
        memory, index = _load_index(store, snapshot, entry)
        return _source(store, snapshot, entry, memory, index, chunk_key, locks)
    except BaseException:
        for lock in locks:
            lock.close()
        raise


def load_key(keyfile: str | None) -> CryptKey | None:
    """Return the key in a file, ready for use; None: there is no file."""
    if keyfile is None:
        return None
    from loopdev.images.pbs.passwords import load_key_file

    key = load_key_file(keyfile)
    key.prepare()
    return key


def _snapshot(store: Datastore, archive: ArchiveName) -> Snapshot:
    if archive.time is not None:
        return archive.group.snapshot(archive.time)
    return store.latest(archive.group)


def _lock(store: Datastore, snapshot: Snapshot) -> tuple[OwnedFd, ...]:
    from loopdev.errors import kernel_error

    try:
        return lock_snapshot(store.root, snapshot)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise ImageNotFoundError("snapshot", snapshot.full_name) from exc
    except LoopdevError:
        raise
    except OSError as exc:
        raise kernel_error(exc, os.path.join(store.root, snapshot.path), "open") from exc


def find_image(manifest: Manifest, name: str, snapshot: Snapshot) -> FileEntry:
    """Return the index that a name, with its ".fidx" or without, means.

    Raises:
        ImageNotFoundError: There is none.
        InvalidValueError: It is a file of another kind.
    """
    files = {entry.filename: entry for entry in manifest.files}
    for candidate in (f"{name}.fidx", name):
        if candidate in files and candidate.endswith(names.INDEX_SUFFIX):
            return files[candidate]
    if name.endswith(".didx") or f"{name}.didx" in files:
        use = "is an archive of files, not a disk; use proxmox-backup-client mount or restore"
        raise InvalidValueError("source", name, use)
    if name.endswith(".blob") or f"{name}.blob" in files:
        use = "is a small file, not a disk; use proxmox-backup-client restore"
        raise InvalidValueError("source", name, use)
    images = [file.removesuffix(names.INDEX_SUFFIX) for file in files if file.endswith(".fidx")]
    there = f" (there is {', '.join(images)})" if images else " (there is no image in it)"
    raise ImageNotFoundError("archive", f"{snapshot.full_name}/{name}{there}")


def key_of(entry: FileEntry, manifest: Manifest, key: CryptKey | None) -> CryptKey | None:
    """Return what the chunks of a file are encrypted with.

    Raises:
        EncryptionKeyError: The file is encrypted, and there is no key.
        ImageFormatError: The file should be signed, and is not: somebody took the signature away.
    """
    if entry.crypt_mode == NONE:
        return None
    if key is not None and manifest.signature is None:
        reason = f"{entry.filename} is {entry.crypt_mode}, but the manifest has no signature"
        raise ImageFormatError(None, 0, reason)
    if entry.crypt_mode != ENCRYPT:
        return None
    if key is None:
        raise EncryptionKeyError(
            None, f"missing key: {entry.filename} is encrypted; --keyfile names it"
        )
    return key


def _load_index(store: Datastore, snapshot: Snapshot, entry: FileEntry) -> tuple[mmap, FixedIndex]:
    """Return an index that is what the manifest says, and the memory that it is in."""
    with store.open_file(snapshot, entry.filename) as file:
        path, size = file.name, os.fstat(file.fileno()).st_size
        try:
            # What it says of itself comes first: a sparse file can be of any size.
            head = bytearray(HEADER_SIZE)
            count = read_all(file, memoryview(head))
            _check_size(check_header(memoryview(head)[:count], size, path)[4], size, entry, path)
            # Not the file itself: if that were cut off, to look at it would end the process.
            memory = mmap(-1, size)
            count = read_all(file, memoryview(memory))
        except OSError as exc:
            raise ImageReadError(path, 0, size, exc.strerror or str(exc)) from exc
    return memory, check_index(memoryview(memory)[:count], path, entry)


def check_index(data: memoryview, path: str, entry: FileEntry) -> FixedIndex:
    """Return the index in *data*, which is what the manifest says.

    Raises:
        ImageFormatError: It is no index, or another one.
    """
    index = FixedIndex.parse(data, path)
    _check_size(index.size, len(data), entry, path)
    if index.csum() != entry.csum:
        raise ImageFormatError(
            path, 4096, "the digests are not those that the manifest vouches for"
        )
    return index


def zeros_digest(index: FixedIndex, key: CryptKey | None) -> bytes:
    """Return the digest of a whole chunk of zeros."""
    if key is None and index.chunk_size == CHUNK_SIZE:
        return _ZERO_DIGEST
    return chunk_digest(bytes(index.chunk_size), key)


def _check_size(size: int, length: int, entry: FileEntry, path: str) -> None:
    if size != entry.size:
        reason = f"the manifest says {entry.size} bytes, the index {size}"
        raise ImageFormatError(path, 64, reason)
    if length > _INDEX_MAX:
        raise ImageFormatError(path, 64, f"the index has {length} bytes, more than {_INDEX_MAX}")


def _source(
    store: Datastore,
    snapshot: Snapshot,
    entry: FileEntry,
    memory: mmap,
    index: FixedIndex,
    key: CryptKey | None,
    locks: tuple[OwnedFd, ...],
) -> PbsSource:
    archive = entry.filename.removesuffix(names.INDEX_SUFFIX)
    place = (os.path.realpath(store.root), snapshot.namespace, str(snapshot), archive)
    return PbsSource(
        description=f"{store.root}: {snapshot.full_name}/{archive}",
        identity="pbs:" + ":".join(place),
        name=map_name(f"{snapshot.namespace}-{snapshot}-{archive.removesuffix('.img')}"),
        index=index,
        memory=memory,
        chunks=store.open_chunks(),
        key=key,
        zero_digest=zeros_digest(index, key),
        locks=locks,
    )
