# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What users name devices by: a node, a number, or the backing file."""

from __future__ import annotations

import errno
import os
import sys

from loopdev._device import LoopDevice
from loopdev.errors import BackingFileError, LoopdevError, NotBoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

DEVICE_HELP = "a loop device (/dev/loop3), its number (3), or its backing file (disk.img)"


def paths_of(name: str) -> list[str]:
    """Return the loop devices that an operand means, by their nodes; as meant_by()."""
    return [path for path, _ in meant_by(name)]


def meant_by(name: str) -> list[tuple[str, int | None]]:
    """Return the loop devices that an operand means, each with the attachment's diskseq.

    That is None where the device was named, and whatever it has is meant.

    Raises:
        NotBoundError: It is a file that no loop device has.
        BackingFileError: There is no such file.
    """
    if name.isascii() and name.isdecimal():
        return [(f"/dev/loop{name}", None)]
    if not name:
        raise BackingFileError(errno.ENOENT, "''", os.strerror(errno.ENOENT))
    if name.startswith("/dev/loop") or is_device(name):
        return [(name, None)]
    if name.startswith("loop") and name[4:].isdecimal() and not os.path.lexists(name):
        return [(f"/dev/{name}", None)]
    from loopdev._devices import devices, find

    try:
        found = [(device.path, device.diskseq) for device in find(name)]
    except OSError as exc:
        # The file may be gone, and its device not.
        lost = os.path.realpath(name) + " (deleted)"
        found = [(d.path, d.diskseq) for d in devices() if d.backing_file == lost]
        if os.path.lexists(lost):
            found = []  # there is a file that is called so
        if not found:
            code = exc.errno or errno.ENOENT
            raise BackingFileError(code, name, os.strerror(code)) from exc
    if not found:
        raise NotBoundError(errno.ENXIO, name, "find", "no loop device has this file")
    return found


def is_device(name: str) -> bool:
    """Return whether a path is a device node, of whatever device."""
    import stat

    try:
        mode = os.stat(name).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISBLK(mode) or stat.S_ISCHR(mode)


def opened(names: Sequence[str]) -> Iterator[LoopDevice]:
    """Yield the devices that operands mean, open, and close each."""
    for name in names:
        for path, diskseq in meant_by(name):
            with LoopDevice.open(path, diskseq) as device:
                yield device


def for_each(names: Sequence[str], act: Callable[[LoopDevice], object]) -> int:
    """Call *act* with each device, open; report failures and go on.

    Returns:
        The exit code of the first failure, or 0.
    """
    from loopdev.cli import fail

    code = 0
    for name in names:
        try:
            for device in opened([name]):
                act(device)
        except LoopdevError as exc:
            failed = fail(exc)
            code = code or failed
            sys.stderr.flush()
    return code
