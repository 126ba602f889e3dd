# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""New chunks of a datastore: none has its own name before its bytes are on the disk.

A chunk that a power failure left empty under its own name would be taken for the real one by all
later backups. So chunks are written to the work directory, and from time to time one syncfs()
vouches for all of them, and they are renamed. (An fsync for each costs two to four times as much.)
What was renamed before a run was interrupted need not be written by the next one.
"""

from __future__ import annotations

import os
import stat
import threading
import time

from loopdev.images.pbs._store import refused
from loopdev.images.pbs.datastore import CHUNKS, chunk_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs._store import WritableStore
    from loopdev.images.pbs.blob import Readable

_BATCH = 128 << 20  # bytes for which a sync is worth its while


class ChunkWriter:
    """The chunks that one run uses: those that are there are touched, new ones are written.

    Every method may be called by any thread.

    Args:
        store: Where they go.
        work: A directory on the store's filesystem, for the new ones.
    """

    def __init__(self, store: WritableStore, work: str) -> None:
        self._store, self._work = store, work
        self._chunks = os.path.join(store.root, CHUNKS)
        self._known: set[bytes] = set()
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self.written = 0  # bytes of new chunks, as they are in the store

    def claim(self, digest: bytes, most: int) -> bool:
        """Return whether the caller has to write a chunk.

        Args:
            digest: The chunk's.
            most: The greatest size that its file may have.
        """
        with self._changed:
            if digest in self._known:
                return False
            self._known.add(digest)
        return not self._touch(self._path(digest), most)

    def _touch(self, path: str, most: int) -> bool:
        """Have a garbage collection keep a chunk; False: there is none, or it cannot be whole."""
        with refused(path, "utimensat"):
            try:
                status = os.stat(path, follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= most:
                    return False
                os.utime(path, ns=(time.time_ns(), status.st_mtime_ns), follow_symlinks=False)
            except FileNotFoundError:
                return False
        return True

    def _path(self, digest: bytes) -> str:
        return os.path.join(self._chunks, chunk_path(digest))

    def _temporary(self, digest: bytes) -> str:
        return os.path.join(self._work, digest.hex())

    def write(self, digest: bytes, *parts: Readable) -> None:
        """Write a chunk that was claimed.

        Raises:
            KernelError: ENOSPC, EDQUOT, EIO, ...
        """
        size = self._store.write_file(self._temporary(digest), *parts)
        with self._changed:
            self.written += size
            self._pending.append(digest)
            self._pending_bytes += size
            if self._pending_bytes >= _BATCH:
                self._changed.notify_all()

    def publish(self) -> None:
        """Give the chunks that were written so far their names."""
        with self._changed:
            digests, self._pending = self._pending, []
            self._pending_bytes = 0
        if digests:
            self._store.sync()
        for digest in digests:
            temporary, path = self._temporary(digest), self._path(digest)
            with refused(path, "rename"):
                try:
                    os.rename(temporary, path)
                except FileNotFoundError:
                    # A server makes all these directories at once; not every store is a server's.
                    self._store.make_directory(os.path.dirname(path))
                    os.rename(temporary, path)

    def publish_until_finished(self) -> None:
        """Go on publishing beside those who write, until finish() or an error."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._pending_bytes >= _BATCH)
                if self._closing:
                    return
            self.publish()

    def finish(self) -> None:
        """End publish_until_finished()."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
