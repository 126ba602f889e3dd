# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A progress bar on standard error, if that is a terminal."""

from __future__ import annotations

import sys
import time

from loopdev.cli._output import human_size, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self, TextIO

_INTERVAL = 0.1
_BAR = 24
# Rates are of the last seconds, not of all the time: that is what the rest will take.
_WINDOW = 5.0
_CLEAR = "\r\x1b[K"


class Progress:
    """A bar with rate and time left; it prints nothing where nobody looks.

    Args:
        total: What there is to do, in bytes.
        label: What is being done.
        stream: Where to; None: standard error.

    Attributes:
        total: As given; may be set when it is known.
    """

    def __init__(self, total: int, label: str, stream: TextIO | None = None) -> None:
        self.total, self._label = total, printable(label)
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream is not None and self._stream.isatty()
        self._samples = [(time.monotonic(), 0)]
        self._next = 0.0

    def update(self, done: int, text: str = "") -> None:
        """Show that *done* bytes are done, and *text*; not more often than the eye can follow."""
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + _INTERVAL
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > _WINDOW:
            del self._samples[0]
        self._print(self._line(done, text))

    def _line(self, done: int, text: str) -> str:
        share = min(1.0, done / self.total) if self.total else 1.0
        (first, before), (last, _) = self._samples[0], self._samples[-1]
        rate = max(0.0, (done - before) / max(last - first, 1e-3))
        full = int(share * _BAR)
        parts = (
            f"{self._label} [{'#' * full}{'.' * (_BAR - full)}] {share:4.0%}",
            f"{human_size(done)} of {human_size(self.total)}",
            f"{human_size(int(rate))}/s",
            _time_left(max(0, self.total - done), rate),
            printable(text),
        )
        return "  ".join(part for part in parts if part)

    def _print(self, line: str) -> None:
        import shutil

        # A line that wraps could not be wiped.
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_CLEAR + line[:width])
        self._stream.flush()

    def close(self) -> None:
        """Wipe the bar; what is printed next stands in its place."""
        if self._shown and self._next:
            self._stream.write(_CLEAR)
            self._stream.flush()
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def _time_left(count: int, rate: float) -> str:
    if not rate or count / rate > 359999:
        return "--:-- left"
    minutes, seconds = divmod(round(count / rate), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
