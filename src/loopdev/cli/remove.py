# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev remove``."""

from __future__ import annotations

import errno

from loopdev._control import LoopControl
from loopdev.cli._args import Args, Operand, number
from loopdev.errors import DeviceBusyError, InvalidValueError, LoopdevError, NoSuchDeviceError
from loopdev.kernel import sysfs

HELP = "remove unbound loop devices, with their nodes"
OPERANDS = (Operand("DEVICE", "a loop device (/dev/loop12) or its number (12)", "+", "device"),)
OPTIONS = ()
EXAMPLES = "  loopdev remove 12"


def run(args: Args) -> int:
    """Remove each; one that fails does not keep the others."""
    from loopdev.cli import fail

    code = 0
    with LoopControl() as control:
        for name in args.device:
            try:
                _remove(control, name)
            except LoopdevError as exc:
                failed = fail(exc)
                code = code or failed
    return code


def _remove(control: LoopControl, name: str) -> None:
    try:
        wanted = number(name)
    except ValueError as exc:
        raise InvalidValueError("DEVICE", name, "must be a loop device or its number") from exc
    if not sysfs.exists(wanted):
        path = f"/dev/loop{wanted}"
        raise NoSuchDeviceError(errno.ENODEV, path, "LOOP_CTL_REMOVE", "there is no such device")
    bound = sysfs.backing_file(wanted)
    if bound is not None:
        reason = f"is bound to {bound}; detach it first"
        raise DeviceBusyError(errno.EBUSY, f"/dev/loop{wanted}", "LOOP_CTL_REMOVE", reason)
    control.remove(wanted)
