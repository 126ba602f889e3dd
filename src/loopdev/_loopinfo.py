# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of a bound loop device."""

from __future__ import annotations

import os

from loopdev._value import Value
from loopdev.kernel import abi
from loopdev.kernel.abi import (
    LO_FLAGS_AUTOCLEAR,
    LO_FLAGS_DIRECT_IO,
    LO_FLAGS_PARTSCAN,
    LO_FLAGS_READ_ONLY,
)


class LoopInfo(Value):
    """What LOOP_GET_STATUS64 says of a bound device; the fields of struct loop_info64.

    ``lo_flags`` are the flags in effect: direct I/O only where the backing file takes it.
    """

    lo_device: int
    lo_inode: int
    lo_rdevice: int
    lo_offset: int
    lo_sizelimit: int
    lo_number: int
    lo_encrypt_type: int
    lo_encrypt_key_size: int
    lo_flags: int
    lo_file_name: bytes
    lo_crypt_name: bytes
    lo_encrypt_key: bytes
    lo_init: tuple[int, int]

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> LoopInfo:
        """Make one from the bytes of struct loop_info64."""
        *fields, first, second = abi.loop_info64.unpack(data)
        return cls(**dict(zip(cls.__annotations__, (*fields, (first, second)), strict=True)))

    def pack(self) -> bytes:
        """Return the bytes of struct loop_info64."""
        *fields, _ = self.as_dict().values()
        return abi.loop_info64.pack(*fields, *self.lo_init)

    @property
    def autoclear(self) -> bool:
        """Whether the kernel detaches the device when its last user closes it."""
        return bool(self.lo_flags & LO_FLAGS_AUTOCLEAR)

    @property
    def read_only(self) -> bool:
        """Whether the device takes no writes."""
        return bool(self.lo_flags & LO_FLAGS_READ_ONLY)

    @property
    def partscan(self) -> bool:
        """Whether the kernel scans for partitions, and drops them at detach."""
        return bool(self.lo_flags & LO_FLAGS_PARTSCAN)

    @property
    def direct_io(self) -> bool:
        """Whether the backing file is read and written past its page cache."""
        return bool(self.lo_flags & LO_FLAGS_DIRECT_IO)

    @property
    def loop_ref(self) -> str:
        """The free text in lo_file_name, cut to 63 bytes by the kernel."""
        return os.fsdecode(self.lo_file_name.split(b"\0")[0])

    def is_bound_to(self, info: os.stat_result) -> bool:
        """Return whether the backing file is the one of this stat_result."""
        return (self.lo_device, self.lo_inode) == (info.st_dev, info.st_ino)
