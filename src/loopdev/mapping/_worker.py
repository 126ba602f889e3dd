# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A process that serves a map: it opens the image, and answers reads until it is unmounted."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import sys
import time

from loopdev.errors import LoopdevError
from loopdev.fuse.protocol import File
from loopdev.fuse.server import Disconnected, Server
from loopdev.kernel import process
from loopdev.mapping._readers import CachedReader, PlainReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import NoReturn

    from loopdev.errors import ImageReadError
    from loopdev.images import Image
    from loopdev.kernel.fds import OwnedFd
    from loopdev.mapping._log import Log
    from loopdev.mapping._plan import Plan

# Exit codes
DISCONNECTED, FAILED = 0, 1
_OOM_SCORE = -500
# Blocks to decode at a time for each that can be on its way: each takes up to 12 MiB beside itself.
_DECODERS = 4


def run(plan: Plan, number: int, fd: int, not_ours: tuple[OwnedFd, ...]) -> NoReturn:
    """Be worker *number*, which serves *fd*."""
    code = FAILED
    report_to(plan.log, f"worker {number}")
    try:
        forget_signals()
        for other in not_ours:
            other.close()
        plan.owner.close()
        plan.session.keep_only(fd)
        code = _serve(plan, number, fd)
    except BaseException:  # noqa: BLE001 - it is the log that hears of it
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def report_to(log: Log, who: str) -> None:
    """Have what nobody catches, in any thread of this process, told to the log: errors in a line.

    Anything but an error of ours or of the kernel is a bug, and keeps its traceback.
    """

    def report(kind: type[BaseException], exc: BaseException, trace: TracebackType | None) -> None:
        text = f"{who} failed: {kind.__name__}: {exc}"
        if not isinstance(exc, (LoopdevError, OSError)):
            from traceback import format_exception

            text = f"{who} failed:\n{''.join(format_exception(kind, exc, trace))}"
        log.log(text)

    sys.excepthook = report


def forget_signals() -> None:
    """Undo what the supervisor had signals do; only it is to be asked to end."""
    _signal.set_wakeup_fd(-1)
    for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP, _signal.SIGPIPE):
        _signal.signal(number, _signal.SIG_IGN)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)


def _serve(plan: Plan, number: int, fd: int) -> int:
    process.set_title(f"loopdev: map {plan.entry.name}, worker {number}")
    process.set_io_flusher()
    process.protect_from_oom(_OOM_SCORE)
    counters = plan.counters.row(number)
    counters.begin(os.getpid())
    image = plan.source.open()
    reader = _reader(plan, number, image)
    image.serve(plan.timeout, plan.log.log, number == 0)
    file = File(
        size=plan.size, blksize=max(image.block_size, 4096), mode=0o400, time=int(time.time())
    )
    if number == 0 and isinstance(reader, CachedReader):
        reader.begin()
    threads = min(plan.threads, _DECODERS * image.streams) if image.cached else plan.threads
    server = Server(fd, file, reader, counters, plan.timeout, threads)
    try:
        server.run()
    except Disconnected:
        pass  # unmounted or aborted: a worker cannot tell
    return DISCONNECTED


def _reader(plan: Plan, number: int, image: Image) -> PlainReader | CachedReader:
    def report(block: int, exc: ImageReadError) -> None:
        if plan.counters.note_damage(block):
            plan.log.log(str(exc))

    if plan.cache is None:
        return PlainReader(image, report)
    plan.cache.enter(number)
    return CachedReader(image, plan.cache, report, plan.workers)
