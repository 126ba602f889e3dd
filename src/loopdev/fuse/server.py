# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""One process that serves a FUSE file: a loop that takes requests, and a pool for what may wait.

The loop answers at once what can be had without waiting. The rest goes to a thread of the pool,
so that many can be under way; answers leave in any order. A watch looks after them: a read whose
time is up is answered EIO, whatever its thread waits for.
"""

from __future__ import annotations

import _thread
import errno
import os
import select
import time

from loopdev.fuse import protocol
from loopdev.fuse.pool import Pool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    Buffers = list[memoryview | bytes]

    class Reader(Protocol):
        """The bytes of the file."""

        def at_once(self, offset: int, size: int) -> Buffers | None:
            """Return exactly *size* bytes if they can be had without waiting, else None."""

        def wait(self, offset: int, size: int, deadline: float) -> Buffers:
            """Return exactly *size* bytes; called by many threads. OSError: the read fails."""

        @property
        def busy(self) -> bool:
            """Whether there is work under way that nobody waits for yet."""

        def sent(self) -> None:
            """Be told that the buffers of at_once() are not needed any more."""

        def done(self) -> None:
            """Be told the same of those that this thread had from wait()."""

    class Counters(Protocol):
        """What is counted: by the loop, and by one thread of the pool at a time."""

        def take(self) -> None:
            """Count a request."""

        def answer(self) -> None:
            """Count an answer of the loop that was no read."""

        def answer_read(self, size: int) -> None:
            """Count a read that the loop answered."""

        def wait(self) -> None:
            """Count a read that has to wait."""

        def answer_late(self, size: int, failed: bool) -> None:
            """Count the answer of a read that had to wait."""


# After a request, look for another so many times before going to sleep: some 50 us. Sleeping and
# waking costs more than serving a small read does, and a reader who waits for one answer before
# it asks for the next would pay it each time. Not while other threads need the processor.
_TRIES = 50
# Sleep no longer than this, in seconds: the one that was woken may have been stopped since.
_NAP = 2.0
# The request is not there any more: its reader was killed, or it was queued again meanwhile.
_GONE = frozenset((errno.ENOENT, errno.EINTR, errno.EAGAIN))


class Disconnected(Exception):  # noqa: N818 - it is an event, no error
    """The connection is over: the file was unmounted, or the connection aborted."""


class Server:
    """Serves one descriptor until the connection ends.

    Args:
        fd: A descriptor of /dev/fuse of this process's own; it is made non-blocking.
        file: The file's attributes.
        reader: Its bytes.
        counters: What is counted.
        timeout: How long a read may take, in seconds; then it is EIO.
        threads: How many reads may wait at once.
    """

    def __init__(
        self,
        fd: int,
        file: protocol.File,
        reader: Reader,
        counters: Counters,
        timeout: float,
        threads: int,
    ) -> None:
        os.set_blocking(fd, False)
        self._fd, self._file, self._reader, self._counters = fd, file, reader, counters
        self._timeout = timeout
        self.pool = Pool(threads)
        # Reads that wait: until when, by unique number. Who takes one out answers it.
        self._waiting: dict[int, float] = {}
        self._watch = _thread.allocate_lock()
        self._watch.acquire()
        self._watched = False

    def run(self) -> None:
        """Serve.

        Raises:
            Disconnected: The file was unmounted, or the connection aborted.
        """
        buffer = bytearray(protocol.MIN_READ_BUFFER + protocol.PAGE)
        into = [memoryview(buffer)]
        unpack, read_op = protocol.READ_REQUEST.unpack_from, protocol.READ
        at_once, sent, counters = self._reader.at_once, self._reader.sent, self._counters
        poller = select.epoll()
        # A request wakes one server that sleeps, not all of them.
        poller.register(self._fd, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        fd, readv, tries, end = self._fd, os.readv, 0, self._file.size
        reader, pool = self._reader, self.pool
        while True:
            try:
                length = readv(fd, into)
            except BlockingIOError:
                tries += 1
                if tries > _TRIES or (tries == 1 and (reader.busy or pool.busy)):
                    poller.poll(_NAP)
                    tries = 0
                continue
            except OSError as exc:
                _check(exc)
                continue
            tries = 0
            counters.take()
            _, opcode, unique, offset, size = unpack(buffer)
            if opcode != read_op:
                self._answer_other(memoryview(buffer)[:length])
                continue
            if offset + size > end:
                # Reads past the page cache do not know where the file ends.
                size = end - offset
                if size <= 0:
                    self._send(unique, 0, [])
                    counters.answer()
                    continue
            buffers = at_once(offset, size)
            if buffers is None:
                self._hand_over(unique, offset, size)
                continue
            self._send(unique, size, buffers)
            sent()
            counters.answer_read(size)

    def _answer_other(self, message: memoryview) -> None:
        answer = self._file.answer(protocol.parse(message))
        if answer is not None:
            self._write([answer])
        self._counters.answer()

    def _send(self, unique: int, size: int, buffers: Buffers) -> None:
        header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + size, 0, unique)
        self._write([header, *buffers])

    def _write(self, buffers: Buffers) -> None:
        try:
            os.writev(self._fd, buffers)
        except OSError as exc:
            _check(exc)

    def _hand_over(self, unique: int, offset: int, size: int) -> None:
        """Let a thread of the pool answer."""
        self._counters.wait()
        if unique in self._waiting:
            # Queued again after another server died, while ours is at work on it.
            self._counters.answer()
            return
        deadline = time.monotonic() + self._timeout
        self._waiting[unique] = deadline
        if not self._watched:
            self._watched = True
            _thread.start_new_thread(self._watch_over, ())
        elif len(self._waiting) == 1:
            self._wake_watch()
        self.pool.run(lambda: self._answer_late(unique, offset, size, deadline))

    def _answer_late(self, unique: int, offset: int, size: int, deadline: float) -> None:
        buffers: Buffers | None = None
        try:
            buffers = self._reader.wait(offset, size, deadline)
        except OSError:
            pass  # it has been reported; the kernel passes nothing but EIO on
        finally:
            # A bug of ours, or of a library, is this read's failure, too, and no others'.
            self._finish(unique, size, buffers)
            self._reader.done()

    def _finish(self, unique: int, size: int, buffers: Buffers | None) -> None:
        if self._waiting.pop(unique, None) is None:
            return  # its time was up
        try:
            if buffers is None:
                self._write([protocol.error(unique, errno.EIO)])
            else:
                self._send(unique, size, buffers)
        except Disconnected:
            pass  # the loop sees it, too
        with self.pool.lock:
            self._counters.answer_late(size, buffers is None)

    def _wake_watch(self) -> None:
        if self._watch.locked():
            try:
                self._watch.release()
            except RuntimeError:
                pass  # the other end was quicker

    def _watch_over(self) -> None:
        """Answer EIO to what waits for too long; sleep while nothing waits."""
        while True:
            if not self._waiting:
                self._watch.acquire()
                continue
            now = time.monotonic()
            for unique, deadline in list(self._waiting.items()):
                if deadline <= now:
                    self._finish(unique, 0, None)
            time.sleep(min(self._timeout / 8, 0.25))


def _check(exc: OSError) -> None:
    """Pass what a single request's end says.

    Raises:
        Disconnected: ENODEV: unmounted, or aborted by umount; ECONNABORTED: aborted by fusectl.
        OSError: Anything else.
    """
    if exc.errno in _GONE:
        return
    if exc.errno in (errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED, errno.EPERM):
        raise Disconnected from exc
    raise exc
