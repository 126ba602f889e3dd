# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A disk image in a snapshot of a local datastore."""

from __future__ import annotations

import os
from mmap import mmap

from loopdev._value import Value
from loopdev.errors import ImageNotFoundError, ImageReadError, LoopdevError
from loopdev.images import map_name
from loopdev.images.pbs import _zstd, names
from loopdev.images.pbs._locks import lock_snapshot
from loopdev.images.pbs.datastore import Datastore, read_all
from loopdev.images.pbs.image import PbsImage, load_key
from loopdev.images.pbs.index import (
    HEADER_SIZE,
    FixedIndex,
    check_header,
    check_index,
    check_size,
    zeros_digest,
)
from loopdev.images.pbs.manifest import find_image, key_of
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs.keys import CryptKey
    from loopdev.images.pbs.manifest import FileEntry
    from loopdev.images.pbs.names import ArchiveName, Snapshot


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


def _load_index(store: Datastore, snapshot: Snapshot, entry: FileEntry) -> tuple[mmap, FixedIndex]:
    """Return an index that is what the manifest says, and the memory that it is in."""
    with store.open_file(snapshot, entry.filename) as file:
        path, size = file.name, os.fstat(file.fileno()).st_size
        try:
            # What it says of itself comes first: a sparse file can be of any size.
            head = bytearray(HEADER_SIZE)
            count = read_all(file, memoryview(head))
            check_size(check_header(memoryview(head)[:count], size, path)[4], size, entry, path)
            # Not the file itself: if that were cut off, to look at it would end the process.
            memory = mmap(-1, size)
            count = read_all(file, memoryview(memory))
        except OSError as exc:
            raise ImageReadError(path, 0, size, exc.strerror or str(exc)) from exc
    return memory, check_index(memoryview(memory)[:count], path, entry)


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
