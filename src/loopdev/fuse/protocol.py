# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The FUSE protocol as far as one regular file needs it: bytes in, values out, no I/O.

Names and layouts are those of <linux/fuse.h>, protocol 7.31 (Linux 5.4) and later. All integers
are in the machine's own order.
"""

from __future__ import annotations

import errno
import struct

from loopdev._value import Value
from loopdev.errors import ImageFormatError

# enum fuse_opcode
LOOKUP = 1
FORGET = 2
GETATTR = 3
OPEN = 14
READ = 15
WRITE = 16
STATFS = 17
RELEASE = 18
FSYNC = 20
FLUSH = 25
INIT = 26
INTERRUPT = 36
DESTROY = 38
BATCH_FORGET = 42
FALLOCATE = 43
STATX = 52

# Nobody waits for an answer to these.
UNANSWERED = frozenset((FORGET, BATCH_FORGET, INTERRUPT))

# INIT's flags
ASYNC_READ = 1 << 0
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
ABORT_ERROR = 1 << 21
MAX_PAGES = 1 << 22
INIT_EXT = 1 << 30
# ... and those that are 32 bits further up, in flags2
HAS_RESEND = 1 << 39  # Linux 6.9

# The oldest protocol that has all we rely on: Linux 5.4.
MAJOR, MINOR = 7, 31
PAGE = 4096
# 1 MiB requests, the most that a kernel takes without being told otherwise.
LARGEST_PAGES = 256
# Requests that the kernel sends ahead; its default of 12 is soon reached by asynchronous reads.
MAX_BACKGROUND = 256
ROOT_ID = 1
# The kernel asks for the attributes again after this many seconds. They never change.
VALID = 86400 * 365

NOTIFY_RESEND = 7
# The mark of a request that was queued again, in its unique number.
RESENT = 1 << 63

IN_HEADER = struct.Struct("=IIQQIIIHH")  # struct fuse_in_header
OUT_HEADER = struct.Struct("=IiQ")  # struct fuse_out_header
INIT_IN = struct.Struct("=IIII")  # struct fuse_init_in, up to Linux 5.17
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")  # struct fuse_init_out, 64 bytes
ATTR = struct.Struct("=QQQQQQIIIIIIIIII")  # struct fuse_attr
ATTR_OUT = struct.Struct("=QII")  # struct fuse_attr_out, without its attr
OPEN_OUT = struct.Struct("=QII")  # struct fuse_open_out
KSTATFS = struct.Struct("=QQQQQIIII24x")  # struct fuse_kstatfs
STATX_OUT = struct.Struct("=QII16x")  # struct fuse_statx_out, without its stat
STATX_STAT = struct.Struct("=IIQIIIHHQQQQ64x16x112x")  # struct fuse_statx, its times zero

# fuse_in_header and fuse_read_in, as far as a READ needs them: length, opcode, unique number,
# offset and size.
READ_REQUEST = struct.Struct("=IIQ32xQI")

# The kernel demands room for its largest request, and at least this much (FUSE_MIN_READ_BUFFER).
MIN_READ_BUFFER = 8192

_STATX_BASIC = 0x7FF  # STATX_BASIC_STATS
_S_IFREG = 0o100000


class Request(Value):
    """A request's header, and the body that follows it."""

    opcode: int
    unique: int
    body: bytes


class Init(Value):
    """What the kernel offers, and what we make of it.

    Attributes:
        minor: The protocol that both speak.
        flags: What is used, of ASYNC_READ and its like.
        max_readahead: In bytes.
    """

    minor: int
    flags: int
    max_readahead: int

    @property
    def resend(self) -> bool:
        """Whether requests that a dead server took can be had again."""
        return bool(self.flags & HAS_RESEND)


def parse(message: bytes | bytearray | memoryview) -> Request:
    """Return the request in what was read from /dev/fuse.

    Raises:
        ImageFormatError: It is none.
    """
    if len(message) < IN_HEADER.size:
        raise ImageFormatError(None, 0, f"a FUSE request of {len(message)} bytes")
    length, opcode, unique = IN_HEADER.unpack_from(message)[:3]
    if length != len(message):
        raise ImageFormatError(None, 0, f"a FUSE request of {len(message)} bytes says {length}")
    return Request(opcode=opcode, unique=unique, body=bytes(message[IN_HEADER.size :]))


def negotiate(request: Request) -> Init:
    """Return what we want of what the kernel offers.

    Raises:
        ImageFormatError: It is no INIT, or of a kernel before Linux 5.4.
    """
    if request.opcode != INIT or len(request.body) < INIT_IN.size:
        raise ImageFormatError(None, 0, f"FUSE began with request {request.opcode}, not INIT")
    major, minor, max_readahead, offered = INIT_IN.unpack_from(request.body)
    if major != MAJOR or minor < MINOR:
        raise ImageFormatError(None, 0, f"the kernel speaks FUSE {major}.{minor}, not 7.31")
    if offered & INIT_EXT and len(request.body) >= INIT_IN.size + 4:
        offered |= struct.unpack_from("=I", request.body, INIT_IN.size)[0] << 32
    wanted = ASYNC_READ | ASYNC_DIO | ABORT_ERROR | MAX_PAGES | INIT_EXT | HAS_RESEND
    return Init(minor=minor, flags=offered & wanted, max_readahead=max_readahead)


def init_reply(unique: int, init: Init, max_write: int = PAGE) -> bytes:
    """Return the answer to INIT."""
    body = INIT_OUT.pack(
        MAJOR,
        init.minor,
        init.max_readahead,
        init.flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        max_write,
        1,
        LARGEST_PAGES,
        0,
        init.flags >> 32,
    )
    return reply(unique, body)


def reply(unique: int, body: bytes = b"") -> bytes:
    """Return the answer of a request that succeeded."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def error(unique: int, code: int) -> bytes:
    """Return the answer of a request that failed with errno *code*."""
    return OUT_HEADER.pack(OUT_HEADER.size, -code, unique)


def resend() -> bytes:
    """Return the notification that has the kernel queue all unanswered requests again."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)


class File(Value):
    """The one file, as its attributes tell it.

    Attributes:
        size: In bytes, a multiple of the sector size.
        blksize: What is cheap to read at once, in bytes.
        mode: Permission bits.
        time: Of its last change, in seconds since 1970.
    """

    size: int
    blksize: int
    mode: int
    time: int

    def answer(self, request: Request) -> bytes | None:
        """Return the answer of a request other than READ; None where none is awaited."""
        if request.opcode in UNANSWERED:
            return None
        make = _ANSWERS.get(request.opcode)
        if make is not None:
            return reply(request.unique, make(self))
        return error(request.unique, _ERRORS.get(request.opcode, errno.ENOSYS))

    def _attr(self) -> bytes:
        attr = ATTR.pack(
            *(ROOT_ID, self.size, self._blocks, self.time, self.time, self.time, 0, 0, 0),
            *(_S_IFREG | self.mode, 1, 0, 0, 0, min(self.blksize, 1 << 31), 0),
        )
        return ATTR_OUT.pack(VALID, 0, 0) + attr

    def _statx(self) -> bytes:
        stat = STATX_STAT.pack(
            *(_STATX_BASIC, min(self.blksize, 1 << 31), 0, 1, 0, 0, _S_IFREG | self.mode, 0),
            *(ROOT_ID, self.size, self._blocks, 0),
        )
        return STATX_OUT.pack(VALID, 0, 0) + stat

    def _statfs(self) -> bytes:
        return KSTATFS.pack(-(-self.size // PAGE), 0, 0, 1, 0, PAGE, 255, PAGE, 0)

    def _open(self) -> bytes:
        # The content never changes, so what the kernel has cached stays right.
        return OPEN_OUT.pack(0, _FOPEN_KEEP_CACHE | _FOPEN_NOFLUSH, 0)

    def _nothing(self) -> bytes:
        return b""

    @property
    def _blocks(self) -> int:
        return -(-self.size // 512)


_FOPEN_KEEP_CACHE = 1 << 1
_FOPEN_NOFLUSH = 1 << 5

_ANSWERS = {
    GETATTR: File._attr,
    STATX: File._statx,
    STATFS: File._statfs,
    OPEN: File._open,
    FLUSH: File._nothing,
    RELEASE: File._nothing,
    DESTROY: File._nothing,
}
_ERRORS = {
    LOOKUP: errno.ENOTDIR,
    WRITE: errno.EROFS,
    FALLOCATE: errno.EROFS,
    FSYNC: errno.EROFS,
}
