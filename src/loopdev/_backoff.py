# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Waiting for the kernel: bounded by a deadline, silent, jittered."""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


def backoff(deadline: float, first: float = 50e-6, longest: float = 0.02) -> Iterator[float]:
    """Yield at once, then after growing pauses, until the deadline has passed.

    Each pause is between half and all of its length, so that processes which met once do not
    meet again.

    Args:
        deadline: In seconds of :func:`time.monotonic`; one try is made even if it has passed.

        first: The first pause, in seconds.
        longest: The longest one.

    Yields:
        The pause before this try, in seconds.
    """
    pause = 0.0
    bound = first
    while True:
        yield pause
        left = deadline - time.monotonic()
        if left <= 0:
            return
        # os.urandom and not the module random, whose import costs 3 ms.
        pause = min(left, bound * (0.5 + os.urandom(1)[0] / 512))
        time.sleep(pause)
        bound = min(bound * 1.5, longest)
