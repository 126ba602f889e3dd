# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What a map's processes tell the log of what nobody has caught."""

from __future__ import annotations

import sys
import threading

import pytest

from loopdev.errors import ImageReadError
from loopdev.fuse.pool import Pool
from loopdev.mapping._worker import report_to


class Lines:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def log(self, message: str, priority: int = 6) -> None:
        self.messages.append(message)


@pytest.fixture
def lines(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # to be as it was afterwards
    found = Lines()
    report_to(found, "worker 3")
    return found


def raised(exc: BaseException) -> None:
    try:
        raise exc
    except BaseException:
        sys.excepthook(*sys.exc_info())


@pytest.mark.parametrize(
    "exc", [ImageReadError("disk.img", 4096, 512, "is damaged"), OSError(28, "No space left")]
)
def test_an_error_is_one_line(lines, exc):
    raised(exc)
    assert lines.messages == [f"worker 3 failed: {type(exc).__name__}: {exc}"]


def test_a_bug_keeps_its_traceback(lines):
    raised(KeyError("slot"))
    (message,) = lines.messages
    assert message.startswith("worker 3 failed:\nTraceback")
    assert "in raised" in message
    assert message.endswith("KeyError: 'slot'\n")


def test_a_thread_is_heard_too(lines):
    pool, done = Pool(1), threading.Event()
    pool.run(lambda: 1 / 0)
    pool.run(done.set)
    assert done.wait(10)
    (message,) = lines.messages
    assert message.endswith("ZeroDivisionError: division by zero\n")
