# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Requests, flags and structs of <linux/loop.h>, <linux/fs.h> and <linux/blkpg.h>.

Names are the headers'. Layouts are :class:`struct.Struct` in native order; the integration tests
compile a C program against the headers and compare every size, offset and number. They are not
``ctypes.Structure``, because importing ctypes costs a fifth of the interpreter's start-up, and
every command would pay for it.
"""

from __future__ import annotations

import struct

LOOP_MAJOR = 7

LO_NAME_SIZE = 64
LO_KEY_SIZE = 32

# lo_flags
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_PARTSCAN = 8
LO_FLAGS_DIRECT_IO = 16  # Linux 4.4
LOOP_SET_STATUS_SETTABLE_FLAGS = LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN
LOOP_SET_STATUS_CLEARABLE_FLAGS = LO_FLAGS_AUTOCLEAR
LOOP_CONFIGURE_SETTABLE_FLAGS = (
    LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_PARTSCAN | LO_FLAGS_DIRECT_IO
)

# Requests to /dev/loopN
LOOP_SET_FD = 0x4C00
LOOP_CLR_FD = 0x4C01
LOOP_SET_STATUS = 0x4C02
LOOP_GET_STATUS = 0x4C03
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
LOOP_CHANGE_FD = 0x4C06
LOOP_SET_CAPACITY = 0x4C07
LOOP_SET_DIRECT_IO = 0x4C08  # Linux 4.4
LOOP_SET_BLOCK_SIZE = 0x4C09  # Linux 4.14
LOOP_CONFIGURE = 0x4C0A  # Linux 5.8

# Requests to /dev/loop-control
LOOP_CTL_ADD = 0x4C80
LOOP_CTL_REMOVE = 0x4C81
LOOP_CTL_GET_FREE = 0x4C82

# Requests to any block device
BLKROSET = 0x125D
BLKROGET = 0x125E
BLKRRPART = 0x125F
BLKFLSBUF = 0x1261
BLKSSZGET = 0x1268
BLKPG = 0x1269
BLKGETSIZE64 = 0x80081272
BLKGETDISKSEQ = 0x80081280  # Linux 5.15

BLKPG_ADD_PARTITION = 1
BLKPG_DEL_PARTITION = 2
BLKPG_RESIZE_PARTITION = 3

# struct loop_info64: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit, lo_number,
# lo_encrypt_type, lo_encrypt_key_size, lo_flags, lo_file_name, lo_crypt_name, lo_encrypt_key, and
# lo_init, which is two
loop_info64 = struct.Struct("@5Q4I64s64s32s2Q")

# struct loop_config, with its info spread out: fd, block_size, info, then __reserved
loop_config = struct.Struct("@II5Q4I64s64s32s2Q8Q")

# struct blkpg_ioctl_arg: op, flags, datalen, data
blkpg_ioctl_arg = struct.Struct("@3iP")

# struct blkpg_partition: start, length (bytes), pno, devname, volname
blkpg_partition = struct.Struct("@qqi64s64s0q")


def request_name(request: int) -> str:
    """Return the header's name of an ioctl request, for messages."""
    for name, value in globals().items():
        if value == request and name.startswith(("LOOP_", "BLK")):
            return name
    return hex(request)
