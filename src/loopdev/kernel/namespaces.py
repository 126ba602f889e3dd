# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""System calls that Python 3.11 has no name for: mount namespaces, detached mounts, statx.

Through ctypes, so only what needs them imports this.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS = 0x00020000
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
FUSE_SUPER_MAGIC = 0x65735546

# The same number on every architecture: they are newer than 5.1, alpha aside.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
# The C library's setgroups() changes every thread; this one does not. 159: <asm-generic/unistd.h>.
_SYS_SETGROUPS = {"x86_64": 116, "s390x": 206, "ppc64le": 81}.get(platform.machine(), 159)

_PR_SET_PDEATHSIG = 1
_CAPABILITY_VERSION_3 = 0x20080522
# CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID
_CAP_FS_MASK = 0b11111
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_FSOPEN_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_SIZE = 256
_DEVICE = struct.Struct("@II")
_STATX_DEV = 136  # offset of stx_dev_major, stx_dev_minor in struct statx, <linux/stat.h>


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    words = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *words))


def clone_mount(path: str) -> int:
    """Return a descriptor of a new bind mount of *path*, which is mounted nowhere yet."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return _syscall(_SYS_OPEN_TREE, -100, os.fsencode(path), flags)


def move_mount(mount: int, target: int) -> None:
    """Mount what clone_mount() made onto the open file *target*.

    Raises:
        OSError: EINVAL: *target* is not in this process's mount namespace.
    """
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _syscall(_SYS_MOVE_MOUNT, mount, b"", target, b"", flags)


def unmount(name: bytes) -> None:
    """Unmount *name*, seen from the working directory; a symbolic link is not followed."""
    _check(_libc.umount2(name, MNT_DETACH | UMOUNT_NOFOLLOW))


def mount_single(kind: bytes) -> int:
    """Return a descriptor of a mount of a filesystem that has no source, mounted nowhere.

    Raises:
        OSError: ENODEV: the kernel has no such filesystem, or it is not loaded.
    """
    context = _syscall(_SYS_FSOPEN, kind, _FSOPEN_CLOEXEC)
    try:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def enter_mount_namespace(fd: int) -> None:
    """Make this thread's mount namespace the one of a descriptor; root and cwd become its root."""
    _check(_libc.setns(fd, CLONE_NEWNS))


_statx = ctypes.create_string_buffer(_STATX_SIZE)


def filesystem_of(fd: int) -> tuple[int, int]:
    """Return major and minor of a descriptor's filesystem, without asking that filesystem."""
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    _check(_libc.statx(fd, b"", flags, 0, _statx))
    major, minor = _DEVICE.unpack_from(_statx, _STATX_DEV)
    return major, minor


def die_with_parent() -> None:
    """Have this process killed when the thread that has started it ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0))


class _capabilities(ctypes.Structure):  # noqa: N801 - named as in C
    """Header and data of capset(2). Source: <linux/capability.h>, version 3."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("pid", ctypes.c_int),
        ("sets", ctypes.c_uint32 * 6),  # effective, permitted, inheritable; then their upper halves
    )


def override_files(allowed: bool) -> None:
    """Have this thread get past the modes and owners of files, or not, as far as it is permitted.

    These are the capabilities that set_filesystem_ids() takes away from all users but root.
    """
    caps = _capabilities(_CAPABILITY_VERSION_3, 0)
    data = ctypes.byref(caps, _capabilities.sets.offset)
    _check(_libc.capget(ctypes.byref(caps), data))
    if allowed:
        caps.sets[0] |= caps.sets[1] & _CAP_FS_MASK
    else:
        caps.sets[0] &= ~_CAP_FS_MASK
    _check(_libc.capset(ctypes.byref(caps), data))


def set_filesystem_ids(uid: int, gid: int, groups: list[int]) -> None:
    """Have the kernel check this thread's file accesses as those of another user.

    Raises:
        OSError: EPERM: without CAP_SETUID and CAP_SETGID.
    """
    array = (ctypes.c_uint32 * len(groups))(*groups)
    _check(_libc.syscall(ctypes.c_long(_SYS_SETGROUPS), ctypes.c_long(len(groups)), array))
    # In this order: without the user 0 the group could not be changed back. Neither reports a
    # failure, but each returns what was set before.
    for change, value in ((_libc.setfsgid, gid), (_libc.setfsuid, uid)):
        change(value)
        if change(-1) != value:
            raise PermissionError(1, "setfsuid")
