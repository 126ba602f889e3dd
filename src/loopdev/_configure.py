# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Binding a backing file to an open loop device: in one request, or in steps where it must be.

All arguments are checked first, because the kernel's EINVAL does not say which one it means, and
a block size that it refuses leaves the device's uevents suppressed.
"""

from __future__ import annotations

import errno
import os
import time

from loopdev._backoff import backoff
from loopdev.errors import InvalidValueError, KernelError, WaitTimeoutError
from loopdev.kernel import abi, probe
from loopdev.kernel.ioctl import ioctl

# Sizes are loff_t in the kernel: more is EOVERFLOW.
_MAX_OFFSET = (1 << 63) - 1
_SECTOR = 512
_STEP_TIMEOUT = 10.0
_NO_FD = 0xFFFFFFFF


class LoopConfig:
    """What LOOP_CONFIGURE sets.

    Args:
        offset: First byte of the backing file that the device shows, a multiple of 512.
        sizelimit: Bytes from there, a multiple of 512; 0: to the end of the file.
        block_size: Logical block size in bytes; 0: the kernel's choice.
        flags: LO_FLAGS_*.
        loop_ref: Free text, at most 63 bytes of it are kept.

    Raises:
        InvalidValueError: What the kernel would refuse, or would take and then do otherwise.
    """

    __slots__ = ("block_size", "flags", "loop_ref", "offset", "sizelimit")

    def __init__(
        self, offset: int, sizelimit: int, block_size: int, flags: int, loop_ref: bytes = b""
    ) -> None:
        if offset or sizelimit:
            check_extent("offset", offset)
            check_extent("sizelimit", sizelimit)
        if block_size:
            check_sector_size(block_size)
        if flags & ~abi.LOOP_CONFIGURE_SETTABLE_FLAGS:
            raise InvalidValueError("flags", flags, "holds a flag that cannot be set")
        self.offset, self.sizelimit, self.block_size = offset, sizelimit, block_size
        self.flags, self.loop_ref = flags, loop_ref


def check_extent(name: str, value: int) -> None:
    """Refuse an offset or sizelimit that is out of range or no multiple of 512."""
    if not 0 <= value <= _MAX_OFFSET:
        raise InvalidValueError(name, value, "must be 0 or more, and below 2^63")
    if value % _SECTOR:
        raise InvalidValueError(name, value, "must be a multiple of 512")


def check_sector_size(value: int) -> None:
    """Refuse a logical block size that this kernel does not take."""
    page = os.sysconf("SC_PAGESIZE")
    if not 512 <= value <= 65536 or value & (value - 1):
        raise InvalidValueError("sector_size", value, f"must be a power of two from 512 to {page}")
    if value > page and value > probe.max_block_size():
        raise InvalidValueError("sector_size", value, f"this kernel takes at most {page}")


def cut_loop_ref(text: str | bytes) -> bytes:
    """Return what fits of *text* into lo_file_name: 63 bytes, no character cut in two."""
    try:
        raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    except UnicodeEncodeError as exc:
        raise InvalidValueError("loop_ref", ascii(text), "is not text") from exc
    if len(raw) < abi.LO_NAME_SIZE:
        return raw
    cut = raw[: abi.LO_NAME_SIZE - 1]
    if raw.decode("utf-8", "replace").encode() == raw:
        cut = cut.decode("utf-8", "ignore").encode()
    return cut


def configure(fd: int, path: str, backing: int, config: LoopConfig) -> None:
    """Bind *backing* to the unbound device *fd*.

    Args:
        fd: The loop device, borrowed.
        path: Its name, for errors.
        backing: The backing file, borrowed: the kernel takes a reference of its own.
        config: The rest.

    Raises:
        DeviceBusyError: The device is bound, or claimed exclusively by somebody (EBUSY).
        KernelError: EBADF: *backing* is not open, or is this device; EINVAL: it is neither a
            regular file nor a bound block device.
    """
    request = abi.loop_config.pack(
        # No descriptor is as large as what would not fit; the kernel then says EBADF.
        *(
            backing if 0 <= backing < 1 << 31 else _NO_FD,
            config.block_size,
            0,
            0,
            0,
            config.offset,
            config.sizelimit,
            0,
            0,
            0,
        ),
        *(config.flags, config.loop_ref, b"", b"", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    )
    try:
        ioctl(fd, abi.LOOP_CONFIGURE, path, request)
    except KernelError as exc:
        if exc.errno != errno.EINVAL or probe.has_loop_configure(fd, path):
            raise
        _configure_in_steps(fd, path, backing, config)


def _configure_in_steps(fd: int, path: str, backing: int, config: LoopConfig) -> None:
    """Do what LOOP_CONFIGURE does on a kernel before 5.8, and undo it if a step fails."""
    flags = config.flags
    if flags & abi.LO_FLAGS_READ_ONLY:
        # LOOP_SET_FD takes no flags: the device is read-only when the file's descriptor is.
        backing = os.open(f"/proc/self/fd/{backing}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        ioctl(fd, abi.LOOP_SET_FD, path, backing)
    finally:
        if flags & abi.LO_FLAGS_READ_ONLY:
            os.close(backing)
    try:
        if config.block_size:
            # Before PARTSCAN is set, or the table is searched for at the wrong place.
            patiently(fd, abi.LOOP_SET_BLOCK_SIZE, path, config.block_size)
        settable = flags & abi.LOOP_SET_STATUS_SETTABLE_FLAGS
        info = abi.loop_info64.pack(
            *(0, 0, 0, config.offset, config.sizelimit, 0, 0, 0, settable),
            *(config.loop_ref, b"", b"", 0, 0),
        )
        patiently(fd, abi.LOOP_SET_STATUS64, path, info)
        if flags & abi.LO_FLAGS_DIRECT_IO:
            _try_direct_io(fd, path)
    except BaseException:
        ioctl(fd, abi.LOOP_CLR_FD, path)
        raise


def _try_direct_io(fd: int, path: str) -> None:
    try:
        patiently(fd, abi.LOOP_SET_DIRECT_IO, path, 1)
    except KernelError as exc:
        # EINVAL: the file cannot. LOOP_CONFIGURE leaves the flag off then and says nothing; the
        # caller reads it back in both cases.
        if exc.errno != errno.EINVAL:
            raise


def patiently(fd: int, request: int, path: str, arg: int | bytes) -> None:
    """Issue a request that a kernel from 5.0 to 5.18 refuses with EAGAIN while pages are cached.

    Raises:
        WaitTimeoutError: It was refused for 10 seconds.
        KernelError: For any other errno, at once.
    """
    last: KernelError | None = None
    for _ in backoff(time.monotonic() + _STEP_TIMEOUT):
        try:
            ioctl(fd, request, path, arg)
        except KernelError as exc:
            if exc.errno != errno.EAGAIN:
                raise
            last = exc
        else:
            return
    what = f"{abi.request_name(request)} was still refused"
    raise WaitTimeoutError(path, what, _STEP_TIMEOUT) from last
