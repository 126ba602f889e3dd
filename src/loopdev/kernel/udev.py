# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""systemd-udevd, as far as it gets in the way.

Whenever a whole disk is closed after it was open for writing, udevd issues BLKRRPART: all
partitions vanish, those that the kernel can find come back, and those that only BLKPG added do
not. It does not while the device is locked, and cannot while a partition is open.
Source: synthesize_change() in src/udev/udevd.c (systemd 252).
"""

from __future__ import annotations

import os
import time

_CONTROL = "/run/udev/control"
_QUEUE = "/run/udev/queue"
# udevd has heard of a close within this time, in seconds, unless the machine is very busy.
_NOTICED = 0.02
_POLL = 0.01


def is_running() -> bool:
    """Return whether there is a udevd for this /run."""
    return os.path.exists(_CONTROL)


def wait_idle(timeout: float) -> bool:
    """Wait until udevd has nothing to do, as ``udevadm settle`` does.

    Args:
        timeout: Seconds.

    Returns:
        Whether it came to that.
    """
    deadline = time.monotonic() + timeout
    time.sleep(min(_NOTICED, timeout))
    while os.path.exists(_QUEUE):
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)
    return True
