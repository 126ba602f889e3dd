# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The connection between a FUSE mount and those who serve it."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from loopdev.errors import kernel_error
from loopdev.fuse import protocol
from loopdev.kernel import mounts
from loopdev.kernel.fds import OwnedFd, open_device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

DEVICE = "/dev/fuse"
_CONNECTIONS = "/sys/fs/fuse/connections"
FUSE_DEV_IOC_CLONE = 0x8004E500  # _IOR(229, 0, __u32)


class Session:
    """A FUSE mount with one regular file as its root, and the descriptors that serve it.

    The descriptor that was mounted, and every clone of it, stay open here as long as the mount is
    to live: when the last copy of a clone is closed, the kernel fails at once the requests that
    were read from it (fuse_dev_release() in linux/fs/fuse/dev.c), so a server that dies may have
    no clone of its own.

    Attributes:
        init: What was agreed with the kernel.
        path: The file.
    """

    def __init__(self, device: OwnedFd, path: str, init: protocol.Init) -> None:
        self._device = device
        self._clones: dict[int, OwnedFd] = {}
        self.path, self.init = path, init

    @classmethod
    def mount(cls, path: str, source: str, mode: int = 0o400) -> Self:
        """Mount on the regular file *path*, and agree with the kernel how to speak.

        Args:
            path: A regular file, hidden by the mount as long as that lasts.
            source: What is mounted, for /proc/mounts.
            mode: The file's permission bits.

        Raises:
            NoSuchDeviceError: There is no /dev/fuse (ENOENT), or nothing behind it (ENODEV).
            NotPermittedError: Root's rights are missing.
            ImageFormatError: The kernel is older than Linux 5.4.
        """
        device = open_device(DEVICE, os.O_RDWR)
        try:
            mounts.mount(
                source,
                path,
                "fuse.loopdev",
                mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC | mounts.MS_RDONLY,
                f"fd={device.fileno()},rootmode={0o100000 | mode:o},user_id=0,group_id=0,"
                "default_permissions",
            )
            try:
                init = _agree(device.fileno())
            except BaseException:
                mounts.umount(path, mounts.MNT_DETACH)
                raise
        except BaseException:
            device.close()
            raise
        return cls(device, path, init)

    def clone(self) -> int:
        """Return another descriptor to serve by, which stays owned here.

        Requests that are read from one are answered to the same one.
        """
        clone = open_device(DEVICE, os.O_RDWR)
        try:
            number = struct.pack("=I", self._device.fileno())
            fcntl.ioctl(clone.fileno(), FUSE_DEV_IOC_CLONE, number)
        except OSError as exc:
            clone.close()
            raise kernel_error(exc, DEVICE, "FUSE_DEV_IOC_CLONE") from exc
        self._clones[clone.fileno()] = clone
        return clone.fileno()

    @property
    def clones(self) -> list[int]:
        """The descriptors to serve by, in the order of their making."""
        return list(self._clones)

    def replace(self, fd: int) -> int:
        """Return another clone instead of *fd*: what was read from that one fails at once (EIO).

        This is for a kernel that cannot resend. Nobody else may have a copy of *fd*.
        """
        self._clones.pop(fd).close()
        return self.clone()

    def keep_only(self, fd: int) -> None:
        """Close all descriptors but one; for a server, which has copies of them all."""
        for number in self.clones:
            if number != fd:
                self._clones.pop(number).close()
        self._device.close()

    def fileno(self) -> int:
        """Return the descriptor that was mounted: readable while a request waits for a server."""
        return self._device.fileno()

    def filenos(self) -> tuple[int, ...]:
        """Return all descriptors; they stay owned here."""
        return self._device.fileno(), *self._clones

    def resend(self) -> bool:
        """Have all unanswered requests queued again, those of living servers too.

        Returns:
            Whether the kernel did: it is older than Linux 6.9 otherwise.
        """
        if not self.init.resend:
            return False
        try:
            os.write(self._device.fileno(), protocol.resend())
        except OSError as exc:
            # ENOTCONN, ENODEV: nothing is mounted any more, so nobody waits.
            return exc.errno in (errno.ENOTCONN, errno.ENODEV, errno.ENOENT)
        return True

    def close(self) -> None:
        """Close all descriptors; where no server has one, whoever waits gets an error."""
        for clone in self._clones.values():
            clone.close()
        self._device.close()


def _agree(fd: int) -> protocol.Init:
    """Answer INIT, which the kernel has queued before mount(2) returned."""
    request = protocol.parse(os.read(fd, protocol.MIN_READ_BUFFER + protocol.PAGE))
    init = protocol.negotiate(request)
    os.write(fd, protocol.init_reply(request.unique, init))
    return init


def abort(connection: int) -> bool:
    """Fail all that anybody waits for from a FUSE connection, now and later.

    Args:
        connection: Its number: the minor number of the mount's st_dev.

    Returns:
        Whether that was possible: fusectl must be mounted.
    """
    try:
        fd = os.open(f"{_CONNECTIONS}/{connection}/abort", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)
    return True
