# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the processes of a map have in common."""

from __future__ import annotations

from loopdev._value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.fuse.session import Session
    from loopdev.images import Source
    from loopdev.kernel.fds import OwnedFd
    from loopdev.mapping._cache import Cache
    from loopdev.mapping._counters import Counters
    from loopdev.mapping._log import Log
    from loopdev.mapping._registry import Entry


class Plan(Value):
    """All that the processes of a map need; made before they are.

    Attributes:
        entry: Its directory.
        lock: That is locked while one of them lives.
        supervising: That is locked while the supervisor lives.
        source: The image.
        session: The mount.
        cache: For blocks; None: the kernel caches the image.
        counters: What they count with.
        log: Where they complain.
        size: Of the file, in bytes.
        workers: How many serve.
        threads: How many reads of each may wait at once.
        timeout: For a read, in seconds.
        owner: The end of a pipe: who made the map has the other one. It tells the device, and
            if it is closed then, the map ends, unless the map was told to stay.
    """

    entry: Entry
    lock: OwnedFd
    supervising: OwnedFd
    source: Source
    session: Session
    cache: Cache | None
    counters: Counters
    log: Log
    size: int
    workers: int
    threads: int
    timeout: float
    owner: OwnedFd
