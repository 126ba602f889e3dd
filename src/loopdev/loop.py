# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Every request of the loop driver as a method: the low-level API.

Here a caller decides; nothing is retried except where a method says so. :func:`loopdev.attach` is
the way for everybody who wants a loop device and no decisions. Method names are those that users
of osbuild's module of this name know, constants those of <linux/loop.h>.
"""

from __future__ import annotations

from loopdev._control import LoopControl
from loopdev._loop import Loop, UnexpectedDevice
from loopdev._loopinfo import LoopInfo
from loopdev.kernel.abi import (
    LO_FLAGS_AUTOCLEAR,
    LO_FLAGS_DIRECT_IO,
    LO_FLAGS_PARTSCAN,
    LO_FLAGS_READ_ONLY,
    LO_KEY_SIZE,
    LO_NAME_SIZE,
    LOOP_CHANGE_FD,
    LOOP_CLR_FD,
    LOOP_CONFIGURE,
    LOOP_CTL_ADD,
    LOOP_CTL_GET_FREE,
    LOOP_CTL_REMOVE,
    LOOP_GET_STATUS,
    LOOP_GET_STATUS64,
    LOOP_MAJOR,
    LOOP_SET_BLOCK_SIZE,
    LOOP_SET_CAPACITY,
    LOOP_SET_DIRECT_IO,
    LOOP_SET_FD,
    LOOP_SET_STATUS,
    LOOP_SET_STATUS64,
)

__all__ = [
    "LOOP_CHANGE_FD",
    "LOOP_CLR_FD",
    "LOOP_CONFIGURE",
    "LOOP_CTL_ADD",
    "LOOP_CTL_GET_FREE",
    "LOOP_CTL_REMOVE",
    "LOOP_GET_STATUS",
    "LOOP_GET_STATUS64",
    "LOOP_MAJOR",
    "LOOP_SET_BLOCK_SIZE",
    "LOOP_SET_CAPACITY",
    "LOOP_SET_DIRECT_IO",
    "LOOP_SET_FD",
    "LOOP_SET_STATUS",
    "LOOP_SET_STATUS64",
    "LO_FLAGS_AUTOCLEAR",
    "LO_FLAGS_DIRECT_IO",
    "LO_FLAGS_PARTSCAN",
    "LO_FLAGS_READ_ONLY",
    "LO_KEY_SIZE",
    "LO_NAME_SIZE",
    "Loop",
    "LoopControl",
    "LoopInfo",
    "UnexpectedDevice",
]
