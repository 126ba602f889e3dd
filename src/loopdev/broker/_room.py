# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Whether there are descriptors for anything new, beside those for what must go on."""

from __future__ import annotations

import os
import resource
import sys

# Kept for workers and for what they send: a quarter of all, but no more than this.
_RESERVE = 256


class Room:
    """What is left of the descriptors of this process.

    Args:
        fd: Any that stays open.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        reserve = min(_RESERVE, most // 4)
        self._end = sys.maxsize if most == resource.RLIM_INFINITY else most - reserve

    def is_left(self) -> bool:
        """Return whether there is more left than the reserve."""
        try:
            # The kernel gives the lowest number that is free.
            lowest = os.dup(self._fd)
        except OSError:
            return False
        os.close(lowest)
        return lowest < self._end
