# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Images to chunks, with all processors.

Threads do: reading, hashing, compressing, encrypting and writing 4 MiB all let go of the
interpreter's lock. Each thread takes the next chunk of the images and does all of that to it.
"""

from __future__ import annotations

import threading
from _hashlib import openssl_sha256
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from loopdev._value import Value
from loopdev.images.pbs import blob
from loopdev.images.pbs._extents import chunks_to_read
from loopdev.images.pbs.index import CHUNK_SIZE, DIGEST_SIZE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from loopdev.images import Image
    from loopdev.images.pbs._chunks import ChunkWriter
    from loopdev.images.pbs.blob import Readable
    from loopdev.images.pbs.keys import CryptKey

_ZEROS = bytes(CHUNK_SIZE)
_TICK = 0.1  # seconds between reports


class PackProgress(Value):
    """How far a run is; all figures are bytes.

    Attributes:
        total: Of all images.
        holes: Known to be zeros without reading.
        zeros: Read, and found to be a chunk of zeros.
        reused: Read, and found to be in the datastore already, or twice in the images.
        new: Read, and new to the datastore.
        written: What *new* came to, compressed.
    """

    total: int
    holes: int
    zeros: int
    reused: int
    new: int
    written: int

    @property
    def read(self) -> int:
        """What was read."""
        return self.zeros + self.reused + self.new

    @property
    def done(self) -> int:
        """What need not be looked at again."""
        return self.holes + self.read


class Codec:
    """How data becomes chunks.

    Args:
        key: Encrypts them; None: they are not encrypted.
        level: Of zstd; 0: they are not compressed.
    """

    def __init__(self, key: CryptKey | None, level: int) -> None:
        self._key, self._level = key, level
        self.zero_digest = self.digest(_ZEROS)

    def digest(self, data: Readable) -> bytes:
        """Return the name of a chunk."""
        if self._key is not None:
            return self._key.digest(data)
        return openssl_sha256(data).digest()

    def encode(self, data: Readable) -> tuple[bytes, Readable]:
        """Return the file of a chunk: header and body."""
        return blob.encode_parts(data, self._key, self._level)


class Pipeline:
    """One run over some images.

    Args:
        images: What to read; each gets its digests in ``digests``.
        chunks: Where chunks go.
        codec: What they are made with.
    """

    def __init__(self, images: list[Image], chunks: ChunkWriter, codec: Codec) -> None:
        self._images, self._chunks, self._codec = images, chunks, codec
        # All is zeros until it was read: so holes cost nothing.
        self.digests = [
            bytearray(codec.zero_digest * -(-image.size // CHUNK_SIZE)) for image in images
        ]
        self._tasks = self._to_read()
        self._lock = threading.Lock()
        self._stopped = False
        self._counts = dict.fromkeys(("holes", "zeros", "reused", "new"), 0)
        self._next = 0  # where in the images all before was given out

    def progress(self) -> PackProgress:
        """Return how far it is."""
        with self._lock:
            total = sum(image.size for image in self._images)
            return PackProgress(total=total, written=self._chunks.written, **self._counts)

    def run(self, jobs: int, report: Callable[[PackProgress], object]) -> None:
        """Read the images, and write the chunks that the datastore does not have.

        Args:
            jobs: How many threads.
            report: Called by this thread from time to time.

        Raises:
            ImageReadError: An image cannot be read.
            KernelError: The store cannot be written.
        """
        with ThreadPoolExecutor(jobs + 1, "pack") as pool:
            try:
                publisher = pool.submit(self._chunks.publish_until_finished)
                self._follow({pool.submit(self._work) for _ in range(jobs)}, publisher, report)
            finally:
                # A signal comes this way, too.
                self._stopped = True
                self._chunks.finish()
        self._store_zeros()
        self._chunks.publish()
        report(self.progress())

    def _follow(
        self,
        workers: set[Future[None]],
        publisher: Future[None],
        report: Callable[[PackProgress], object],
    ) -> None:
        while workers:
            done, workers = wait(workers, _TICK, FIRST_COMPLETED)
            for future in (*done, *([publisher] if publisher.done() else [])):
                future.result()
            report(self.progress())

    def _to_read(self) -> Iterator[tuple[int, int]]:
        for place, image in enumerate(self._images):
            reached = 0
            for number in chunks_to_read(image):
                self._counts["holes"] += (number - reached) * CHUNK_SIZE
                reached = number + 1
                yield place, number
            self._counts["holes"] += max(image.size - reached * CHUNK_SIZE, 0)

    def _work(self) -> None:
        buffer = bytearray(CHUNK_SIZE)
        while not self._stopped:
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            kind, length = self._pack(*task, buffer)
            with self._lock:
                self._counts[kind] += length

    def _pack(self, place: int, number: int, buffer: bytearray) -> tuple[str, int]:
        """Pack one chunk; return what it was, and its length."""
        image = self._images[place]
        offset = number * CHUNK_SIZE
        length = min(CHUNK_SIZE, image.size - offset)
        with memoryview(buffer)[:length] as view:
            image.read_into(offset, view)
            # bytearray == bytes is memcmp(), which ends at the first difference.
            if length == CHUNK_SIZE and buffer == _ZEROS:
                return "zeros", length
            digest = self._codec.digest(view)
            start = number * DIGEST_SIZE
            self.digests[place][start : start + DIGEST_SIZE] = digest
            if not self._chunks.claim(digest, blob.HEADER_MAX + length):
                return "reused", length
            self._chunks.write(digest, *self._codec.encode(view))
        return "new", length

    def _store_zeros(self) -> None:
        counts, digest = self._counts, self._codec.zero_digest
        if counts["holes"] + counts["zeros"] == 0:
            return
        if self._chunks.claim(digest, blob.HEADER_MAX + CHUNK_SIZE):
            self._chunks.write(digest, *self._codec.encode(_ZEROS))
