# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What this kernel's loop driver can do: asked once, never guessed from a version."""

from __future__ import annotations

import errno
import os
import time

from loopdev._backoff import backoff
from loopdev.errors import DeviceBusyError, KernelError, NoSuchDeviceError, kernel_error
from loopdev.kernel import abi, sysfs
from loopdev.kernel.ioctl import ioctl

_answers: dict[str, int] = {}

# CONFIG_BLK_DEV_LOOP_MIN_COUNT's default, where the module was loaded without max_loop.
_DEFAULT_PRESET = 8
_CONTROL = "/dev/loop-control"
# How long to go on when udev looks at a device that is to be removed, in seconds.
_REMOVE_TIMEOUT = 5.0


def has_loop_configure(fd: int, path: str) -> bool:
    """Return whether the kernel knows LOOP_CONFIGURE.

    EINVAL alone does not tell: it also means a bad argument. Asked with the descriptor -1, a
    kernel that knows the request says EBADF before it looks at anything else.

    Args:
        fd: A loop device, bound or not; it is not changed.
        path: Its name, for errors.
    """
    if "configure" not in _answers:
        refused = abi.loop_config.pack(0xFFFFFFFF, *bytes(10), b"", b"", b"", *bytes(10))
        try:
            ioctl(fd, abi.LOOP_CONFIGURE, path, refused)
        except KernelError as exc:
            if exc.errno not in (errno.EBADF, errno.EINVAL):
                raise
            _answers["configure"] = exc.errno == errno.EBADF
    return bool(_answers["configure"])


def max_block_size() -> int:
    """Return the largest logical block size that a loop device takes, at least the page size.

    Asked on a device made for the purpose, since a refusal leaves the device's uevents suppressed
    until it is configured again (Linux 6.18). Costs some 50 ms, once.

    Raises:
        KernelError: No device could be added.
    """
    if "block" not in _answers:
        control = _open(_CONTROL)
        try:
            _answers["block"] = _ask_for_block_size(control)
        finally:
            os.close(control)
    return _answers["block"]


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise kernel_error(exc, path, "open") from exc


def _ask_for_block_size(control: int) -> int:
    while True:
        number = ioctl(control, abi.LOOP_CTL_ADD, _CONTROL, -1)
        try:
            return _largest_block(f"/dev/loop{number}")
        except DeviceBusyError:
            pass  # somebody needed a device, and was given this one
        finally:
            _remove(control, number)


def _remove(control: int, number: int) -> None:
    """Remove the device that was asked, once udev has looked at it; or leave it to a new user."""
    for _ in backoff(time.monotonic() + _REMOVE_TIMEOUT):
        try:
            ioctl(control, abi.LOOP_CTL_REMOVE, _CONTROL, number)
        except DeviceBusyError:
            if sysfs.is_bound(number):
                return
        except NoSuchDeviceError:
            return
        else:
            return


def _largest_block(path: str) -> int:
    page = os.sysconf("SC_PAGESIZE")
    backing = os.memfd_create("loopdev-probe", os.MFD_CLOEXEC)
    try:
        os.ftruncate(backing, 1 << 20)
        for size in (65536, 32768, 16384, 8192, page):
            # Each try on its own descriptor: with autoclear, closing it undoes what was accepted.
            fd = _open(path)
            try:
                config = (backing, size, *bytes(8), abi.LO_FLAGS_AUTOCLEAR, b"", b"", b"")
                ioctl(fd, abi.LOOP_CONFIGURE, path, abi.loop_config.pack(*config, *bytes(10)))
            except KernelError as exc:
                if exc.errno != errno.EINVAL:
                    raise
            else:
                return size
            finally:
                os.close(fd)
    finally:
        os.close(backing)
    return page


def part_shift() -> int:
    """Return by how many bits a loop device's minor is shifted: 0 unless max_part is set."""
    if "shift" not in _answers:
        _answers["shift"] = (sysfs.module_parameter("max_part") or 0).bit_length()
    return _answers["shift"]


def preset() -> int:
    """Return how many loop devices the module made when it was loaded.

    Devices from this number on exist on demand: LOOP_CTL_GET_FREE makes one when none is free.
    """
    if "preset" not in _answers:
        _answers["preset"] = sysfs.module_parameter("max_loop") or _DEFAULT_PRESET
    return _answers["preset"]
