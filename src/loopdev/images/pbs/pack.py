# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Images to a snapshot in a local datastore.

The order is what makes it safe to interrupt, by a signal, a full disk or a power failure:

1. new chunks are written under temporary names, synced, and renamed (``_chunks``);
2. the indexes are written to a directory that is no snapshot yet, and synced with those names;
3. the manifest follows, and a rename makes the directory a snapshot (``_publish``).
"""

from __future__ import annotations

import os
import stat
import time as clock
import uuid
from contextlib import ExitStack, closing

from loopdev._value import Value
from loopdev.errors import ImageReadError, InvalidValueError
from loopdev.images import resolve
from loopdev.images.pbs import index, manifest
from loopdev.images.pbs._chunks import ChunkWriter
from loopdev.images.pbs._pipeline import Codec, PackProgress, Pipeline
from loopdev.images.pbs._publish import check_free, publish
from loopdev.images.pbs._store import WritableStore
from loopdev.images.pbs._workdir import WorkDirectory
from loopdev.images.pbs.blob import LEVEL
from loopdev.images.pbs.datastore import local_repository
from loopdev.images.pbs.manifest import ENCRYPT, NONE, SIGN_ONLY, FileEntry
from loopdev.images.pbs.names import INDEX_SUFFIX, is_safe, parse_group
from loopdev.images.pbs.passwords import load_key_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loopdev.images import Image, Source
    from loopdev.images.pbs.keys import CryptKey
    from loopdev.images.pbs.names import Group, Snapshot

_TIME_MAX = 253402300799  # the end of the year 9999
_SUFFIX = ".img"


class PackedImage(Value):
    """One image of a snapshot.

    Attributes:
        archive: Its name: what follows the snapshot's name and a slash for ``loopdev map``.
        source: The image that it was made of.
        size: Bytes.
        changed: Whether the image was written to while it was read, so that what was packed may
            never have been in it at any one time.
    """

    archive: str
    source: str
    size: int
    changed: bool


class PackResult(Value):
    """What was packed.

    Attributes:
        snapshot: Its name, with ``ns/NAMESPACE/`` in front where there is one.
        repository: The datastore.
        crypt_mode: "encrypt", "sign-only" or "none".
        images: In the order given.
        counts: How many bytes were new, there already, zeros, or in a hole.
        seconds: How long it took.
    """

    snapshot: str
    repository: str
    crypt_mode: str
    images: tuple[PackedImage, ...]
    counts: PackProgress
    seconds: float


def pack(
    images: Sequence[str],
    repository: str | None,
    group: str,
    *,
    namespace: str = "",
    time: int | None = None,
    keyfile: str | None = None,
    crypt_mode: str | None = None,
    level: int = LEVEL,
    jobs: int | None = None,
    create_store: bool = False,
    report: Callable[[PackProgress], object] = lambda _progress: None,
) -> PackResult:
    """Pack images into a new snapshot.

    Args:
        images: Files or block devices; "drive-scsi0=disk.img" gives one a name in the snapshot,
            otherwise it has that of the file, without ``.img`` or ``.raw``.
        repository: The datastore: a directory. None: PBS_REPOSITORY has it.
        group: Such as "vm/100".
        namespace: Such as "a/b"; made if it does not exist.
        time: The snapshot's, in Unix seconds; None: now, or the next second that is free.
        keyfile: Encrypts or signs.
        crypt_mode: "encrypt" (needs a key, and is the default with one), "sign-only" or "none".
        level: Of zstd, 1 to 22; 0: don't compress.
        jobs: Threads; None: one for each processor.
        create_store: Make the datastore, if its directory is empty or does not exist.
        report: Called from time to time.

    Raises:
        InvalidValueError: An argument is wrong, or the snapshot exists already.
        ImageNotFoundError: There is no such datastore.
        ImageReadError: An image could not be read, or became shorter meanwhile.
        EncryptionKeyError: The key cannot be had.
        DeviceBusyError: The datastore's garbage is being collected, or the group is locked.
        KernelError: The store cannot be written: ENOSPC, EROFS, EACCES, ...
    """
    begun = clock.monotonic()
    root = local_repository(repository)
    wanted = _snapshot(parse_group(group, namespace), time)
    jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    for what, value, least, most in (("level", level, 0, 22), ("jobs", jobs, 1, 1024)):
        if not least <= value <= most:
            raise InvalidValueError(what, value, f"must be from {least} to {most}")
    with ExitStack() as stack:
        sources = _resolve(stack, images)
        key, mode = _key(keyfile, crypt_mode)
        archives = [_Archive(stack, name, source) for name, source in sources.items()]
        store = stack.enter_context(WritableStore.open(root, create_store))
        if time is not None:
            check_free(store, wanted)
        work = stack.enter_context(WorkDirectory.make(store.root))
        codec = Codec(key if mode == ENCRYPT else None, level)
        pipeline = Pipeline([a.image for a in archives], ChunkWriter(store, work.path), codec)
        pipeline.run(jobs, report)
        packed = tuple(archive.finish() for archive in archives)
        staged = os.path.join(work.path, "snapshot")
        store.make_directory(staged)
        entries = [
            _write_index(store, staged, archive, digests, mode)
            for archive, digests in zip(archives, pipeline.digests, strict=True)
        ]
        done = publish(
            store,
            staged,
            wanted,
            later=time is None,
            make_manifest=lambda snapshot: manifest.build(snapshot, entries, key),
        )
    return PackResult(
        snapshot=done.full_name,
        repository=store.root,
        crypt_mode=mode,
        images=packed,
        counts=pipeline.progress(),
        seconds=round(clock.monotonic() - begun, 3),
    )


def _snapshot(group: Group, time: int | None) -> Snapshot:
    seconds = int(clock.time()) if time is None else time
    if not 0 <= seconds <= _TIME_MAX:
        raise InvalidValueError("time", seconds, "must be from 1970 to 9999")
    return group.snapshot(seconds)


def _key(keyfile: str | None, mode: str | None) -> tuple[CryptKey | None, str]:
    mode = mode or (NONE if keyfile is None else ENCRYPT)
    if mode not in (ENCRYPT, SIGN_ONLY, NONE):
        raise InvalidValueError("crypt_mode", mode, "must be encrypt, sign-only or none")
    if (mode == NONE) != (keyfile is None):
        needs = "takes no key file" if keyfile is not None else "needs a key file"
        raise InvalidValueError("crypt_mode", mode, needs)
    return (None if keyfile is None else load_key_file(keyfile)), mode


def _resolve(stack: ExitStack, images: Sequence[str]) -> dict[str, Source]:
    """Return the sources by their names in the snapshot."""
    sources: dict[str, Source] = {}
    for image in images:
        name, equals, path = image.partition("=")
        if not equals or not is_safe(name):
            name, path = "", image
        source = stack.enter_context(closing(resolve(path)))
        name = (name or source.name).removesuffix(INDEX_SUFFIX)
        name = name.removesuffix(_SUFFIX).removesuffix(".raw") + _SUFFIX
        if not is_safe(name):
            raise InvalidValueError("image", image, "has no usable name: say NAME=IMAGE")
        if name in sources:
            raise InvalidValueError("image", image, f"there is one named {name}: say NAME=IMAGE")
        sources[name] = source
    if not sources:
        raise InvalidValueError("images", "", "there must be one")
    return sources


class _Archive:
    """An image that is being packed."""

    def __init__(self, stack: ExitStack, name: str, source: Source) -> None:
        self.name, self.filename = name, name + INDEX_SUFFIX
        self._source = source.description
        self.image: Image = stack.enter_context(closing(source.open()))
        self._before = self._modified()

    def _modified(self) -> int:
        """Return when a file was written to; a device does not tell."""
        fd = self.image.fileno()
        status = None if fd is None else os.fstat(fd)
        return status.st_mtime_ns if status and stat.S_ISREG(status.st_mode) else 0

    def finish(self) -> PackedImage:
        """Return what was packed.

        Raises:
            ImageReadError: The image became shorter: what is missing looked like a hole.
        """
        size, fd = self.image.size, self.image.fileno()
        end = size if fd is None else os.lseek(fd, 0, os.SEEK_END)
        if end < size:
            reason = "it has become shorter while it was packed"
            raise ImageReadError(self._source, end, size - end, reason)
        changed = self._modified() != self._before
        return PackedImage(archive=self.name, source=self._source, size=size, changed=changed)


def _write_index(
    store: WritableStore, directory: str, archive: _Archive, digests: bytearray, mode: str
) -> FileEntry:
    size = archive.image.size
    header = index.build(digests, size, uuid=uuid.uuid4().bytes, ctime=int(clock.time()))
    store.write_file(os.path.join(directory, archive.filename), header, digests)
    csum = index.digests_csum(digests)
    return FileEntry(filename=archive.filename, crypt_mode=mode, size=size, csum=csum)
