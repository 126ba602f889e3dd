# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""One loop device, each request to it a method."""

from __future__ import annotations

import fcntl
import os
import stat
import time

from loopdev._configure import (
    LoopConfig,
    check_extent,
    check_sector_size,
    configure,
    cut_loop_ref,
    patiently,
)
from loopdev.errors import (
    InvalidValueError,
    LoopdevError,
    NoSuchDeviceError,
    NotBoundError,
    WaitTimeoutError,
    kernel_error,
)
from loopdev.kernel import abi, probe, sysfs
from loopdev.kernel.abi import (
    LO_FLAGS_AUTOCLEAR,
    LO_FLAGS_DIRECT_IO,
    LO_FLAGS_PARTSCAN,
    LO_FLAGS_READ_ONLY,
    LOOP_CHANGE_FD,
    LOOP_CLR_FD,
    LOOP_GET_STATUS64,
    LOOP_MAJOR,
    LOOP_SET_BLOCK_SIZE,
    LOOP_SET_CAPACITY,
    LOOP_SET_DIRECT_IO,
    LOOP_SET_FD,
    LOOP_SET_STATUS64,
)
from loopdev.kernel.fds import OwnedFd
from loopdev.kernel.ioctl import ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from loopdev._loopinfo import LoopInfo


# The kernel allows 2^20 devices; loop_add() in drivers/block/loop.c.
MAX_NUMBER = (1 << 20) - 1


class UnexpectedDevice(LoopdevError):  # noqa: N818 - the name that users know
    """A node under /dev is not the loop device that its name says.

    Attributes:
        expected_minor: The minor that was looked for, with major 7.
        rdev: What the node is.
        mode: Its st_mode.
    """

    exit_code = 3

    def __init__(self, expected_minor: int, rdev: int, mode: int) -> None:
        super().__init__(expected_minor, rdev, mode)
        self._call = (expected_minor, rdev, mode)
        self.expected_minor, self.rdev, self.mode = expected_minor, rdev, mode

    def __str__(self) -> str:
        kind = "block device" if stat.S_ISBLK(self.mode) else "no block device but"
        found = f"{kind} {os.major(self.rdev)}:{os.minor(self.rdev)}"
        return f"not a loop device: {found}, expected {LOOP_MAJOR}:{self.expected_minor}"


class Loop:
    """One open loop device.

    Args:
        minor: Its number: 3 for /dev/loop3. (The minor itself, unless the module's max_part is
            set.)
        dir_fd: A descriptor of the directory that holds the node, borrowed for as long as this
            object is open; None: /dev.
        read_only: Open the node for reading; what is bound through it then becomes read-only.

    Attributes:
        devname: "loop3".
        minor: As given.
        on_close: Called once with this object, before the descriptor is closed; calling close()
            in it does nothing.

    Raises:
        UnexpectedDevice: The node is not block device 7:minor.
        NoSuchDeviceError: No node (ENOENT), or no device behind it, or its last user is just
            detaching it (ENXIO).
        NotPermittedError: EACCES or EPERM.
    """

    def __init__(self, minor: int, dir_fd: int | None = None, *, read_only: bool = False) -> None:
        if not 0 <= minor <= MAX_NUMBER:
            raise InvalidValueError("minor", minor, f"must be from 0 to {MAX_NUMBER}")
        self.on_close: Callable[[Loop], None] | None = None
        self.minor = minor
        self.devname = f"loop{minor}"
        self._closing = False
        #: The node's path ("/dev/loop3"), or its name where a directory was given.
        self.path = f"/dev/{self.devname}" if dir_fd is None else self.devname
        self._rdev = os.makedev(LOOP_MAJOR, minor << probe.part_shift())
        # O_NONBLOCK: should the node be a FIFO, it is found out and not waited for.
        self._flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_NONBLOCK
        self._dir_fd = dir_fd
        self._fd = self._open()

    def _open(self) -> OwnedFd:
        try:
            fd = OwnedFd.open(self.path, self._flags, self._dir_fd)
        except OSError as exc:
            raise kernel_error(exc, self.path, "open") from exc
        try:
            found = os.fstat(fd.fileno())
            if not stat.S_ISBLK(found.st_mode) or found.st_rdev != self._rdev:
                raise UnexpectedDevice(os.minor(self._rdev), found.st_rdev, found.st_mode)
        except BaseException:
            fd.close()
            raise
        return fd

    @property
    def fd(self) -> int:
        """The descriptor, which stays this object's; -1 once closed."""
        return -1 if self._fd.closed else self._fd.fileno()

    @property
    def rdev(self) -> int:
        """The device number, as in st_rdev."""
        return self._rdev

    def fileno(self) -> int:
        """Return the descriptor.

        Raises:
            ClosedError: The object is closed.
        """
        return self._fd.fileno()

    def close(self) -> None:
        """Close the device; doing so again is no error. With autoclear set, this detaches it."""
        if self._closing:
            return
        self._closing = True
        try:
            if self.on_close is not None:
                self.on_close(self)
        finally:
            self._fd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _ioctl(self, request: int, arg: int | bytes | bytearray = 0) -> int:
        return ioctl(self._fd.fileno(), request, self.path, arg)

    def flock(self, op: int) -> None:
        """Lock the device; udev leaves one alone that is locked LOCK_EX.

        Args:
            op: fcntl.LOCK_EX, LOCK_SH, LOCK_UN, or one of them with LOCK_NB.

        Raises:
            BlockingIOError: With LOCK_NB, when another description holds a lock.
        """
        fcntl.flock(self._fd.fileno(), op)

    def flush_buf(self) -> None:
        """Write out and drop the device's page cache (BLKFLSBUF; needs CAP_SYS_ADMIN)."""
        self._ioctl(abi.BLKFLSBUF)

    def set_fd(self, fd: int) -> None:
        """Bind the file *fd*, with no offset and no flags (LOOP_SET_FD).

        Raises:
            DeviceBusyError: The device is bound already.
        """
        self._ioctl(LOOP_SET_FD, fd)

    def clear_fd(self) -> None:
        """Let go of the backing file, after what was written has reached it (LOOP_CLR_FD).

        With other users of the device the kernel only sets autoclear, and from Linux 6.11 on the
        file is let go at close() in any case. The device is synced first, because the kernel
        drops dirty pages here; what another process writes between the two and does not sync
        itself is still lost. :meth:`loopdev.LoopDevice.detach` has no such gap.

        Raises:
            NotBoundError: The device is not bound (ENXIO).
            OSError: EIO, ENOSPC: the data could not be written; the device stays bound.
        """
        try:
            os.fsync(self._fd.fileno())
        except OSError:
            self.get_status()  # EIO also says that it was cleared before
            raise
        self._ioctl(LOOP_CLR_FD)

    def clear_fd_wait(self, fd: int, timeout: float, wait: float = 0.1) -> None:
        """Clear until the device is no longer bound to the file of *fd*, and the file is free.

        Where the kernel defers that to the last close, the device is closed and opened again:
        a lock taken by flock() is gone then, the descriptor keeps its number.

        Args:
            fd: A descriptor of the backing file, borrowed.
            timeout: Seconds.
            wait: Seconds between two tries.

        Raises:
            WaitTimeoutError: (a TimeoutError) Somebody else keeps the device open.
        """
        deadline = time.monotonic() + timeout
        while self.is_bound_to(fd):
            try:
                self.clear_fd()
            except NotBoundError:
                break
            if not self.is_bound_to(fd):
                break
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeoutError(self.path, "still bound", timeout)
            time.sleep(min(wait, left))
        try:
            self.get_status()
        except NotBoundError:
            # Cleared, but the file is held until the last close.
            if sysfs.is_bound(self.minor):
                self._reopen()

    def _reopen(self) -> None:
        """Close the device and open it again under the same descriptor number."""
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # The number stays taken all the time, so no other thread can be given it.
            os.dup2(null, self._fd.fileno(), inheritable=False)
        finally:
            os.close(null)
        try:
            with self._open() as fresh:
                os.dup2(fresh.fileno(), self._fd.fileno(), inheritable=False)
        except NoSuchDeviceError:
            # Somebody has removed the device, or is about to: there is nothing left to hold.
            self.close()
        except BaseException:
            self.close()  # not to be left on /dev/null
            raise

    def change_fd(self, fd: int) -> None:
        """Exchange the backing file of a read-only device for one of the same size.

        The kernel announces a media change: a mounted filesystem is shut down by it.

        Raises:
            NotBoundError: ENXIO.
            KernelError: EINVAL: the device is writable, or the sizes differ.
        """
        self._ioctl(LOOP_CHANGE_FD, fd)

    def is_bound_to(self, fd: int) -> bool:
        """Return whether the backing file is the file of this descriptor."""
        return self.is_bound_to_inode(os.fstat(fd))

    def is_bound_to_inode(self, info: os.stat_result) -> bool:
        """Return whether the backing file is the one of this stat_result."""
        try:
            status = self.get_status()
        except NotBoundError:
            return False
        return status.is_bound_to(info)

    def get_status(self) -> LoopInfo:
        """Return what the device is bound to, and how (LOOP_GET_STATUS64).

        The kernel asks the backing file's filesystem for its attributes: this hangs where that
        hangs (a dead network or FUSE server).

        Raises:
            NotBoundError: ENXIO.
        """
        from loopdev._loopinfo import LoopInfo

        buffer = bytearray(abi.loop_info64.size)
        self._ioctl(LOOP_GET_STATUS64, buffer)
        return LoopInfo.unpack(buffer)

    def set_status(
        self,
        offset: int | None = None,
        sizelimit: int | None = None,
        autoclear: bool | None = None,
        partscan: bool | None = None,
        read_only: bool | None = None,
    ) -> None:
        """Change a bound device (LOOP_SET_STATUS64); None leaves a value as it is, 0 is a value.

        Costs some 15 ms: the kernel freezes the device's queue.

        Raises:
            InvalidValueError: A value out of range; or *read_only* or clearing *partscan*, which
                the kernel would ignore.
            NotBoundError: ENXIO.
            DeviceBusyError: From Linux 6.19 on, when the device is mounted.
        """
        info = self.get_status()
        if read_only is not None and read_only != info.read_only:
            raise InvalidValueError("read_only", read_only, "cannot be changed on a bound device")
        if partscan is False and info.partscan:
            raise InvalidValueError("partscan", partscan, "cannot be cleared on a bound device")
        changed = info.as_dict()
        if offset is not None:
            check_extent("offset", offset)
            changed["lo_offset"] = offset
        if sizelimit is not None:
            check_extent("sizelimit", sizelimit)
            changed["lo_sizelimit"] = sizelimit
        flags = info.lo_flags & ~LO_FLAGS_AUTOCLEAR if autoclear is False else info.lo_flags
        flags |= LO_FLAGS_AUTOCLEAR if autoclear else 0
        changed["lo_flags"] = flags | (LO_FLAGS_PARTSCAN if partscan else 0)
        from loopdev._loopinfo import LoopInfo

        request = LoopInfo(**changed).pack()  # type: ignore[arg-type]
        patiently(self._fd.fileno(), LOOP_SET_STATUS64, self.path, request)

    def configure(
        self,
        fd: int,
        offset: int | None = 0,
        sizelimit: int | None = 0,
        blocksize: int = 0,
        autoclear: bool = False,
        partscan: bool = False,
        read_only: bool = False,
        direct_io: bool = False,
        loop_ref: str | bytes | None = None,
    ) -> None:
        """Bind the file *fd* with everything in one request (LOOP_CONFIGURE).

        A kernel that a probe shows to lack it (before 5.8) gets the older requests in its place.

        Args:
            fd: The backing file, borrowed.
            offset: First byte of it to show, a multiple of 512.
            sizelimit: Bytes from there, a multiple of 512; 0: to the end of the file.
            blocksize: Logical block size in bytes, a power of two from 512 to the page size (to
                64 KiB where the kernel takes it); 0: the kernel's choice.
            autoclear: Detach when the last user closes the device.
            partscan: Have the kernel scan for partitions.
            read_only: Take no writes. Set by the kernel, too, where *fd* is not writable.
            direct_io: Read and write past the page cache of the file, where it can: read
                get_status().direct_io back.
            loop_ref: Free text; None: the path of the file. Cut to 63 bytes.

        Raises:
            InvalidValueError: Before anything is asked of the kernel.
            DeviceBusyError: The device is bound, or claimed exclusively (EBUSY).
            KernelError: EBADF: *fd* is not open, or is this device; EINVAL: neither a regular
                file nor a bound block device.
        """
        flags = LO_FLAGS_AUTOCLEAR if autoclear else 0
        flags |= LO_FLAGS_PARTSCAN if partscan else 0
        flags |= LO_FLAGS_READ_ONLY if read_only else 0
        flags |= LO_FLAGS_DIRECT_IO if direct_io else 0
        if loop_ref is None:
            loop_ref = _path_of(fd)
        config = LoopConfig(offset or 0, sizelimit or 0, blocksize, flags, cut_loop_ref(loop_ref))
        configure(self._fd.fileno(), self.path, fd, config)

    def set_capacity(self) -> None:
        """Take over the backing file's size after it grew or shrank (LOOP_SET_CAPACITY)."""
        self._ioctl(LOOP_SET_CAPACITY)

    def set_direct_io(self, dio: bool = True) -> None:
        """Switch direct I/O (LOOP_SET_DIRECT_IO).

        Raises:
            KernelError: EINVAL: the backing file, the offset or the block size does not allow it.
        """
        patiently(self._fd.fileno(), LOOP_SET_DIRECT_IO, self.path, int(dio))

    def set_block_size(self, n: int) -> None:
        """Change the logical block size to *n* bytes (LOOP_SET_BLOCK_SIZE).

        Partitions are not scanned for again.

        Raises:
            InvalidValueError: Not a block size that the kernel takes.
            DeviceBusyError: From Linux 6.17 on, when the device is mounted or claimed.
        """
        check_sector_size(n)
        patiently(self._fd.fileno(), LOOP_SET_BLOCK_SIZE, self.path, n)

    def mknod(self, dir_fd: int, mode: int = 0o600) -> None:
        """Make a node of this device, by its name, in another directory.

        Args:
            dir_fd: The directory, borrowed.
            mode: Permissions, less the umask.

        Raises:
            KernelError: EEXIST; NotPermittedError: EPERM without CAP_MKNOD.
        """
        try:
            os.mknod(self.devname, stat.S_IFBLK | mode, self._rdev, dir_fd=dir_fd)
        except OSError as exc:
            raise kernel_error(exc, self.devname, "mknod") from exc


def _path_of(fd: int) -> str:
    """Return the path of an open file; a descriptor that is not open fails later, in its place."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
