# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The progress bar: what it says, and that it is silent where nobody looks."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from loopdev.cli import _progress
from loopdev.cli._progress import Progress

LINE = re.compile(r"copy \[(#*)(\.*)\] +(\d+)%  (\S+) of (\S+)  (\S+)/s  (\S+) left(?:  (.*))?$")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def last_line(stream: io.StringIO) -> str:
    return stream.getvalue().rpartition("\r\x1b[K")[2]


def test_silent_without_a_terminal():
    stream = io.StringIO()
    with Progress(100, "copy", stream) as progress:
        progress.update(50, "text")
    assert stream.getvalue() == ""


def test_silent_without_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(100, "copy") as progress:
        progress.update(50)


def test_what_it_says(clock):
    stream = Terminal()
    progress = Progress(100 << 20, "copy", stream)
    clock[0] += 2
    progress.update(50 << 20, "half")
    found = LINE.match(last_line(stream))
    assert found is not None
    assert found.groups() == ("#" * 12, "." * 12, "50", "50M", "100M", "25M", "0:02", "half")
    progress.close()
    assert last_line(stream) == ""


def test_the_rate_is_that_of_the_last_seconds(clock):
    stream = Terminal()
    progress = Progress(1000 << 20, "copy", stream)
    for second in range(60):
        clock[0] += 1
        progress.update((min(second, 30) * 10 + max(0, second - 30)) << 20)
    found = LINE.match(last_line(stream))
    assert found is not None
    assert found[6] == "1M"
    assert found[7] == "11:11"


@pytest.mark.parametrize(
    ("done", "total", "left"),
    [
        (0, 100, "--:--"),
        (100, 100, "0:00"),
        (1, 7201, "2:00:00"),
        (1, 10**9, "--:--"),
        (5, 0, "0:00"),
    ],
)
def test_time_left(clock, done, total, left):
    stream = Terminal()
    progress = Progress(total, "copy", stream)
    clock[0] += 1
    progress.update(done)
    found = LINE.match(last_line(stream))
    assert found is not None
    assert found[7] == left


def test_more_done_than_there_was(clock):
    stream = Terminal()
    progress = Progress(100, "copy", stream)
    clock[0] += 1
    progress.update(300)
    assert "100%" in last_line(stream)


def test_not_more_often_than_the_eye_can_follow(clock):
    stream = Terminal()
    progress = Progress(10000, "copy", stream)
    for done in range(10000):
        clock[0] += 0.001
        progress.update(done)
    assert stream.getvalue().count("\r") <= 101


def test_no_line_wraps_and_no_text_harms(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress(100, "copy", stream)
    clock[0] += 1
    progress.update(50, "\x1b[31m" + "x" * 200)
    assert len(last_line(stream)) < 40
    monkeypatch.setenv("COLUMNS", "400")
    clock[0] += 1
    progress.update(50, "\x1b[31m")
    assert "\x1b[31m" not in stream.getvalue()


def test_after_the_end_nothing_is_printed(clock):
    stream = Terminal()
    progress = Progress(100, "copy", stream)
    clock[0] += 1
    progress.update(50)
    progress.close()
    before = stream.getvalue()
    clock[0] += 1
    progress.update(60)
    progress.close()
    assert stream.getvalue() == before


def test_at_a_real_terminal():
    program = (
        "import time\nfrom loopdev.cli._progress import Progress\n"
        "with Progress(10, 'copy') as progress:\n"
        "    for done in range(11):\n        progress.update(done); time.sleep(0.03)\n"
        "print('end')\n"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    seen, deadline = b"", time.monotonic() + 30
    try:
        while time.monotonic() < deadline and (more := os.read(terminal, 1000)):
            seen += more
    except OSError:
        pass  # it ended
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    assert seen.count(b"copy [") >= 2
    assert seen.endswith(b"\r\x1b[Kend\r\n")


def test_importing_it_is_cheap():
    """It is loaded by every command that may be long."""
    program = "import sys; import loopdev.cli._progress; print('shutil' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n"
