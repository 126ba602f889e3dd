# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""mount(2), umount2(2), and what is mounted where.

Nothing here looks at what a mount point shows: a FUSE server that hangs or is gone would hang us,
too, or give ENOTCONN.
"""

from __future__ import annotations

import os

from loopdev._value import Value
from loopdev.errors import kernel_error
from loopdev.kernel import libc

# Flags, from <linux/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_NOATIME = 1024

# Flags of the umount2 system call
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_MOUNTINFO = "/proc/self/mountinfo"


class MountPoint(Value):
    """One line of /proc/self/mountinfo.

    Attributes:
        target: Where it is mounted.
        device: Its st_dev; the minor number is that of its FUSE connection.
        fstype: The kind of filesystem, with its subtype, such as ``fuse.loopdev``.
        source: The first argument of mount(2).
    """

    target: str
    device: int
    fstype: str
    source: str


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """Mount a filesystem.

    Args:
        source: What is mounted; for FUSE, any name.
        target: An existing file or directory.
        fstype: The kind of filesystem.
        flags: ``MS_*``.
        data: The options of this kind of filesystem, separated by commas.

    Raises:
        NotPermittedError: EPERM without CAP_SYS_ADMIN.
        NoSuchDeviceError: ENODEV when the kernel has no such filesystem.
        KernelError: EINVAL when the data are wrong.
    """
    words = [os.fsencode(word) for word in (source, target, fstype)]
    try:
        libc.call("mount", *words, flags, os.fsencode(data))
    except OSError as exc:
        raise kernel_error(exc, target, "mount") from exc


def umount(target: str, flags: int = 0) -> None:
    """Unmount what was mounted last on *target*.

    Args:
        target: The mount point.
        flags: ``MNT_*`` and ``UMOUNT_NOFOLLOW``.

    Raises:
        DeviceBusyError: EBUSY when something in it is open.
        KernelError: EINVAL when nothing is mounted there.
    """
    try:
        libc.call("umount2", os.fsencode(target), flags)
    except OSError as exc:
        raise kernel_error(exc, target, "umount2") from exc


def mounted(target: str) -> MountPoint | None:
    """Return what is mounted on *target*, the last one where there are several; None if nothing."""
    wanted = os.fsencode(_place(target))
    found = None
    with open(_MOUNTINFO, "rb") as file:
        for line in file:
            words = line.split()
            if _unescaped(words[4]) == wanted:
                found = words
    return None if found is None else _parsed(found)


def _place(target: str) -> str:
    # The directory it is in may be reached by a link, but the last component is not looked at.
    directory, name = os.path.split(os.path.abspath(target))
    return os.path.join(os.path.realpath(directory), name)


def _parsed(words: list[bytes]) -> MountPoint:
    # ID, parent, device, root, target, options, any number of fields, "-", kind, source, options
    end = words.index(b"-", 6)
    major, minor = words[2].split(b":")
    return MountPoint(
        target=os.fsdecode(_unescaped(words[4])),
        device=os.makedev(int(major), int(minor)),
        fstype=os.fsdecode(_unescaped(words[end + 1])),
        source=os.fsdecode(_unescaped(words[end + 2])),
    )


def _unescaped(word: bytes) -> bytes:
    # Blanks, backslashes and # are written as a backslash and three octal digits.
    first, *rest = word.split(b"\\")
    return first + b"".join(bytes((int(part[:3], 8),)) + part[3:] for part in rest)
