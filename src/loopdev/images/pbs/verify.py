# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Whether all of an image can be read, and is what was backed up."""

from __future__ import annotations

import os
import threading

from loopdev._value import Value
from loopdev.errors import ImageReadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loopdev.images.pbs.image import PbsImage

_TICK = 0.1  # seconds between reports of progress
_GRACE = 2.0


class Damage(Value):
    """A chunk that cannot be used, and where in the image it would be; sizes are bytes."""

    digest: str
    reason: str
    length: int
    offsets: tuple[int, ...]


class Report(Value):
    """What was found; *size* is that of the image, *checked* that of its distinct chunks."""

    name: str
    size: int
    chunks: int
    distinct: int
    checked: int
    damaged: tuple[Damage, ...]


def verify_image(
    image: PbsImage, jobs: int | None = None, progress: Callable[[int], None] | None = None
) -> Report:
    """Read every distinct chunk of an image, and check it.

    Threads do it: reading, checksums, decryption and decompression all let go of the
    interpreter's lock.

    Args:
        image: It.
        jobs: How many threads; None: one for each processor, or more if the chunks are far away.
        progress: Told now and then how many bytes of the image are done.
    """
    run = _Run(image)
    threads = [
        threading.Thread(target=run.work, daemon=True)
        for _ in range(jobs or max(len(os.sched_getaffinity(0)), image.streams))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            alive = True
            while alive:
                thread.join(_TICK)
                alive = thread.is_alive()
                if progress is not None:
                    progress(run.passed)
    finally:
        run.stop()
        for thread in threads:
            thread.join(_GRACE)  # a store that hangs must not keep who was interrupted
    if run.failure is not None:
        raise run.failure
    return run.report()


class _Run:
    def __init__(self, image: PbsImage) -> None:
        self._image = image
        self._lock = threading.Lock()
        self._seen: set[bytes] = set()
        self._numbers: Iterator[int] = self._distinct()
        self._damaged: dict[bytes, str] = {}
        self._checked = 0
        self.passed = 0
        self.failure: BaseException | None = None

    def _distinct(self) -> Iterator[int]:
        index = self._image.index
        for number, digest in enumerate(index.digests()):
            self.passed += index.length(number)
            if digest not in self._seen:
                self._seen.add(digest)
                yield number

    def stop(self) -> None:
        """Let the threads end with the chunk they are at."""
        with self._lock:
            self._numbers = iter(())

    def work(self) -> None:
        """Check chunk after chunk."""
        image = self._image
        buffer = memoryview(bytearray(image.block_size))
        try:
            while True:
                with self._lock:
                    number = next(self._numbers, None)
                if number is None:
                    return
                self._check(number, buffer[: image.index.length(number)])
        except BaseException as exc:  # noqa: BLE001  # it is raised where it is looked for
            self.failure = exc
            self.stop()

    def _check(self, number: int, buffer: memoryview) -> None:
        try:
            self._image.read_chunk(number, buffer, trust_zeros=False)
        except ImageReadError as exc:
            self._damaged[self._image.index.digest(number)] = exc.reason
        with self._lock:
            self._checked += len(buffer)

    def report(self) -> Report:
        """Return what was found."""
        index = self._image.index
        places: dict[bytes, list[int]] = {digest: [] for digest in self._damaged}
        if places:
            for number, digest in enumerate(index.digests()):
                if digest in places:
                    places[digest].append(number)
        damaged = [
            Damage(
                digest=digest.hex(),
                reason=self._damaged[digest],
                length=index.length(numbers[0]),
                offsets=tuple(number * index.chunk_size for number in numbers),
            )
            for digest, numbers in sorted(places.items(), key=lambda place: place[1])
        ]
        return Report(
            name=self._image.name,
            size=index.size,
            chunks=index.count,
            distinct=len(self._seen),
            checked=self._checked,
            damaged=tuple(damaged),
        )
