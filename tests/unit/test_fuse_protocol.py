# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The FUSE protocol: layouts against <linux/fuse.h>, every answer, every kind of kernel."""

from __future__ import annotations

import errno
import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopdev.errors import ImageFormatError
from loopdev.fuse import protocol
from loopdev.fuse.protocol import File, Init, Request

# Our struct, what it is in C, and the C fields in the order in which we pack them.
LAYOUTS = {
    "IN_HEADER": ("fuse_in_header", ("len", "opcode", "unique", "nodeid", "uid", "gid", "pid")),
    "OUT_HEADER": ("fuse_out_header", ("len", "error", "unique")),
    "INIT_OUT": (
        "fuse_init_out",
        (
            *("major", "minor", "max_readahead", "flags", "max_background"),
            *("congestion_threshold", "max_write", "time_gran", "max_pages", "map_alignment"),
            "flags2",
        ),
    ),
    "ATTR": (
        "fuse_attr",
        (
            *("ino", "size", "blocks", "atime", "mtime", "ctime", "atimensec", "mtimensec"),
            *("ctimensec", "mode", "nlink", "uid", "gid", "rdev", "blksize"),
        ),
    ),
    "OPEN_OUT": ("fuse_open_out", ("fh", "open_flags")),
    "KSTATFS": (
        "fuse_kstatfs",
        ("blocks", "bfree", "bavail", "files", "ffree", "bsize", "namelen", "frsize"),
    ),
}
OPCODES = (
    *("LOOKUP", "FORGET", "GETATTR", "OPEN", "READ", "WRITE", "STATFS", "RELEASE", "FSYNC"),
    *("FLUSH", "INIT", "INTERRUPT", "DESTROY", "BATCH_FORGET", "FALLOCATE"),
)
FLAGS = (
    *("ASYNC_READ", "ASYNC_DIO", "PARALLEL_DIROPS", "ABORT_ERROR", "MAX_PAGES", "INIT_EXT"),
    "HAS_RESEND",
)
# What headers that are older than our protocol lack, and what it is there.
NEWER = {"INIT_EXT": 1 << 30, "HAS_RESEND": 1 << 39}


def program() -> str:
    lines = [
        f'printf("FUSE_{name} %llu\\n", (unsigned long long) FUSE_{name});' for name in OPCODES
    ]
    for name in FLAGS:
        line = f'printf("{name} %llu\\n", (unsigned long long) FUSE_{name});'
        lines += ["#ifdef FUSE_" + name, line, "#endif"]
    lines.append('printf("KERNEL_MINOR %d\\n", FUSE_KERNEL_MINOR_VERSION);')
    lines.append('printf("MIN_READ_BUFFER %d\\n", FUSE_MIN_READ_BUFFER);')
    lines.append('printf("FOPEN_KEEP_CACHE %d\\n", FOPEN_KEEP_CACHE);')
    for kind in (*(kind for kind, _ in LAYOUTS.values()), "fuse_attr_out", "fuse_read_in"):
        lines.append(f'printf("sizeof:{kind} %zu\\n", sizeof(struct {kind}));')
    for kind, fields in LAYOUTS.values():
        for field in fields:
            if field == "flags2":
                lines.append("#ifdef FUSE_INIT_EXT")
            place = f"offsetof(struct {kind}, {field})"
            lines.append(f'printf("{kind}.{field} %zu\\n", {place});')
            if field == "flags2":
                lines.append("#endif")
    for field in ("offset", "size"):
        place = f"sizeof(struct fuse_in_header) + offsetof(struct fuse_read_in, {field})"
        lines.append(f'printf("read.{field} %zu\\n", {place});')
    headers = ("stdio.h", "stddef.h", "linux/fuse.h")
    includes = [f"#include <{header}>" for header in headers]
    return "\n".join([*includes, "int main(void) {", *lines, "return 0; }", ""])


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """What the headers say, by name."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    place = tmp_path_factory.mktemp("fuse")
    (place / "abi.c").write_text(program())
    subprocess.run(["gcc", "-Wall", "-Werror", "-o", place / "abi", place / "abi.c"], check=True)
    out = subprocess.run([place / "abi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in map(str.split, out.splitlines())}


def field_at(layout: struct.Struct, count: int, index: int) -> int:
    """Return where a field is packed."""
    values = [0] * count
    values[index] = -1 if layout is protocol.OUT_HEADER and index == 1 else 0xFF
    packed = layout.pack(*values)
    return min(i for i, byte in enumerate(packed) if byte)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(headers, name):
    layout = getattr(protocol, name)
    kind, fields = LAYOUTS[name]
    assert layout.size == headers[f"sizeof:{kind}"]
    count = len(layout.unpack(bytes(layout.size)))
    for index, field in enumerate(fields):
        if f"{kind}.{field}" in headers:
            assert field_at(layout, count, index) == headers[f"{kind}.{field}"], field


def test_layouts_that_are_made_of_two(headers):
    size = protocol.ATTR_OUT.size + protocol.ATTR.size
    assert size == headers["sizeof:fuse_attr_out"]
    message = bytearray(protocol.READ_REQUEST.size)
    struct.pack_into("=Q", message, headers["read.offset"], 123456789)
    struct.pack_into("=I", message, headers["read.size"], 4321)
    assert protocol.READ_REQUEST.unpack(message)[3:] == (123456789, 4321)
    assert protocol.STATX_OUT.size + protocol.STATX_STAT.size == 32 + 256  # struct fuse_statx


def test_numbers(headers):
    for name in OPCODES:
        assert getattr(protocol, name) == headers[f"FUSE_{name}"], name
    for name in FLAGS:
        expected = headers.get(name, NEWER.get(name))
        assert getattr(protocol, name) == expected, name
    assert headers["KERNEL_MINOR"] >= protocol.MINOR
    assert headers["MIN_READ_BUFFER"] == protocol.MIN_READ_BUFFER
    assert headers["FOPEN_KEEP_CACHE"] == 2


# What kernels say first.


def message(opcode: int, body: bytes = b"", unique: int = 7) -> bytes:
    size = 40 + len(body)
    return struct.pack("=IIQQIIIHH", size, opcode, unique, 1, 0, 0, 99, 0, 0) + body


def init(minor: int, flags: int, *, major: int = 7, flags2: int | None = None) -> Request:
    body = struct.pack("=IIII", major, minor, 131072, flags)
    if flags2 is not None:
        body += struct.pack("=I44x", flags2)
    return protocol.parse(message(protocol.INIT, body))


LINUX_5_4 = protocol.ASYNC_READ | protocol.ASYNC_DIO | protocol.ABORT_ERROR | protocol.MAX_PAGES


@pytest.mark.parametrize(
    ("request_", "expected", "resend"),
    [
        (init(31, LINUX_5_4), LINUX_5_4, False),
        (init(31, protocol.ASYNC_READ), protocol.ASYNC_READ, False),  # without MAX_PAGES
        (init(31, 0), 0, False),
        # INIT_EXT is said, but the body is that of an older kernel.
        (init(36, protocol.INIT_EXT), protocol.INIT_EXT, False),
        (init(36, protocol.INIT_EXT, flags2=0), protocol.INIT_EXT, False),
        # flags2 counts only with INIT_EXT.
        (init(36, 0, flags2=1 << 7), 0, False),
        (
            init(41, LINUX_5_4 | protocol.INIT_EXT, flags2=1 << 7),
            LINUX_5_4 | protocol.INIT_EXT | protocol.HAS_RESEND,
            True,
        ),
        (init(99, (1 << 32) - 1, flags2=(1 << 32) - 1), None, True),
    ],
)
def test_negotiate(request_, expected, resend):
    """Nothing is used that the kernel does not offer, nor anything that we do not know."""
    found = protocol.negotiate(request_)
    if expected is not None:
        assert found.flags == expected
    ours = LINUX_5_4 | protocol.INIT_EXT | protocol.HAS_RESEND
    assert found.flags & ~ours == 0
    assert (found.resend, found.max_readahead) == (resend, 131072)


@pytest.mark.parametrize(
    "request_",
    [
        *(init(30, LINUX_5_4), init(0, 0), init(31, 0, major=6), init(31, 0, major=8)),
        Request(opcode=protocol.GETATTR, unique=1, body=bytes(64)),
        Request(opcode=protocol.INIT, unique=1, body=bytes(15)),
    ],
)
def test_kernels_that_are_too_old_or_too_new(request_):
    with pytest.raises(ImageFormatError):
        protocol.negotiate(request_)


def test_init_reply():
    flags = LINUX_5_4 | protocol.INIT_EXT | protocol.HAS_RESEND
    answer = protocol.init_reply(5, Init(minor=40, flags=flags, max_readahead=4096))
    assert struct.unpack_from("=IiQ", answer) == (16 + 64, 0, 5)
    major, minor, readahead, low = struct.unpack_from("=IIII", answer, 16)
    assert (major, minor, readahead, low) == (7, 40, 4096, flags & 0xFFFFFFFF)
    assert struct.unpack_from("=I", answer, 16 + 32)[0] == flags >> 32
    background, threshold, max_write, _, max_pages = struct.unpack_from("=HHIIH", answer, 16 + 16)
    assert 0 < threshold <= background
    assert max_write >= 4096
    assert max_pages == 256


# Requests, and their answers.

FILE = File(size=3 << 40, blksize=4 << 20, mode=0o400, time=1_700_000_000)


def answer(opcode: int, body: bytes = b"") -> tuple[int, bytes]:
    """Return the errno and the body of an answer, whose header is right."""
    found = FILE.answer(protocol.parse(message(opcode, body, unique=(1 << 63) + 4)))
    size, error, unique = struct.unpack_from("=IiQ", found)
    assert (size, unique) == (len(found), (1 << 63) + 4)
    return -error, found[16:]


def test_attributes():
    code, body = answer(protocol.GETATTR, bytes(16))
    assert (code, len(body)) == (0, 104)
    ino, size, blocks, _, mtime = struct.unpack_from("=5Q", body, 16)
    assert (ino, size, blocks, mtime) == (1, 3 << 40, 3 << 31, 1_700_000_000)
    mode, links, uid, gid, _, blksize = struct.unpack_from("=6I", body, 16 + 60)
    assert (oct(mode), links, uid, gid, blksize) == ("0o100400", 1, 0, 0, 4 << 20)
    code, body = answer(protocol.STATX, bytes(40))
    assert (code, len(body)) == (0, 288)
    mask, blksize = struct.unpack_from("=II", body, 32)
    assert (mask & 0x7FF, blksize) == (0x7FF, 4 << 20)
    assert struct.unpack_from("=QQQ", body, 32 + 32) == (1, 3 << 40, 3 << 31)


def test_open_and_statfs():
    code, body = answer(protocol.OPEN, bytes(8))
    handle, flags, _ = struct.unpack("=QII", body)
    assert (code, handle) == (0, 0)
    assert flags & 2, "the kernel may keep what it has cached"
    assert not flags & 1, "direct I/O would be no regular file to a loop device"
    code, body = answer(protocol.STATFS)
    assert (code, len(body)) == (0, 80)


@pytest.mark.parametrize("opcode", [protocol.FLUSH, protocol.RELEASE, protocol.DESTROY])
def test_nothing_to_say(opcode):
    assert answer(opcode, bytes(24)) == (0, b"")


@pytest.mark.parametrize(
    ("opcode", "code"),
    [
        (protocol.LOOKUP, errno.ENOTDIR),
        (protocol.WRITE, errno.EROFS),
        (protocol.FALLOCATE, errno.EROFS),
        (protocol.FSYNC, errno.EROFS),
    ],
)
def test_refusals(opcode, code):
    assert answer(opcode, bytes(40)) == (code, b"")


@pytest.mark.parametrize("opcode", [protocol.FORGET, protocol.BATCH_FORGET, protocol.INTERRUPT])
def test_what_nobody_waits_for(opcode):
    assert FILE.answer(protocol.parse(message(opcode, bytes(16)))) is None


KNOWN = {getattr(protocol, name) for name in (*OPCODES, "STATX")}


@given(st.integers(0, 0xFFFFFFFF).filter(lambda opcode: opcode not in KNOWN), st.binary())
def test_anything_else(opcode, body):
    """The kernel then does not ask again, and does it by itself where it can."""
    assert answer(opcode, body) == (errno.ENOSYS, b"")


@given(st.binary(max_size=200))
def test_parse_noise(data):
    try:
        found = protocol.parse(data)
    except ImageFormatError:
        return
    assert struct.unpack_from("=I", data)[0] == len(data)
    assert found.body == data[40:]


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, (1 << 64) - 1), st.binary(max_size=100))
def test_parse(opcode, unique, body):
    for kind in (bytes, bytearray, memoryview):
        found = protocol.parse(kind(message(opcode, body, unique)))
        assert (found.opcode, found.unique, found.body) == (opcode, unique, body)
    for damaged in (message(opcode, body)[:-1], message(opcode, body) + b"x"):
        with pytest.raises(ImageFormatError):
            protocol.parse(damaged)


def test_replies():
    assert protocol.reply(9, b"abc") == struct.pack("=IiQ", 19, 0, 9) + b"abc"
    assert protocol.error(9, errno.EIO) == struct.pack("=IiQ", 16, -5, 9)
    assert protocol.resend() == struct.pack("=IiQ", 16, 7, 0)
