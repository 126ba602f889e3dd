# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""loopdev.loop.Loop: every request, on a real device that is this test's own."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import stat
from typing import TYPE_CHECKING

import oracle
import pytest
from conftest import counting_bytes

from loopdev import (
    ClosedError,
    DeviceBusyError,
    InvalidValueError,
    KernelError,
    LoopdevError,
    NoSuchDeviceError,
    NotBoundError,
    WaitTimeoutError,
)
from loopdev.kernel import probe
from loopdev.loop import Loop, LoopInfo, UnexpectedDevice

if TYPE_CHECKING:
    from pathlib import Path

PAGE = os.sysconf("SC_PAGESIZE")
CONTROL = "/dev/loop-control"
# Of <linux/loop.h>: what tests do themselves is not done with the code under test.
ADD, REMOVE, CLR_FD, CONFIGURE = 0x4C80, 0x4C81, 0x4C01, 0x4C0A


def control(request: int, number: int) -> None:
    fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, number)
    finally:
        os.close(fd)


def removed(number: int) -> bool:
    """Let go of a device of ours and remove it, if nobody is just looking at it."""
    try:
        if os.path.exists(f"/sys/block/loop{number}/loop"):
            fd = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, CLR_FD)
            finally:
                os.close(fd)
        control(REMOVE, number)
    except OSError as exc:
        if exc.errno not in (errno.EBUSY, errno.ENXIO, errno.ENODEV):
            raise
        return exc.errno == errno.ENODEV
    return True


@pytest.fixture
def add_device():
    """Add a device that nobody else is given: its number is far too high."""
    added = []

    def add() -> int:
        number = 4000 + os.getpid() % 1000 + 1000 * len(added)
        control(ADD, number)
        added.append(number)
        return number

    yield add
    for number in added:
        oracle.wait_until(lambda number=number: removed(number))


@pytest.fixture
def number(add_device):
    return add_device()


@pytest.fixture
def loop(number):
    with Loop(number) as loop:
        yield loop


@pytest.fixture
def backing(counting_file):
    """A descriptor of 128 KiB that say where they are."""
    fd = os.open(counting_file, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def read_only_backing(counting_file):
    fd = os.open(counting_file, os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def other(tmp_path):
    """A descriptor of another file of the same size."""
    path = tmp_path / "other.img"
    path.write_bytes(b"other..." * (16 << 10))
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def bound(loop, backing, sector_size):
    """The device, bound."""
    loop.configure(backing, blocksize=sector_size)
    return loop


@pytest.fixture
def directory(tmp_path):
    """A descriptor of an empty directory that stands in for /dev."""
    place = tmp_path / "dev"
    place.mkdir()
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def make_node(directory: int, number: int, kind: int, rdev: int = 0) -> None:
    os.mknod(f"loop{number}", kind | 0o600, rdev, dir_fd=directory)


def is_bound(loop: Loop) -> bool:
    return oracle.is_bound(loop.minor)


def read_all(loop: Loop) -> bytes:
    size = int(oracle.sysfs(loop.minor, "size")) * 512
    return os.pread(loop.fileno(), size + 1, 0)


# Opening and closing.


def test_open(number):
    with Loop(number) as loop:
        assert loop.minor == number
        assert loop.devname == f"loop{number}"
        assert loop.path == f"/dev/loop{number}"
        assert loop.fd == loop.fileno()
        assert os.readlink(f"/proc/self/fd/{loop.fd}") == f"/dev/loop{number}"
        major, minor = oracle.sysfs(number, "dev").split(":")
        assert loop.rdev == os.makedev(int(major), int(minor)) == os.fstat(loop.fd).st_rdev
        assert not os.get_inheritable(loop.fd)
        assert fcntl.fcntl(loop.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def test_open_read_only(number):
    with Loop(number, read_only=True) as loop:
        assert fcntl.fcntl(loop.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_bound_through_a_read_only_description(number, backing):
    with Loop(number, read_only=True) as loop:
        loop.configure(backing)
        assert oracle.sysfs(number, "ro") == "1"


def test_open_in_a_directory(number, directory):
    make_node(directory, number, stat.S_IFBLK, os.makedev(7, number))
    with Loop(number, dir_fd=directory) as loop:
        assert loop.path == loop.devname == f"loop{number}"
        assert os.fstat(loop.fd).st_rdev == os.makedev(7, number)


@pytest.mark.parametrize(
    ("kind", "rdev"),
    [(stat.S_IFREG, 0), (stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFIFO, 0)],
    ids=["file", "character", "fifo"],
)
def test_node_of_another_kind(number, directory, kind, rdev):
    make_node(directory, number, kind, rdev)
    with pytest.raises(UnexpectedDevice) as caught:
        Loop(number, dir_fd=directory)
    assert caught.value.expected_minor == number
    assert caught.value.rdev == rdev
    assert stat.S_IFMT(caught.value.mode) == kind
    assert "no block device" in str(caught.value)


def test_node_of_another_loop_device(add_device, directory):
    number, another = add_device(), add_device()
    make_node(directory, number, stat.S_IFBLK, os.makedev(7, another))
    with pytest.raises(UnexpectedDevice) as caught:
        Loop(number, dir_fd=directory)
    assert caught.value.expected_minor == number
    assert caught.value.rdev == os.makedev(7, another)
    assert stat.S_ISBLK(caught.value.mode)
    assert isinstance(caught.value, LoopdevError)


def test_no_node(directory):
    with pytest.raises(NoSuchDeviceError) as caught:
        Loop(1, dir_fd=directory)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "loop1")


def test_open_while_it_is_being_detached(bound):
    """From Linux 6.11 on LOOP_CLR_FD leaves the end to the last close, and lets nobody in."""
    if os.path.exists("/run/udev/control"):
        pytest.skip("udev may have the device open, too")
    bound.clear_fd()
    if not is_bound(bound):
        pytest.skip("this kernel detaches at once")
    with pytest.raises(NoSuchDeviceError) as caught:
        Loop(bound.minor)
    assert caught.value.errno == errno.ENXIO


def test_on_close_is_called_before_the_descriptor_is_closed(number):
    loop, seen = Loop(number), []
    fd = loop.fd

    def on_close(closing):
        seen.append((closing, closing.fd, os.fstat(closing.fd).st_rdev))
        closing.close()
        seen.append(os.fstat(closing.fileno()).st_rdev)

    loop.on_close = on_close
    loop.close()
    loop.close()
    assert seen == [(loop, fd, loop.rdev), loop.rdev]
    assert loop.fd == -1


def test_on_close_that_raises_leaves_it_closed(number):
    loop = Loop(number)
    fd, calls = loop.fd, []

    def on_close(closing):
        calls.append(closing)
        raise KeyError("mine")

    loop.on_close = on_close
    with pytest.raises(KeyError, match="mine"):
        loop.close()
    assert loop.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    loop.close()
    assert calls == [loop]


def test_close_twice_closes_no_other_descriptor(number):
    loop = Loop(number)
    fd = loop.fd
    loop.close()
    reused = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert reused == fd
        loop.close()
        os.fstat(reused)
    finally:
        os.close(reused)


def test_context_manager(number):
    with pytest.raises(KeyError), Loop(number) as loop:
        assert loop.fd >= 0
        raise KeyError
    assert loop.fd == -1


@pytest.mark.parametrize(
    "call",
    [
        lambda loop, fd: loop.fileno(),
        lambda loop, fd: loop.flock(fcntl.LOCK_EX),
        lambda loop, fd: loop.flush_buf(),
        lambda loop, fd: loop.set_fd(fd),
        lambda loop, fd: loop.clear_fd(),
        lambda loop, fd: loop.clear_fd_wait(fd, 1),
        lambda loop, fd: loop.change_fd(fd),
        lambda loop, fd: loop.is_bound_to(fd),
        lambda loop, fd: loop.is_bound_to_inode(os.fstat(fd)),
        lambda loop, fd: loop.get_status(),
        lambda loop, fd: loop.set_status(offset=512),
        lambda loop, fd: loop.configure(fd),
        lambda loop, fd: loop.set_capacity(),
        lambda loop, fd: loop.set_direct_io(),
        lambda loop, fd: loop.set_block_size(512),
    ],
)
def test_closed(number, backing, call):
    loop = Loop(number)
    loop.close()
    with pytest.raises(ClosedError) as caught:
        call(loop, backing)
    assert isinstance(caught.value, (RuntimeError, LoopdevError))
    assert str(caught.value) == f"/dev/loop{number} is closed"
    assert not oracle.is_bound(number)


# Locks and caches.


def test_flock(loop):
    loop.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
    with Loop(loop.minor) as second:
        with pytest.raises(BlockingIOError):
            second.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(BlockingIOError):
            second.flock(fcntl.LOCK_SH | fcntl.LOCK_NB)
        loop.flock(fcntl.LOCK_UN)
        second.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_flush_buf_drops_the_cache(bound, backing, sector_size):
    assert os.pread(bound.fd, sector_size, 0) == counting_bytes(0, sector_size)
    os.pwrite(backing, b"x" * sector_size, 0)
    # Still what was cached, or this test shows nothing.
    assert os.pread(bound.fd, sector_size, 0) == counting_bytes(0, sector_size)
    bound.flush_buf()
    assert os.pread(bound.fd, sector_size, 0) == b"x" * sector_size


def test_flush_buf_writes_out(bound, counting_file, sector_size):
    os.pwrite(bound.fd, b"x" * sector_size, 0)
    bound.flush_buf()
    assert counting_file.read_bytes()[:sector_size] == b"x" * sector_size


# set_fd and clear_fd.


def test_set_fd_and_clear_fd(loop, backing, counting_file):
    loop.set_fd(backing)
    assert oracle.sysfs(loop.minor, "loop/backing_file") == str(counting_file)
    assert read_all(loop) == counting_bytes(0, 128 << 10)
    loop.clear_fd()
    loop.close()
    assert not is_bound(loop)


def test_set_fd_on_a_bound_device(bound, other):
    with pytest.raises(DeviceBusyError) as caught:
        bound.set_fd(other)
    assert (caught.value.errno, caught.value.request) == (errno.EBUSY, "LOOP_SET_FD")


@pytest.mark.parametrize("fd", [-1, 1 << 20])
def test_set_fd_of_no_file(loop, fd):
    with pytest.raises(KernelError) as caught:
        loop.set_fd(fd)
    assert caught.value.errno == errno.EBADF
    assert not is_bound(loop)


def test_clear_fd_on_an_unbound_device(loop):
    with pytest.raises(NotBoundError) as caught:
        loop.clear_fd()
    assert caught.value.errno == errno.ENXIO


def test_clear_fd_loses_nothing_that_was_written(bound, counting_file, sector_size):
    os.pwrite(bound.fd, b"x" * sector_size, 2 * sector_size)
    bound.clear_fd()
    bound.close()
    assert not is_bound(bound)
    data = counting_file.read_bytes()
    assert data[2 * sector_size : 3 * sector_size] == b"x" * sector_size
    assert data[3 * sector_size :] == counting_bytes(3 * sector_size, len(data) - 3 * sector_size)


def test_clear_fd_twice(bound, backing):
    """From Linux 6.11 on the second meets a device in rundown, where fsync gives EIO."""
    bound.clear_fd()
    with pytest.raises(NotBoundError):
        bound.clear_fd()


def test_clear_fd_with_another_user(bound, backing):
    with Loop(bound.minor) as user:
        bound.clear_fd()
        assert user.is_bound_to(backing)
        assert oracle.sysfs(bound.minor, "loop/autoclear") == "1"
        bound.close()
        assert is_bound(bound)
    assert not is_bound(bound)


# clear_fd_wait.


def test_clear_fd_wait(bound, backing, counting_file, sector_size):
    os.pwrite(bound.fd, b"x" * sector_size, 0)
    fd, rdev = bound.fd, bound.rdev
    bound.clear_fd_wait(backing, timeout=10)
    # The object is still open, the file free all the same.
    assert not is_bound(bound)
    assert bound.path not in oracle.run("losetup", "--list", "--noheadings", "-O", "NAME").split()
    assert bound.fd == fd
    assert os.fstat(fd).st_rdev == rdev
    assert not os.get_inheritable(fd)
    assert counting_file.read_bytes()[:sector_size] == b"x" * sector_size
    # And it can be used on.
    bound.configure(backing, blocksize=sector_size)
    assert oracle.sysfs(bound.minor, "queue/logical_block_size") == str(sector_size)


def test_clear_fd_wait_on_an_unbound_device(loop, backing):
    fd = loop.fd
    loop.clear_fd_wait(backing, timeout=0)
    assert loop.fd == fd


def test_clear_fd_wait_after_clear_fd(bound, backing):
    """From Linux 6.11 on the device says that it is unbound, and holds the file all the same."""
    bound.clear_fd()
    bound.clear_fd_wait(backing, timeout=10)
    assert not is_bound(bound)
    assert os.fstat(bound.fd).st_rdev == bound.rdev


def test_clear_fd_wait_while_another_uses_the_device(bound, backing, sector_size):
    with Loop(bound.minor) as user:
        with pytest.raises(WaitTimeoutError) as caught:
            bound.clear_fd_wait(backing, timeout=0.05, wait=0.01)
        assert isinstance(caught.value, TimeoutError)
        assert caught.value.path == bound.path
        assert is_bound(bound)
        assert os.pread(user.fd, sector_size, 0) == counting_bytes(0, sector_size)
    bound.clear_fd_wait(backing, timeout=10, wait=0.01)
    assert not is_bound(bound)


def test_clear_fd_wait_waits(bound, backing):
    """For a user that goes away in the meantime: another process, that a timer ends."""
    pid = os.fork()
    if pid == 0:
        # No more than system calls: this is a copy of pytest.
        fd = os.open(bound.path, os.O_RDONLY)
        os.close(bound.fd)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        while fd:
            signal.pause()
        os._exit(0)
    try:
        # It shares our description until it has closed it: then it has opened its own.
        oracle.wait_until(lambda: not shares(pid, bound.fd))
        bound.clear_fd_wait(backing, timeout=10, wait=0.01)
        assert not is_bound(bound)
    finally:
        os.waitpid(pid, 0)


def shares(pid: int, fd: int) -> bool:
    return os.path.lexists(f"/proc/{pid}/fd/{fd}") and os.path.exists(f"/proc/{pid}/exe")


def test_clear_fd_wait_gives_up_a_lock(bound, backing):
    bound.flock(fcntl.LOCK_EX)
    bound.clear_fd_wait(backing, timeout=10)
    assert not is_bound(bound)
    with Loop(bound.minor) as second:
        second.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_clear_fd_wait_in_a_directory(number, directory, backing):
    make_node(directory, number, stat.S_IFBLK, os.makedev(7, number))
    with Loop(number, dir_fd=directory) as loop:
        loop.configure(backing)
        loop.clear_fd_wait(backing, timeout=10)
        assert not is_bound(loop)
        assert os.fstat(loop.fd).st_rdev == loop.rdev


def test_clear_fd_wait_when_the_node_is_gone(number, directory, backing):
    make_node(directory, number, stat.S_IFBLK, os.makedev(7, number))
    with Loop(number, dir_fd=directory) as loop:
        loop.configure(backing)
        os.unlink(loop.devname, dir_fd=directory)
        loop.clear_fd_wait(backing, timeout=10)
        assert not is_bound(loop)
        assert loop.fd == -1


def test_clear_fd_wait_when_the_node_is_another(number, directory, backing):
    """It may not go on with what is no loop device under its descriptor."""
    make_node(directory, number, stat.S_IFBLK, os.makedev(7, number))
    with Loop(number, dir_fd=directory) as loop:
        loop.configure(backing)
        os.unlink(loop.devname, dir_fd=directory)
        make_node(directory, number, stat.S_IFREG)
        with pytest.raises(UnexpectedDevice):
            loop.clear_fd_wait(backing, timeout=10)
        assert not is_bound(loop)
        assert loop.fd == -1


@pytest.mark.parametrize("autoclear", [False, True])
def test_clear_fd_wait_leaves_a_device_with_another_file(loop, backing, other, autoclear):
    loop.configure(other, autoclear=autoclear)
    loop.flock(fcntl.LOCK_EX)
    loop.clear_fd_wait(backing, timeout=1)
    assert is_bound(loop)
    assert loop.is_bound_to(other)
    with Loop(loop.minor) as second, pytest.raises(BlockingIOError):
        second.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)


# change_fd.


def test_change_fd(loop, read_only_backing, other, sector_size):
    loop.configure(read_only_backing, blocksize=sector_size)
    assert os.pread(loop.fd, sector_size, 0) == counting_bytes(0, sector_size)
    loop.change_fd(other)
    assert oracle.sysfs(loop.minor, "loop/backing_file").endswith("/other.img")
    assert os.pread(loop.fd, sector_size, 0) == b"other..." * (sector_size // 8)


def test_change_fd_on_a_writable_device(bound, other, counting_file):
    with pytest.raises(KernelError) as caught:
        bound.change_fd(other)
    assert (caught.value.errno, caught.value.request) == (errno.EINVAL, "LOOP_CHANGE_FD")
    assert oracle.sysfs(bound.minor, "loop/backing_file") == str(counting_file)


def test_change_fd_to_another_size(loop, read_only_backing, other):
    loop.configure(read_only_backing)
    os.ftruncate(other, 64 << 10)
    with pytest.raises(KernelError) as caught:
        loop.change_fd(other)
    assert caught.value.errno == errno.EINVAL


def test_change_fd_on_an_unbound_device(loop, other):
    with pytest.raises(NotBoundError):
        loop.change_fd(other)


# What it is bound to.


def test_is_bound_to(bound, backing, other, counting_file):
    assert bound.is_bound_to(backing)
    assert bound.is_bound_to_inode(os.stat(counting_file))
    assert not bound.is_bound_to(other)
    assert not bound.is_bound_to_inode(os.fstat(other))


def test_is_bound_to_a_hard_link(bound, counting_file):
    """It is the file that counts, not its name."""
    link = counting_file.with_name("link.img")
    os.link(counting_file, link)
    assert bound.is_bound_to_inode(os.stat(link))
    copy = counting_file.with_name("copy.img")
    copy.write_bytes(counting_file.read_bytes())
    os.replace(copy, counting_file)
    assert not bound.is_bound_to_inode(os.stat(counting_file))
    assert bound.is_bound_to_inode(os.stat(link))


def test_unbound_is_bound_to_nothing(loop, backing, counting_file):
    assert not loop.is_bound_to(backing)
    assert not loop.is_bound_to_inode(os.stat(counting_file))


def test_is_bound_to_needs_a_descriptor(bound):
    with pytest.raises(OSError, match="Bad file descriptor"):
        bound.is_bound_to(1 << 20)


def test_get_status(loop, backing, counting_file, sector_size):
    loop.configure(
        *(backing, 2 * sector_size, 8 * sector_size, sector_size),
        autoclear=True,
        partscan=True,
        loop_ref="a name",
    )
    status, file = loop.get_status(), os.stat(counting_file)
    assert isinstance(status, LoopInfo)
    assert (status.lo_device, status.lo_inode) == (file.st_dev, file.st_ino)
    assert status.lo_number == loop.minor
    assert status.loop_ref == "a name"
    assert (status.lo_encrypt_type, status.lo_encrypt_key_size) == (0, 0)
    seen = oracle.losetup(loop.path)
    assert status.lo_inode == int(seen["back-ino"])
    assert status.lo_offset == int(seen["offset"]) == 2 * sector_size
    assert status.lo_sizelimit == int(seen["sizelimit"]) == 8 * sector_size
    assert status.autoclear is bool(seen["autoclear"]) is True
    assert status.partscan is bool(seen["partscan"]) is True
    assert status.read_only is bool(seen["ro"]) is False
    assert status.direct_io is bool(seen["dio"]) is False


def test_get_status_of_a_file_on_a_device(loop, add_device, backing, sector_size):
    """A loop device over a loop device: lo_rdevice names the lower one."""
    with Loop(add_device()) as upper:
        loop.configure(backing, blocksize=sector_size)
        upper.configure(loop.fd, blocksize=sector_size)
        assert upper.get_status().lo_rdevice & 0xFFFF == loop.rdev & 0xFFFF
        assert read_all(upper) == counting_bytes(0, 128 << 10)
        upper.clear_fd()


def test_get_status_of_an_unbound_device(loop):
    with pytest.raises(NotBoundError) as caught:
        loop.get_status()
    assert (caught.value.errno, caught.value.filename) == (errno.ENXIO, loop.path)
    assert caught.value.request == "LOOP_GET_STATUS64"


# set_status.


def state(loop: Loop) -> dict[str, int]:
    names = ("offset", "sizelimit", "autoclear", "partscan")
    return {name: int(oracle.sysfs(loop.minor, f"loop/{name}")) for name in names}


def test_set_status_leaves_what_it_is_not_given(loop, backing, sector_size):
    before = {
        "offset": sector_size,
        "sizelimit": 4 * sector_size,
        "autoclear": True,
        "partscan": True,
    }
    loop.configure(backing, blocksize=sector_size, loop_ref="mine", **before)
    loop.set_status()
    assert state(loop) == before
    assert loop.get_status().loop_ref == "mine"
    assert oracle.sysfs(loop.minor, "queue/logical_block_size") == str(sector_size)


@pytest.mark.parametrize("name", ["offset", "sizelimit"])
def test_set_status_of_one_value(bound, sector_size, name):
    before = state(bound)
    for value in (3 * sector_size, 0):
        bound.set_status(**{name: value})
        assert state(bound) == before | {name: value}


def test_set_status_moves_the_data(bound, sector_size):
    bound.set_status(offset=3 * sector_size, sizelimit=2 * sector_size)
    assert read_all(bound) == counting_bytes(3 * sector_size, 2 * sector_size)
    bound.set_status(offset=0, sizelimit=0)
    assert read_all(bound) == counting_bytes(0, 128 << 10)


def test_set_status_zero_is_a_value(loop, backing, sector_size):
    place = {"offset": 4 * sector_size, "sizelimit": 2 * sector_size}
    loop.configure(backing, blocksize=sector_size, **place)
    loop.set_status(offset=0)
    assert state(loop) | {"offset": 0, "sizelimit": 2 * sector_size} == state(loop)
    loop.set_status(sizelimit=0)
    assert state(loop)["sizelimit"] == 0


def test_set_status_autoclear_on_and_off(bound):
    bound.set_status(autoclear=True)
    assert state(bound)["autoclear"] == 1
    bound.set_status(offset=0)
    assert state(bound)["autoclear"] == 1
    bound.set_status(autoclear=False)
    assert state(bound)["autoclear"] == 0
    bound.close()
    assert is_bound(bound)


def test_set_status_partscan(bound):
    bound.set_status(partscan=False)
    assert state(bound)["partscan"] == 0
    for value in (True, None, True):
        bound.set_status(partscan=value)
        assert state(bound)["partscan"] == 1


def test_set_status_refuses_to_clear_partscan(loop, backing, sector_size):
    loop.configure(backing, blocksize=sector_size, partscan=True)
    with pytest.raises(InvalidValueError) as caught:
        loop.set_status(partscan=False, autoclear=True)
    assert (caught.value.name, caught.value.value) == ("partscan", False)
    assert (state(loop)["partscan"], state(loop)["autoclear"]) == (1, 0)


@pytest.mark.parametrize("read_only", [False, True])
def test_set_status_refuses_to_change_read_only(loop, backing, sector_size, read_only):
    loop.configure(backing, blocksize=sector_size, read_only=read_only)
    with pytest.raises(InvalidValueError) as caught:
        loop.set_status(read_only=not read_only)
    assert caught.value.name == "read_only"
    # As it is, is fine.
    loop.set_status(read_only=read_only)
    assert oracle.sysfs(loop.minor, "ro") == str(int(read_only))


@pytest.mark.parametrize("name", ["offset", "sizelimit"])
@pytest.mark.parametrize("value", [-1, 1, 513, 1 << 63])
def test_set_status_refuses_what_is_out_of_range(bound, name, value):
    before = state(bound)
    with pytest.raises(InvalidValueError) as caught:
        bound.set_status(**{name: value})
    assert (caught.value.name, caught.value.value) == (name, value)
    assert state(bound) == before


def test_set_status_on_an_unbound_device(loop):
    with pytest.raises(NotBoundError):
        loop.set_status(autoclear=True)


# configure.


def test_configure_without_arguments(loop, backing, counting_file):
    loop.configure(backing)
    assert oracle.sysfs(loop.minor, "loop/backing_file") == str(counting_file)
    assert state(loop) == {"offset": 0, "sizelimit": 0, "autoclear": 0, "partscan": 0}
    assert oracle.sysfs(loop.minor, "ro") == "0"
    assert oracle.sysfs(loop.minor, "loop/dio") == "0"
    assert read_all(loop) == counting_bytes(0, 128 << 10)


def test_configure_with_none(loop, backing, sector_size):
    loop.configure(backing, offset=None, sizelimit=None, blocksize=sector_size)
    assert (state(loop)["offset"], state(loop)["sizelimit"]) == (0, 0)


def test_configure_offset(loop, backing, sector_size):
    loop.configure(backing, offset=3 * sector_size, blocksize=sector_size)
    assert state(loop)["offset"] == 3 * sector_size
    rest = (128 << 10) - 3 * sector_size
    assert read_all(loop) == counting_bytes(3 * sector_size, rest)


def test_configure_sizelimit(loop, backing, sector_size):
    loop.configure(backing, 512, 2 * sector_size, sector_size)
    assert state(loop)["sizelimit"] == 2 * sector_size
    assert read_all(loop) == counting_bytes(512, 2 * sector_size)


def test_configure_writes_at_the_offset(loop, backing, counting_file, sector_size):
    loop.configure(backing, offset=2 * sector_size, blocksize=sector_size)
    os.pwrite(loop.fd, b"x" * sector_size, sector_size)
    os.fsync(loop.fd)
    data = counting_file.read_bytes()
    place = 3 * sector_size
    assert data[:place] == counting_bytes(0, place)
    assert data[place : place + sector_size] == b"x" * sector_size


def test_configure_blocksize(loop, backing, sector_size):
    loop.configure(backing, blocksize=sector_size)
    assert oracle.sysfs(loop.minor, "queue/logical_block_size") == str(sector_size)
    assert oracle.losetup(loop.path)["log-sec"] in (sector_size, str(sector_size))


def test_configure_autoclear(loop, backing, sector_size):
    loop.configure(backing, blocksize=sector_size, autoclear=True)
    assert state(loop)["autoclear"] == 1
    loop.close()
    assert not is_bound(loop)


def test_configure_partscan(loop, backing, sector_size):
    loop.configure(backing, blocksize=sector_size, partscan=True)
    assert state(loop)["partscan"] == 1


def test_configure_read_only(loop, backing, counting_file, sector_size):
    loop.configure(backing, blocksize=sector_size, read_only=True)
    assert oracle.sysfs(loop.minor, "ro") == "1"
    with pytest.raises(PermissionError):
        os.pwrite(loop.fd, b"x" * sector_size, 0)
    assert counting_file.read_bytes() == counting_bytes(0, 128 << 10)


def test_configure_a_read_only_descriptor(loop, read_only_backing):
    loop.configure(read_only_backing)
    assert oracle.sysfs(loop.minor, "ro") == "1"
    assert loop.get_status().read_only


def takes_direct_io(path: Path) -> bool:
    """Ask util-linux, on another device."""
    device = oracle.run("losetup", "--find", "--show", "--direct-io=on", path).strip()
    try:
        return oracle.sysfs(int(device.removeprefix("/dev/loop")), "loop/dio") == "1"
    finally:
        oracle.run("losetup", "--detach", device)


@pytest.fixture
def _direct_io(counting_file):
    if not takes_direct_io(counting_file):
        pytest.skip("the filesystem of the test does not take direct I/O")


@pytest.mark.usefixtures("_direct_io")
def test_configure_direct_io(loop, backing, sector_size):
    loop.configure(backing, blocksize=sector_size, direct_io=True)
    assert oracle.sysfs(loop.minor, "loop/dio") == "1"
    assert loop.get_status().direct_io
    assert read_all(loop) == counting_bytes(0, 128 << 10)


def test_configure_direct_io_where_the_file_cannot(loop, sector_size):
    """The kernel says nothing: the flag has to be read back."""
    fd = os.memfd_create("no-direct-io", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 64 << 10)
        loop.configure(fd, blocksize=sector_size, direct_io=True)
    finally:
        os.close(fd)
    seen = oracle.sysfs(loop.minor, "loop/dio")
    assert loop.get_status().direct_io is (seen == "1")


# loop_ref.


def test_loop_ref_is_the_path(loop, backing, counting_file):
    loop.configure(backing)
    path = os.fsencode(counting_file)
    assert loop.get_status().lo_file_name.rstrip(b"\0") == path[:63]


def test_loop_ref_is_the_text_given(loop, backing):
    loop.configure(backing, loop_ref="disk of alice")
    assert loop.get_status().lo_file_name == b"disk of alice".ljust(64, b"\0")


def test_loop_ref_may_be_empty(loop, backing):
    loop.configure(backing, loop_ref="")
    assert loop.get_status().lo_file_name == bytes(64)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x" * 63, b"x" * 63),
        ("x" * 64, b"x" * 63),
        ("x" * 62 + "é", b"x" * 62),
        (b"\xff\xfe" * 40, (b"\xff\xfe" * 40)[:63]),
        (b"/\xe9t\xe9", b"/\xe9t\xe9"),
    ],
)
def test_loop_ref_is_cut(loop, backing, text, kept):
    loop.configure(backing, loop_ref=text)
    assert loop.get_status().lo_file_name == kept.ljust(64, b"\0")
    assert os.fsencode(loop.get_status().loop_ref) == kept


def test_loop_ref_of_a_path_that_is_no_utf8(loop, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff\xe9.img"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        os.ftruncate(fd, 64 << 10)
        loop.configure(fd)
    finally:
        os.close(fd)
    assert loop.get_status().lo_file_name.rstrip(b"\0") == path[:63]


# What configure() refuses.


@pytest.fixture
def uevents():
    """A socket that hears what the kernel tells udev."""
    family = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15)  # NETLINK_KOBJECT_UEVENT
    with family as events:
        try:
            events.bind((0, 1))
        except OSError as exc:
            pytest.skip(f"cannot hear uevents: {exc}")
        events.settimeout(5)
        yield events


def wait_for_change(events: socket.socket, number: int) -> None:
    expected = f"change@/devices/virtual/block/loop{number}".encode()
    while events.recv(8192).split(b"\0")[0] != expected:
        pass


BAD = [
    *({"blocksize": size} for size in (1, 3, 256, 511, 1000, 1536, 131072, -1, -512)),
    *({name: value} for name in ("offset", "sizelimit") for value in (-1, 1, 513, 1 << 63)),
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_configure_checks_before_it_asks(loop, backing, uevents, bad):
    """A block size that the kernel refuses would silence the device's uevents."""
    with pytest.raises(InvalidValueError) as caught:
        loop.configure(backing, **bad)
    assert caught.value.value == next(iter(bad.values()))
    assert caught.value.name == next(iter(bad)).replace("blocksize", "sector_size")
    assert isinstance(caught.value, ValueError)
    assert not is_bound(loop)
    loop.configure(backing)
    wait_for_change(uevents, loop.minor)
    assert read_all(loop) == counting_bytes(0, 128 << 10)


@pytest.mark.parametrize("fd", [-1, 1 << 20])
def test_configure_with_no_file(loop, fd):
    with pytest.raises(KernelError) as caught:
        loop.configure(fd)
    assert (caught.value.errno, caught.value.request) == (errno.EBADF, "LOOP_CONFIGURE")
    assert not is_bound(loop)


def test_configure_with_a_pipe(loop):
    ends = os.pipe()
    try:
        with pytest.raises(KernelError) as caught:
            loop.configure(ends[0])
    finally:
        for end in ends:
            os.close(end)
    assert caught.value.errno == errno.EINVAL
    assert not is_bound(loop)


def test_configure_with_itself(loop):
    with pytest.raises(KernelError) as caught:
        loop.configure(loop.fd)
    assert caught.value.errno == errno.EBADF


def test_configure_a_bound_device(bound, other, counting_file):
    with pytest.raises(DeviceBusyError):
        bound.configure(other)
    assert oracle.sysfs(bound.minor, "loop/backing_file") == str(counting_file)


def test_configure_a_claimed_device(loop, backing):
    claim = os.open(loop.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        with pytest.raises(DeviceBusyError) as caught:
            loop.configure(backing)
    finally:
        os.close(claim)
    assert caught.value.errno == errno.EBUSY
    assert not is_bound(loop)


# Sectors larger than a page.


def test_sectors_over_a_page(loop, backing):
    largest = probe.max_block_size()
    assert largest >= PAGE
    if largest == PAGE:
        with pytest.raises(InvalidValueError, match=f"at most {PAGE}"):
            loop.configure(backing, blocksize=2 * PAGE)
        assert not is_bound(loop)
    else:
        loop.configure(backing, blocksize=2 * PAGE)
        assert oracle.sysfs(loop.minor, "queue/logical_block_size") == str(2 * PAGE)
        assert read_all(loop) == counting_bytes(0, 128 << 10)


def test_largest_sectors_are_taken(loop, backing):
    """The probe and the device agree."""
    largest = probe.max_block_size()
    loop.configure(backing, blocksize=largest)
    assert oracle.sysfs(loop.minor, "queue/logical_block_size") == str(largest)


def test_the_probe_for_the_sector_size_leaves_nothing(monkeypatch):
    done = []

    def record(fd, request, path, arg=0):
        result = real(fd, request, path, arg)
        done.append((request, arg, result))
        return result

    real = probe.ioctl
    monkeypatch.setattr(probe, "ioctl", record)
    monkeypatch.setattr(probe, "_answers", {})
    probe.max_block_size()
    probe.max_block_size()
    added = [result for request, arg, result in done if request == ADD]
    assert len(added) == 1
    assert (REMOVE, added[0]) in [(request, arg) for request, arg, _ in done]


def test_the_probe_for_the_sector_size_while_udev_looks(monkeypatch):
    """udev opens each device that is added: the first attempt to remove it meets EBUSY."""
    added, looking = [], []

    def ioctl(fd, request, path, arg=0):
        try:
            result = real(fd, request, path, arg)
        except DeviceBusyError:
            while looking:
                os.close(looking.pop())
            raise
        if request == ADD:
            added.append(result)
            looking.append(os.open(f"/dev/loop{result}", os.O_RDONLY | os.O_CLOEXEC))
        return result

    real = probe.ioctl
    monkeypatch.setattr(probe, "ioctl", ioctl)
    monkeypatch.setattr(probe, "_answers", {})
    try:
        assert probe.max_block_size() >= PAGE
        assert not os.path.exists(f"/sys/block/loop{added[0]}")
    finally:
        for fd in looking:
            os.close(fd)
        for number in added:
            oracle.wait_until(lambda number=number: removed(number))


# Changing a bound device.


def test_set_capacity_after_growth_and_shrink(bound, backing, sector_size):
    for size in (256 << 10, 64 << 10):
        os.ftruncate(backing, size)
        assert int(oracle.sysfs(bound.minor, "size")) * 512 != size
        bound.set_capacity()
        assert int(oracle.sysfs(bound.minor, "size")) * 512 == size


def test_set_capacity_of_an_unbound_device(loop):
    with pytest.raises(NotBoundError):
        loop.set_capacity()


@pytest.mark.usefixtures("_direct_io")
def test_set_direct_io(bound):
    bound.set_direct_io()
    assert oracle.sysfs(bound.minor, "loop/dio") == "1"
    assert bound.get_status().direct_io
    bound.set_direct_io(False)
    assert oracle.sysfs(bound.minor, "loop/dio") == "0"
    assert not bound.get_status().direct_io
    assert read_all(bound) == counting_bytes(0, 128 << 10)


def test_set_direct_io_on_an_unbound_device(loop):
    with pytest.raises(NotBoundError):
        loop.set_direct_io()


def test_set_block_size(bound, sector_size):
    other = 512 + 4096 - sector_size
    bound.set_block_size(other)
    assert oracle.sysfs(bound.minor, "queue/logical_block_size") == str(other)
    assert read_all(bound) == counting_bytes(0, 128 << 10)


@pytest.mark.parametrize("size", [0, -1, 3, 256, 1000, 131072])
def test_set_block_size_checks(bound, sector_size, size):
    with pytest.raises(InvalidValueError) as caught:
        bound.set_block_size(size)
    assert caught.value.value == size
    assert oracle.sysfs(bound.minor, "queue/logical_block_size") == str(sector_size)


# mknod.


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_mknod(loop, directory, mode):
    loop.mknod(directory, mode)
    made = os.stat(loop.devname, dir_fd=directory)
    assert stat.S_ISBLK(made.st_mode)
    assert stat.S_IMODE(made.st_mode) == mode
    major, minor = oracle.sysfs(loop.minor, "dev").split(":")
    assert made.st_rdev == os.makedev(int(major), int(minor))


def test_mknod_is_for_its_owner(loop, directory):
    loop.mknod(directory)
    assert stat.S_IMODE(os.stat(loop.devname, dir_fd=directory).st_mode) == 0o600


def test_mknod_heeds_the_umask(loop, directory):
    old = os.umask(0o027)
    try:
        loop.mknod(directory, 0o666)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(loop.devname, dir_fd=directory).st_mode) == 0o640


def test_mknod_makes_a_node_that_opens(bound, directory, backing):
    bound.mknod(directory)
    with Loop(bound.minor, dir_fd=directory) as second:
        assert second.is_bound_to(backing)


def test_mknod_where_something_is(loop, directory):
    make_node(directory, loop.minor, stat.S_IFREG)
    with pytest.raises(KernelError) as caught:
        loop.mknod(directory)
    assert (caught.value.errno, caught.value.request) == (errno.EEXIST, "mknod")
    assert caught.value.filename == loop.devname
    assert stat.S_ISREG(os.stat(loop.devname, dir_fd=directory).st_mode)
