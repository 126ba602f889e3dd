# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""attach() and wrong input: one clear error, nothing left bound. What cannot be is said."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import bound_to, counting_bytes
from oracle import losetup, make_gpt, partitions, remove_device, run, sysfs, wait_until

import loopdev

NOBODY = 65534
LOOP_CTL_ADD, LOOP_CTL_REMOVE = 0x4C80, 0x4C81  # <linux/loop.h>
MIB = 1 << 20


# What the tests of the command use as well.


def files_bound(directory: object) -> list[str]:
    """Return the devices with a file of a directory, as losetup(8) and sysfs see them."""
    # Names of files need not be UTF-8, those of other tests neither.
    out = run("losetup", "--list", "--json", "-O", "NAME,BACK-FILE", errors="surrogateescape")
    seen = json.loads(out or "{}", strict=False)
    names = {
        device["name"]
        for device in seen.get("loopdevices", [])
        if (device["back-file"] or "").startswith(str(directory))
    }
    return sorted(names | {f"/dev/{name}" for name in bound_to(str(directory))})


def is_bound(number: int) -> bool:
    """Return whether a device has a backing file, of whatever name."""
    return os.path.isdir(f"/sys/block/loop{number}/loop")


def control(request: int, number: int) -> None:
    fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, number)
    finally:
        os.close(fd)


def exists(number: int) -> bool:
    return os.path.exists(f"/sys/block/loop{number}")


@contextlib.contextmanager
def free_number(add: bool = False):
    """Yield a number that no device has, or that of a device made for this; it is gone after."""
    number = 5000 + os.getpid() % 1000
    while exists(number):
        number += 1000
    if add:
        control(LOOP_CTL_ADD, number)
    try:
        yield number
    finally:
        if exists(number):
            remove_device(number)


@contextlib.contextmanager
def public_directory():
    """Yield a directory that everybody can enter, unlike pytest's."""
    place = Path(tempfile.mkdtemp(prefix="loopdev-test-"))
    place.chmod(0o755)
    try:
        yield place
        assert not bound_to(str(place))
    finally:
        shutil.rmtree(place)


# The interpreter may be where others cannot read, so all modules are loaded while it is root's.
AS_NOBODY = f"""\
import argparse, encodings.ascii, json, os, pkgutil, sys, traceback
import loopdev
for module in pkgutil.walk_packages(loopdev.__path__, "loopdev."):
    __import__(module.name)
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
"""
TRY_ATTACH = """\
import json, sys
import loopdev
try:
    with loopdev.attach(sys.argv[1], read_only=len(sys.argv) > 2):
        print("{}")
except loopdev.LoopdevError as exc:
    print(json.dumps([type(exc).__name__, exc.errno, exc.exit_code, str(exc)]))
"""


def attach_as_nobody(path: object, *more: object) -> list[object]:
    """Return what attach() raises in a process without privileges: class, errno, code, text."""
    words = [sys.executable, "-c", AS_NOBODY + TRY_ATTACH, str(path), *map(str, more)]
    return json.loads(run(*words, timeout=30))


def in_namespace(script: str, *command: object) -> list[str]:
    """Return the words that run a command in a mount namespace, after a piece of shell."""
    return ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh", *map(str, command)]


NO_LOOP_CONTROL = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/loop0 b 7 0"


class Case(NamedTuple):
    """One kind of wrong input.

    Attributes:
        name: Of the test.
        make: Makes the file, given a directory, and returns its path.
        options: Of attach().
        error: What it raises.
        errno: Its errno, None where it has none.
        reason: A regular expression for the message; {file} is the file.
        exit_code: Of the command.
    """

    name: str
    make: object
    options: dict[str, object]
    error: type
    errno: int | None
    reason: str
    exit_code: int


def plain(directory: Path, size: int = MIB) -> Path:
    path = directory / "disk.img"
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def sized(size: int):
    return lambda directory: plain(directory, size)


def a_missing(directory: Path) -> Path:
    return directory / "missing.img"


def a_dangling_link(directory: Path) -> Path:
    path = directory / "link"
    path.symlink_to(directory / "missing.img")
    return path


def a_link_to_itself(directory: Path) -> Path:
    path = directory / "link"
    path.symlink_to(path)
    return path


def below_a_file(directory: Path) -> Path:
    return plain(directory) / "disk.img"


def a_long_name(directory: Path) -> Path:
    return directory / ("x" * 256)


def a_directory(directory: Path) -> Path:
    return directory


def a_fifo(directory: Path) -> Path:
    path = directory / "fifo"
    os.mkfifo(path)
    return path


def a_socket(directory: Path) -> Path:
    path = directory / "socket"
    place = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            # A socket's path is short, pytest's directories are not.
            listener.bind(f"/proc/self/fd/{place}/socket")
    finally:
        os.close(place)
    return path


def a_character_device(directory: Path) -> Path:
    path = directory / "null"
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return path


def dev_null(directory: Path) -> Path:
    return Path("/dev/null")


def _file(name, make, code, reason, exit_code=6, **options) -> Case:
    return Case(
        name, make, options, loopdev.BackingFileError, code, f"{{file}}: .*{reason}", exit_code
    )


def _value(name, reason, make=plain, **options) -> Case:
    return Case(name, make, options, loopdev.InvalidValueError, None, reason, 2)


def _out_of_range(option: str, value: int, reason: str, **more: int) -> Case:
    return _value(f"{option}={value}", f"{option}={value}: .*{reason}", **{option: value}, **more)


CASES = [
    _file("missing", a_missing, errno.ENOENT, "No such file", 3),
    _file("dangling link", a_dangling_link, errno.ENOENT, "No such file", 3),
    _file("link to itself", a_link_to_itself, errno.ELOOP, "symbolic links"),
    _file("below a file", below_a_file, errno.ENOTDIR, "Not a directory"),
    _file("long name", a_long_name, errno.ENAMETOOLONG, "too long"),
    _file("directory", a_directory, errno.EISDIR, "is a directory"),
    _file("FIFO", a_fifo, errno.EINVAL, "is a FIFO"),
    _file("FIFO, read-only", a_fifo, errno.EINVAL, "is a FIFO", read_only=True),
    _file("socket", a_socket, errno.EINVAL, "is a socket"),
    _file("character device", a_character_device, errno.EINVAL, "is a character device"),
    _file("/dev/null", dev_null, errno.EINVAL, "is a character device"),
    _file("empty", sized(0), errno.EINVAL, "is empty"),
    _file("empty, forced", sized(0), errno.EINVAL, "is empty", force=True),
    _file("511 bytes", sized(511), errno.EINVAL, "511 bytes .*one sector of 512"),
    _file("511 bytes, forced", sized(511), errno.EINVAL, "one sector of 512", force=True),
    _file("512 of 4096", sized(512), errno.EINVAL, "512 bytes .*of 4096", sector_size=4096),
    _file("488 too many", sized(1000), errno.EINVAL, "488 too many .*512"),
    _file("1 too many", sized(MIB + 1), errno.EINVAL, "1 too many", sector_size=512),
    _file("512 too many", sized(4608), errno.EINVAL, "512 too many .*4096", sector_size=4096),
    _file(
        "offset to 4096", sized(MIB), errno.EINVAL, "3584 too many", sector_size=4096, offset=512
    ),
    _file(
        "limit at 4096", sized(MIB), errno.EINVAL, "512 too many", sector_size=4096, sizelimit=4608
    ),
    _value("offset past the end", f"(?=.*{{file}}).*\\b{MIB}\\b", offset=2 * MIB),
    _value("offset at the end", f"(?=.*{{file}}).*\\b{MIB}\\b", offset=MIB),
    _value("sizelimit past the end", f"(?=.*{{file}}).*\\b{MIB}\\b", sizelimit=MIB + 512),
    _value("both past the end", f"(?=.*{{file}}).*\\b{MIB - 512}\\b", sizelimit=MIB, offset=512),
    _out_of_range("offset", 1, "multiple of 512"),
    _out_of_range("offset", 100, "multiple of 512"),
    _out_of_range("offset", 513, "multiple of 512"),
    _out_of_range("sizelimit", 1, "multiple of 512"),
    _out_of_range("sizelimit", 1000, "multiple of 512"),
    _out_of_range("sector_size", 0, "512"),
    _out_of_range("sector_size", 1, "512"),
    _out_of_range("sector_size", 256, "512"),
    _out_of_range("sector_size", 1000, "power of two"),
    _out_of_range("sector_size", 131072, "power of two"),
    _out_of_range("offset", -1, "0 or more"),
    _out_of_range("offset", -512, "0 or more"),
    _out_of_range("sizelimit", -512, "0 or more"),
    _out_of_range("sector_size", -512, "512"),
    _out_of_range("number", -1, "0 to 1048575"),
    _out_of_range("timeout", -1, "0 or more"),
    _out_of_range("offset", 1 << 63, "2\\^63"),
    _out_of_range("offset", 1 << 64, "2\\^63"),
    _out_of_range("sizelimit", 1 << 63, "2\\^63"),
    _out_of_range("number", 1 << 20, "0 to 1048575"),
    _out_of_range("number", 1 << 31, "0 to 1048575"),
    _out_of_range("number", 1 << 64, "0 to 1048575"),
]


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


@pytest.mark.parametrize("case", CASES, ids=names(CASES))
@pytest.mark.timeout(30)
def test_refused(tmp_path, case):
    path = case.make(tmp_path)
    with pytest.raises(case.error) as caught:
        loopdev.attach(path, **case.options).close()
    text = str(caught.value)
    assert re.search(case.reason.format(file=re.escape(str(path))), text), text
    assert "\n" not in text
    assert getattr(caught.value, "errno", None) == case.errno
    assert caught.value.exit_code == case.exit_code
    if case.errno is not None:
        assert caught.value.filename == str(path)
    assert files_bound(tmp_path) == []


@pytest.mark.parametrize(("size", "sector"), [(1000, 512), (4608, 4096), (MIB + 1, 4096)])
def test_force_takes_a_file_that_is_too_long(tmp_path, size, sector):
    path = tmp_path / "odd.img"
    path.write_bytes(counting_bytes(0, size))
    with loopdev.attach(path, sector_size=sector, force=True) as device:
        assert sysfs(device.number, "size") == str(size // 512)
        with open(device.path, "rb") as file:
            whole = size // sector * sector
            assert file.read(whole) == counting_bytes(0, whole)


def test_number_must_be_a_time():
    with pytest.raises(loopdev.InvalidValueError, match="timeout"):
        loopdev.attach("/dev/null", timeout=float("nan")).close()


@pytest.mark.parametrize("path", ["", b""])
def test_empty_path(path):
    """It is no name of the current directory."""
    with pytest.raises(loopdev.BackingFileError) as caught:
        loopdev.attach(path).close()
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("path", ["a\0b", b"a\0b", "/tmp/a\0b"])
def test_nul_in_the_path(path):
    with pytest.raises(loopdev.InvalidValueError, match="null") as caught:
        loopdev.attach(path).close()
    assert "\0" not in str(caught.value)


# Descriptors.


def test_closed_descriptor(image):
    fd = os.open(image, os.O_RDWR)
    os.close(fd)
    with pytest.raises(loopdev.BackingFileError, match=f"descriptor {fd}: .*not an open") as caught:
        loopdev.attach(fd).close()
    assert caught.value.errno == errno.EBADF


def test_closed_file(image):
    with open(image, "r+b") as file:
        pass
    with pytest.raises(ValueError, match="closed"):
        loopdev.attach(file).close()


@pytest.mark.parametrize("fd", [-1, -100, -(1 << 31)])
def test_negative_descriptor(fd):
    with pytest.raises(loopdev.InvalidValueError, match=f"{fd}: must be an open descriptor"):
        loopdev.attach(fd).close()


@pytest.mark.parametrize("fd", [1 << 20, (1 << 31) - 1, 1 << 31, 1 << 64])
def test_number_that_is_no_descriptor(fd):
    with pytest.raises(loopdev.LoopdevError, match=f"{fd}.*open descriptor"):
        loopdev.attach(fd).close()


@pytest.mark.parametrize(("flags", "reason"), [(os.O_PATH, "O_PATH"), (os.O_WRONLY, "write-only")])
@pytest.mark.parametrize("read_only", [False, True])
def test_descriptor_that_cannot_be_read(image, flags, reason, read_only):
    fd = os.open(image, flags)
    try:
        with pytest.raises(loopdev.BackingFileError, match=f"{image}: .*{reason}") as caught:
            loopdev.attach(fd, read_only=read_only).close()
        assert caught.value.errno == errno.EBADF
        assert files_bound(image.parent) == []
        os.fstat(fd)
    finally:
        os.close(fd)


def test_read_only_descriptor_is_not_writable(image):
    fd = os.open(image, os.O_RDONLY)
    try:
        with pytest.raises(loopdev.BackingFileError, match=f"{image}: .*read-only") as caught:
            loopdev.attach(fd).close()
        assert caught.value.errno == errno.EACCES
        assert files_bound(image.parent) == []
        with loopdev.attach(fd, read_only=True) as device:
            assert losetup(device.path)["ro"] is True
    finally:
        os.close(fd)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "tty"])
def test_descriptor_of_another_kind(tmp_path, kind):
    with contextlib.ExitStack() as stack:
        if kind == "pipe":
            fds = os.pipe()
        elif kind == "socket":
            fds = [end.detach() for end in socket.socketpair()]
        elif kind == "tty":
            fds = os.openpty()
        else:
            fds = (os.open(tmp_path, os.O_RDONLY),)
        for fd in fds:
            stack.callback(os.close, fd)
        with pytest.raises(loopdev.BackingFileError, match="is a ") as caught:
            loopdev.attach(fds[0], read_only=True).close()
        assert caught.value.exit_code == 6


# A file that cannot be written is an error, and never a read-only device without a word.


@contextlib.contextmanager
def immutable(path: Path):
    made = subprocess.run(["chattr", "+i", path], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no immutable files here: {made.stderr}")
    try:
        yield path
    finally:
        run("chattr", "-i", path)


@contextlib.contextmanager
def executed(path: Path):
    """A program that runs: ETXTBSY."""
    path.unlink()
    shutil.copy(shutil.which("sleep"), path)
    os.truncate(path, -(-path.stat().st_size // 4096) * 4096)
    with subprocess.Popen([path, "1000"]) as process:
        try:
            yield path
        finally:
            process.kill()


@contextlib.contextmanager
def read_only_device(path: Path):
    """A block device that takes no writes."""
    with loopdev.attach(path, read_only=True) as lower:
        yield Path(lower.path)


UNWRITABLE = {
    "immutable": (immutable, errno.EPERM, 5),
    "executed": (executed, errno.ETXTBSY, 6),
    "read-only device": (read_only_device, errno.EROFS, 6),
}


@pytest.mark.parametrize("kind", UNWRITABLE)
def test_file_that_cannot_be_written(image, kind):
    make, code, exit_code = UNWRITABLE[kind]
    with make(image) as path:
        with pytest.raises(loopdev.BackingFileError, match=f"{path}: .*read-only") as caught:
            loopdev.attach(path).close()
        assert (caught.value.errno, caught.value.exit_code) == (code, exit_code)
        with loopdev.attach(path, read_only=True) as device:
            assert sysfs(device.number, "ro") == "1"


READ_ONLY_MOUNT = 'mount --bind "$PLACE" "$PLACE" && mount -o remount,bind,ro "$PLACE"'


def test_file_on_a_read_only_mount(image):
    words = in_namespace(READ_ONLY_MOUNT, sys.executable, "-c", TRY_ATTACH, image)
    kind, code, exit_code, text = json.loads(run(*words, env={**os.environ, "PLACE": image.parent}))
    assert (kind, code, exit_code) == ("BackingFileError", errno.EROFS, 6)
    assert text.startswith(f"{image}: ")
    assert "read-only" in text


# Without the right.


@pytest.mark.parametrize("more", [(), ("read-only",)])
def test_file_that_may_not_be_read(more):
    with public_directory() as place:
        path = plain(place)
        path.chmod(0)
        kind, code, exit_code, text = attach_as_nobody(path, *more)
        assert (kind, code, exit_code) == ("BackingFileError", errno.EACCES, 5)
        assert text.startswith(f"{path}: ")
        assert "Permission denied" in text


def test_file_below_a_directory_that_may_not_be_entered():
    with public_directory() as place:
        inner = place / "inner"
        inner.mkdir(mode=0o700)
        path = plain(inner)
        path.chmod(0o666)
        kind, code, exit_code, text = attach_as_nobody(path)
        assert (kind, code, exit_code) == ("BackingFileError", errno.EACCES, 5)
        assert text.startswith(f"{path}: ")


def test_no_right_to_use_loop_devices():
    with public_directory() as place:
        path = plain(place)
        os.chown(path, NOBODY, NOBODY)
        kind, code, exit_code, text = attach_as_nobody(path)
        assert (kind, code, exit_code) == ("NotPermittedError", errno.EACCES, 5)
        assert text.startswith("/dev/loop")


def test_no_loop_control(image):
    words = in_namespace(NO_LOOP_CONTROL, sys.executable, "-c", TRY_ATTACH, image)
    kind, code, exit_code, text = json.loads(run(*words))
    assert (kind, code, exit_code) == ("NoSuchDeviceError", errno.ENOENT, 3)
    assert text.startswith("/dev/loop-control: ")
    assert files_bound(image.parent) == []


# Numbers, and loop devices as backing.


def test_wanted_device_is_taken(image, counting_file):
    with free_number() as number, loopdev.attach(image, number=number) as device:
        seen = losetup(device.path)
        with pytest.raises(loopdev.DeviceBusyError, match=f"loop{number}: .*{image}") as caught:
            loopdev.attach(counting_file, number=number).close()
        assert caught.value.errno == errno.EBUSY
        assert losetup(device.path) == seen
        assert files_bound(image.parent) == [device.path]


def test_wanted_device_is_beyond_those_that_exist(image, sector_size):
    """Its number and node are gone with it."""
    with free_number() as number:
        assert number >= 300
        with loopdev.attach(image, number=number, sector_size=sector_size) as device:
            assert (device.number, device.path) == (number, f"/dev/loop{number}")
            assert losetup(device.path)["log-sec"] == sector_size
        assert not exists(number)
        assert not os.path.exists(f"/dev/loop{number}")


def test_refused_file_leaves_no_number(tmp_path):
    with free_number() as number:
        with pytest.raises(loopdev.BackingFileError):
            loopdev.attach(plain(tmp_path, 1000), number=number).close()
        fd = os.memfd_create("no-direct-io")
        try:
            os.ftruncate(fd, MIB)
            # This one fails after it was bound.
            with pytest.raises(loopdev.BackingFileError, match="direct I/O"):
                loopdev.attach(fd, number=number, direct_io=True).close()
        finally:
            os.close(fd)
        assert not exists(number)
        assert not os.path.exists(f"/dev/loop{number}")


def test_device_on_itself():
    with free_number(add=True) as number:
        with pytest.raises(loopdev.BackingFileError, match=f"^/dev/loop{number}: "):
            loopdev.attach(f"/dev/loop{number}", number=number).close()
        assert not is_bound(number)


def test_device_on_itself_by_way_of_another(image):
    with loopdev.attach(image) as lower, loopdev.attach(lower.path) as upper:
        with pytest.raises(loopdev.DeviceBusyError, match=str(image)):
            loopdev.attach(upper.path, number=lower.number).close()
        with pytest.raises(loopdev.DeviceBusyError, match=lower.path):
            loopdev.attach(lower.path, number=upper.number).close()
        assert losetup(lower.path)["back-file"] == str(image)
        assert losetup(upper.path)["back-file"] == lower.path


def test_unbound_loop_device_as_backing():
    with free_number(add=True) as number:
        with pytest.raises(loopdev.BackingFileError, match=f"^/dev/loop{number}: ") as caught:
            loopdev.attach(f"/dev/loop{number}").close()
        assert caught.value.exit_code == 6


def test_bound_loop_device_as_backing(counting_file, sector_size):
    with (
        loopdev.attach(counting_file, sector_size=sector_size) as lower,
        loopdev.attach(lower.path, read_only=True) as upper,
    ):
        assert losetup(upper.path)["back-file"] == lower.path
        assert Path(upper.path).read_bytes() == counting_bytes(0, 128 << 10)


def test_character_device_with_the_number_of_a_loop_device(image, tmp_path):
    """Numbers of character and block devices are two things: 7:N is /dev/vcsN, too."""
    with loopdev.attach(image) as lower, loopdev.attach(lower.path) as upper:
        other = tmp_path / "vcs"
        os.mknod(other, stat.S_IFCHR | 0o600, os.stat(lower.path).st_rdev)
        assert [found.path for found in loopdev.find(lower.path)] == [upper.path]
        assert loopdev.find(other) == []


# Damaged partition tables.

ENTRIES = "label: gpt\nstart=2048,size=4096\nstart=8192,size=4096\nstart=16384,size=4096\n"
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")  # UEFI 2.10, table 5-5


def _gpt(directory: Path, script: str = ENTRIES) -> Path:
    path = plain(directory, 16 * MIB)
    make_gpt(path, script)
    return path


def _patch_gpt(path: Path, header=None, entry=None, copies=("primary", "backup")) -> Path:
    """Change both copies of a GPT so that their checksums still hold.

    Args:
        path: The image, with sectors of 512 bytes.
        header: Fields of the header by their place in it.
        entry: Number, first and last sector of a partition.
        copies: Which.
    """
    data = bytearray(path.read_bytes())
    for copy in copies:
        at = 512 if copy == "primary" else len(data) - 512
        fields = list(_HEADER.unpack_from(data, at))
        table = fields[10] * 512
        if entry is not None:
            number, first, last = entry
            struct.pack_into("<QQ", data, table + (number - 1) * 128 + 32, first, last)
        fields[13] = zlib.crc32(data[table : table + 128 * 128])
        for place, value in (header or {}).items():
            fields[place] = value
        fields[3] = 0
        fields[3] = zlib.crc32(_HEADER.pack(*fields))
        _HEADER.pack_into(data, at, *fields)
    path.write_bytes(data)
    return path


def _flip(path: Path, *places: int) -> Path:
    with open(path, "r+b") as file:
        for place in places:
            whence = os.SEEK_SET if place >= 0 else os.SEEK_END
            file.seek(place, whence)
            byte = file.read(1)[0]
            file.seek(place, whence)
            file.write(bytes([byte ^ 0xFF]))
    return path


def bad_headers(directory: Path) -> Path:
    return _flip(_gpt(directory), 512 + 56, -512 + 56)


def bad_arrays(directory: Path) -> Path:
    # The backup's array is in the 32 sectors before its header.
    return _flip(_gpt(directory), 1024, -33 * 512)


def overlapping(directory: Path) -> Path:
    return _patch_gpt(_gpt(directory), entry=(2, 4096, 9000))


def past_the_end(directory: Path) -> Path:
    return _patch_gpt(_gpt(directory), entry=(2, 8192, 10**9))


def backwards(directory: Path) -> Path:
    return _patch_gpt(_gpt(directory), entry=(2, 8192, 8000))


def many_entries(directory: Path) -> Path:
    return _patch_gpt(_gpt(directory), header={11: 1 << 30})


def huge_entries(directory: Path) -> Path:
    return _patch_gpt(_gpt(directory), header={12: 1 << 31})


def array_past_the_end(directory: Path) -> Path:
    return _patch_gpt(_gpt(directory), header={10: 1 << 60})


def cut_off(directory: Path) -> Path:
    path = _gpt(directory)
    os.truncate(path, 8 * MIB)
    return path


def _slot(kind: int, start: int, count: int) -> bytes:
    return struct.pack("<B3xB3xII", 0, kind, start, count)


def _record(*slots: bytes) -> bytes:
    return bytes(446) + b"".join(slots).ljust(64, b"\0") + b"\x55\xaa"


def mbr_past_the_end(directory: Path) -> Path:
    path = plain(directory, 16 * MIB)
    with open(path, "r+b") as file:
        file.write(_record(_slot(0x83, 2048, 1 << 20)))
    return path


def extended_loop(directory: Path) -> Path:
    """Two extended boot records, of which each leads to the other."""
    path = plain(directory, 16 * MIB)
    with open(path, "r+b") as file:
        file.write(_record(_slot(0x05, 2048, 20000)))
        file.seek(2048 * 512)
        file.write(_record(_slot(0x83, 63, 1000), _slot(0x05, 4096, 2000)))
        file.seek((2048 + 4096) * 512)
        file.write(_record(_slot(0x83, 63, 1000), _slot(0x05, 0, 2000)))
    return path


def extended_in_itself(directory: Path) -> Path:
    path = plain(directory, 16 * MIB)
    with open(path, "r+b") as file:
        file.write(_record(_slot(0x05, 2048, 20000)))
        file.seek(2048 * 512)
        file.write(_record(_slot(0x83, 63, 1000), _slot(0x0F, 0, 20000)))
    return path


DAMAGED = {
    bad_headers: "checksum",
    bad_arrays: "checksum",
    overlapping: "partition 1 and partition 2 overlap",
    past_the_end: "partition 2: .*1000000000",
    backwards: "partition 2: .*8192 to 8000",
    many_entries: f"{1 << 30} entries",
    huge_entries: f"entries of {1 << 31} bytes",
    array_past_the_end: "array of GPT entries",
    cut_off: f"truncated: .*{16 * MIB} bytes.*{8 * MIB}",
    mbr_past_the_end: "partition 1 ends at",
    extended_loop: "a loop of extended partitions",
    extended_in_itself: "a loop of extended partitions",
}
damaged = pytest.mark.parametrize("make", DAMAGED, ids=lambda make: make.__name__)


@damaged
def test_damaged_table_is_refused_with_partscan(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(loopdev.ImageFormatError, match=f"^{path}: .*{DAMAGED[make]}") as caught:
        loopdev.attach(path, partscan=True).close()
    assert (caught.value.path, caught.value.exit_code) == (str(path), 6)
    assert files_bound(tmp_path) == []


@damaged
def test_damaged_table_is_no_matter_without_partscan(tmp_path, make):
    path = make(tmp_path)
    with loopdev.attach(path) as device:
        assert losetup(device.path)["back-file"] == str(path)
        assert sysfs(device.number, "size") == str(path.stat().st_size // 512)
        assert partitions(device.number) == {}


@pytest.mark.parametrize("place", [512 + 56, 512, 1024], ids=["checksum", "signature", "entries"])
def test_good_backup_of_a_bad_table(tmp_path, place):
    path = _flip(_gpt(tmp_path), place)
    with loopdev.attach(path, partscan=True) as device:
        expected = {
            1: (2048 * 512, 4096 * 512),
            2: (8192 * 512, 4096 * 512),
            3: (16384 * 512, 4096 * 512),
        }
        assert partitions(device.number) == expected
        assert {p.number: (p.start, p.size) for p in device.partitions} == expected


def test_rescan_of_a_damaged_table_keeps_the_nodes(tmp_path):
    path = _gpt(tmp_path)
    with loopdev.attach(path, partscan=True) as device:
        before = partitions(device.number)
        _flip(path, 512 + 56, -512 + 56)
        with pytest.raises(loopdev.ImageFormatError, match="checksum"):
            device.rescan()
        assert partitions(device.number) == before != {}


# Files that are gone, and names that are odd.


def test_deleted_file_by_descriptor(counting_file):
    with open(counting_file, "r+b") as file:
        counting_file.unlink()
        with loopdev.attach(file) as device:
            assert device.backing_file == f"{counting_file} (deleted)"
            assert Path(device.path).read_bytes() == counting_bytes(0, 128 << 10)
            assert [found.number for found in loopdev.find(file.fileno())] == [device.number]
            assert loopdev.info(device).backing_file == losetup(device.path)["back-file"]
            number = device.number
        wait_until(lambda: sysfs(number, "loop/backing_file") != f"{counting_file} (deleted)")


def test_file_deleted_after_attach(counting_file):
    with loopdev.attach(counting_file) as device:
        counting_file.unlink()
        assert device.backing_file == f"{counting_file} (deleted)"
        assert Path(device.path).read_bytes() == counting_bytes(0, 128 << 10)
        with pytest.raises(FileNotFoundError):
            loopdev.find(counting_file)


ODD_NAMES = [
    b"new\nline\ttab\x1b[31mescape\xff\xfe.img",
    b"\n",
    b"trailing newline\n",
    b" spaces ",
    b"-rf",
    b"\xc2\x9b1mC1.img",
    "ünïcode \u202e \u2028.img".encode(),
    b"\\x0a",
    b'"quoted"\\',
    b"a (deleted)",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_name(tmp_path, name):
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.write(counting_bytes(0, MIB))
    with loopdev.attach(path) as device:
        raw = Path(f"/sys/block/loop{device.number}/loop/backing_file").read_bytes()
        assert raw == path + b"\n"
        assert os.fsencode(device.backing_file) == path
        info = loopdev.info(device)
        assert os.fsencode(info.backing_file) == path
        found = [one for one in loopdev.devices() if one.number == device.number]
        assert [os.fsencode(one.backing_file) for one in found] == [path]
        assert [one.number for one in loopdev.find(path)] == [device.number]
        kept = os.fsencode(info.loop_ref)
        assert path.startswith(kept)
        # 63 bytes, but no character is cut in two.
        assert min(60, len(path)) <= len(kept) <= 63
        assert Path(device.path).read_bytes() == counting_bytes(0, MIB)


def test_error_names_an_odd_file(tmp_path):
    """The name is in the error as it is; only the command makes it printable."""
    path = os.fsencode(tmp_path) + b"/\x1b\xff"
    with pytest.raises(loopdev.BackingFileError) as caught:
        loopdev.attach(path).close()
    assert os.fsencode(caught.value.filename) == path
