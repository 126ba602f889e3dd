# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""loopdev.loop.LoopControl: adding, removing, and the way to a bound device."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

import oracle
import pytest
from conftest import counting_bytes

from loopdev import (
    ClosedError,
    DeviceBusyError,
    InvalidValueError,
    KernelError,
    LoopdevError,
    NoFreeDeviceError,
    NoSuchDeviceError,
)
from loopdev import _control as control_module
from loopdev.loop import Loop, LoopControl

REMOVE = 0x4C81  # LOOP_CTL_REMOVE
WORKERS = 8


def own_number() -> int:
    """A number that the kernel gives to nobody, since it gives the lowest."""
    return 4000 + os.getpid() % 1000


def exists(number: int) -> bool:
    return os.path.exists(f"/sys/block/loop{number}")


def removed(number: int) -> bool:
    """Remove an unbound device, if nobody is just looking at it."""
    fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, REMOVE, number)
    except OSError as exc:
        if exc.errno not in (errno.EBUSY, errno.ENODEV):
            raise
        # Bound: another program was given it in the meantime, and removes it or not.
        return exc.errno == errno.ENODEV or oracle.is_bound(number)
    finally:
        os.close(fd)
    return True


def preset() -> int:
    """How many devices are there in any case."""
    with open("/sys/module/loop/parameters/max_loop") as file:
        return int(file.read()) or 8


@pytest.fixture
def control():
    with LoopControl() as control:
        yield control


@pytest.fixture
def bring():
    """A function to say which numbers were used: those added on demand go away again."""
    before, used = set(os.listdir("/sys/block")), set()
    yield used.add
    for number in used:
        if number >= preset() and f"loop{number}" not in before:
            oracle.wait_until(lambda number=number: removed(number))


@pytest.fixture
def number(control, bring):
    """An unbound device of our own."""
    bring(own_number())
    return control.add(own_number())


@pytest.fixture
def backing(counting_file):
    fd = os.open(counting_file, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@pytest.fixture
def directory(tmp_path):
    """A descriptor of a directory that stands in for /dev, with no more than loop-control."""
    place = tmp_path / "dev"
    place.mkdir()
    os.mknod(place / "loop-control", stat.S_IFCHR | 0o600, os.stat("/dev/loop-control").st_rdev)
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    yield fd
    os.close(fd)


@contextmanager
def allocated(bring, control, fd, **config):
    """A device from loop_for_fd(), detached at the end."""
    with control.loop_for_fd(fd, autoclear=True, **config) as loop:
        bring(loop.minor)
        yield loop


# Adding and removing.


def test_add_any(control, bring):
    number = control.add()
    bring(number)
    assert number >= 0
    assert exists(number)
    assert stat.S_ISBLK(os.stat(f"/dev/loop{number}").st_mode)


def test_add_and_remove_a_number(control, bring):
    number = own_number()
    bring(number)
    assert control.add(number) == number
    assert exists(number)
    control.remove(number)
    assert not exists(number)


def test_add_what_is_there(control, number):
    with pytest.raises(KernelError) as caught:
        control.add(number)
    assert (caught.value.errno, caught.value.request) == (errno.EEXIST, "LOOP_CTL_ADD")
    assert caught.value.filename == "/dev/loop-control"


@pytest.mark.parametrize("number", [-2, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32])
def test_add_what_is_no_number(control, number, bring):
    """The kernel takes any negative number for -1, and Python no more than 31 bits."""
    with pytest.raises(LoopdevError):
        bring(control.add(number))


def test_remove_a_bound_device(control, number, backing):
    with Loop(number) as loop:
        loop.configure(backing, autoclear=True)
        with pytest.raises(DeviceBusyError) as caught:
            control.remove(number)
        assert (caught.value.errno, caught.value.request) == (errno.EBUSY, "LOOP_CTL_REMOVE")
        assert oracle.is_bound(number)


def test_remove_an_open_device(control, number):
    with Loop(number), pytest.raises(DeviceBusyError):
        control.remove(number)
    assert exists(number)


def test_remove_what_is_not_there(control):
    number = own_number()
    assert not exists(number)
    with pytest.raises(NoSuchDeviceError) as caught:
        control.remove(number)
    assert caught.value.errno == errno.ENODEV


@pytest.mark.parametrize("number", [-1, -5, 1 << 31, 1 << 32])
def test_remove_what_is_no_number(control, number):
    with pytest.raises(InvalidValueError) as caught:
        control.remove(number)
    assert (caught.value.name, caught.value.value) == ("minor", number)


def test_get_unbound(control, bring):
    seen = []

    def names_an_unbound_device():
        seen.append(control.get_unbound())
        # Somebody else may have taken it already.
        return exists(seen[-1]) and not oracle.is_bound(seen[-1])

    oracle.wait_until(names_an_unbound_device)
    for number in seen:
        bring(number)


# Opening and closing.


def test_fileno(control):
    rdev = os.stat("/dev/loop-control").st_rdev
    assert os.fstat(control.fileno()).st_rdev == rdev
    assert not os.get_inheritable(control.fileno())


def test_close_twice():
    control = LoopControl()
    fd = control.fileno()
    control.close()
    reused = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert reused == fd
        control.close()
        os.fstat(reused)
    finally:
        os.close(reused)


@pytest.mark.parametrize(
    "call",
    [
        lambda control, fd: control.fileno(),
        lambda control, fd: control.add(),
        lambda control, fd: control.add(own_number()),
        lambda control, fd: control.remove(own_number()),
        lambda control, fd: control.get_unbound(),
        lambda control, fd: control.loop_for_fd(fd),
        lambda control, fd: control.loop_for_fd(fd, setup=lambda loop: pytest.fail("opened")),
    ],
)
def test_closed(backing, call):
    with LoopControl() as control:
        pass
    with pytest.raises(ClosedError) as caught:
        call(control, backing)
    assert isinstance(caught.value, RuntimeError)
    assert str(caught.value) == "/dev/loop-control is closed"


def test_no_loop_control(directory):
    os.unlink("loop-control", dir_fd=directory)
    with pytest.raises(NoSuchDeviceError) as caught:
        LoopControl(directory)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "loop-control")


# In a directory of the caller's.


def test_directory_without_nodes(directory, backing, bring):
    """As in a container with a /dev of its own: nodes are made when they are needed."""
    with LoopControl(directory) as control, allocated(bring, control, backing) as loop:
        assert loop.path == f"loop{loop.minor}"
        made = os.stat(loop.path, dir_fd=directory)
        assert stat.S_ISBLK(made.st_mode)
        assert made.st_rdev == os.fstat(loop.fd).st_rdev == os.makedev(7, loop.minor)
        assert oracle.is_bound(loop.minor)
        assert os.pread(loop.fd, 512, 0) == counting_bytes(0, 512)


def test_directory_with_nodes(directory, backing, bring):
    with LoopControl(directory) as control:
        for number in range(control.get_unbound() + 4):
            rdev = os.makedev(7, number)
            os.mknod(f"loop{number}", stat.S_IFBLK | 0o640, rdev, dir_fd=directory)
        with allocated(bring, control, backing) as loop:
            assert oracle.is_bound(loop.minor)


def test_directory_with_a_wrong_node(directory, backing, control):
    """Nothing is bound that is not what its name says."""
    for number in range(64):
        os.mknod(f"loop{number}", stat.S_IFREG | 0o600, dir_fd=directory)
    with LoopControl(directory) as control, pytest.raises(LoopdevError, match="not a loop device"):
        control.loop_for_fd(backing)


# loop_for_fd.


def test_loop_for_fd(control, backing, bring, counting_file, sector_size):
    config = {"offset": 2 * sector_size, "sizelimit": 4 * sector_size, "blocksize": sector_size}
    with allocated(bring, control, backing, **config) as loop:
        assert oracle.sysfs(loop.minor, "loop/backing_file") == str(counting_file)
        assert oracle.sysfs(loop.minor, "queue/logical_block_size") == str(sector_size)
        assert oracle.sysfs(loop.minor, "loop/autoclear") == "1"
        expected = counting_bytes(2 * sector_size, 4 * sector_size)
        assert os.pread(loop.fd, 1 << 20, 0) == expected


def test_loop_for_fd_without_autoclear(control, backing, bring, sector_size):
    with control.loop_for_fd(backing, blocksize=sector_size) as loop:
        bring(loop.minor)
    try:
        assert oracle.is_bound(loop.minor)
    finally:
        oracle.run("losetup", "--detach", f"/dev/loop{loop.minor}")


def test_two_devices_for_one_file(control, backing, bring):
    with allocated(bring, control, backing) as one, allocated(bring, control, backing) as two:
        assert one.minor != two.minor


@pytest.mark.parametrize("fd", [-1, -100])
def test_negative_descriptor(control, fd):
    with pytest.raises(ValueError, match="fd="):
        control.loop_for_fd(fd, setup=lambda loop: pytest.fail("opened"))


def tried_by(control, fd, **config):
    """Call loop_for_fd(), which must fail; return the devices tried, now unbound, and the error."""
    tried = []
    with pytest.raises((LoopdevError, TypeError, AttributeError)) as caught:
        control.loop_for_fd(fd, setup=tried.append, **config).close()
    for loop in tried:
        assert loop.fd == -1
    return tried, caught.value


def bound_to(path) -> list[str]:
    out = oracle.run("losetup", "--associated", path, "--noheadings", "--output", "NAME")
    return out.split()


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"offset": 1}, InvalidValueError),
        ({"blocksize": 1000}, InvalidValueError),
        ({"sizelimit": -1}, InvalidValueError),
        ({"no_such_argument": 1}, TypeError),
        ({"loop_ref": 5}, (TypeError, AttributeError)),
    ],
    ids=str,
)
def test_bad_config_leaves_nothing_bound(control, backing, counting_file, bring, config, error):
    tried, caught = tried_by(control, backing, **config)
    for loop in tried:
        bring(loop.minor)
    assert isinstance(caught, error)
    assert len(tried) == 1
    assert bound_to(counting_file) == []


def test_closed_descriptor(control):
    fd = os.dup(control.fileno())
    os.close(fd)
    tried, caught = tried_by(control, fd)
    assert isinstance(caught, KernelError)
    assert (caught.errno, len(tried)) == (errno.EBADF, 0)


def test_a_directory_is_no_file(control, bring, tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        tried, caught = tried_by(control, fd)
    finally:
        os.close(fd)
    bring(tried[0].minor)
    assert (caught.errno, len(tried)) == (errno.EINVAL, 1)


def test_setup_comes_before_all_else(control, backing, bring, counting_file):
    """It may arrange a lock, or a node, before the device is anything."""
    seen = []

    def setup(loop):
        assert os.fstat(loop.fd).st_rdev == loop.rdev
        # Not locked yet.
        with Loop(loop.minor) as second:
            second.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        seen.append((loop, bound_to(counting_file)))

    with allocated(bring, control, backing, setup=setup, lock=True) as loop:
        assert seen[-1][0] is loop
        assert all(files == [] for _, files in seen)
        assert len(bound_to(counting_file)) == 1


def test_setup_is_called_for_each_device_tried(control, backing, bring):
    tried = []
    with (
        held_by_another("O_EXCL") as held,
        allocated(bring, control, backing, setup=tried.append) as loop,
    ):
        bring(held)
        assert tried[-1] is loop
        assert all(lost.fd == -1 for lost in tried[:-1])
        assert loop.minor != held


class Odd(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, Odd])
def test_setup_that_raises_leaves_nothing(control, backing, bring, counting_file, error):
    seen, closed = [], []

    def setup(loop):
        seen.append(loop)
        loop.on_close = closed.append
        raise error("mine")

    with pytest.raises(error, match="mine"):
        control.loop_for_fd(backing, setup=setup, lock=True)
    assert len(seen) == 1
    assert closed == seen
    assert seen[0].fd == -1
    bring(seen[0].minor)
    assert bound_to(counting_file) == []


def test_lock_is_held_until_close(control, backing, bring):
    with allocated(bring, control, backing, lock=True) as loop, Loop(loop.minor) as second:
        for op in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            with pytest.raises(BlockingIOError):
                second.flock(op | fcntl.LOCK_NB)
        loop.close()
        second.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_lock_unless_asked(control, backing, bring):
    with allocated(bring, control, backing) as loop, Loop(loop.minor) as second:
        second.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)


HOLD = """
import fcntl, os, sys
control = os.open("/dev/loop-control", os.O_RDWR)
number = fcntl.ioctl(control, 0x4C82)
fd = os.open(f"/dev/loop{number}", os.O_RDWR | getattr(os, sys.argv[1]))
if sys.argv[1] != "O_EXCL":
    fcntl.flock(fd, fcntl.LOCK_EX)
print(number, flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another(how):
    """Have another process hold the device that the kernel names next; yield its number."""
    command = [sys.executable, "-c", HOLD, how]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield int(process.stdout.readline())
        finally:
            process.stdin.close()
            process.wait()


@pytest.mark.parametrize(("how", "lock"), [("O_RDWR", True), ("O_EXCL", False), ("O_EXCL", True)])
def test_device_that_another_holds_is_passed_over(control, backing, bring, how, lock):
    with held_by_another(how) as held:
        bring(held)
        with allocated(bring, control, backing, lock=lock) as loop:
            assert loop.minor != held
            assert oracle.is_bound(loop.minor)
            assert os.pread(loop.fd, 512, 0) == counting_bytes(0, 512)


def test_several_devices_that_others_hold_are_passed_over(control, backing, bring):
    """All that exist and are free: it adds one."""
    held = []
    try:
        for place in sorted(os.listdir("/sys/block")):
            if place.startswith("loop") and not oracle.is_bound(int(place[4:])):
                fd = os.open(f"/dev/{place}", os.O_RDONLY | os.O_CLOEXEC)
                held.append(fd)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        numbers = {os.minor(os.fstat(fd).st_rdev) for fd in held}
        with allocated(bring, control, backing, lock=True) as loop:
            assert loop.minor not in numbers
            assert oracle.is_bound(loop.minor)
    except (BlockingIOError, OSError) as exc:
        if isinstance(exc, LoopdevError):
            raise
        pytest.skip(f"others are at work: {exc}")
    finally:
        for fd in held:
            os.close(fd)


def test_no_device_in_time(control, backing, bring, monkeypatch):
    """Where every device there is has just been taken by somebody else."""

    def configure(loop, fd, **config):
        raise DeviceBusyError(errno.EBUSY, loop.path, "LOOP_CONFIGURE")

    tried = []
    monkeypatch.setattr(Loop, "configure", configure)
    monkeypatch.setattr(control_module, "ALLOCATE_TIMEOUT", 0.1)
    with pytest.raises(NoFreeDeviceError) as caught:
        control.loop_for_fd(backing, setup=tried.append)
    for loop in tried:
        bring(loop.minor)
        assert loop.fd == -1
    assert caught.value.timeout == 0.1
    assert 1 < caught.value.attempts <= len(tried)


# Many at once.


def test_threads(tmp_path, control, bring, sector_size):
    """Each gets a device of its own, with its own file."""
    barrier = Barrier(WORKERS)

    def work(index):
        path = tmp_path / f"{index}.img"
        path.write_bytes(bytes([index]) * (64 << 10))
        with open(path, "r+b") as file:
            barrier.wait(10)
            return control.loop_for_fd(file.fileno(), autoclear=True, blocksize=sector_size)

    with ThreadPoolExecutor(WORKERS) as pool:
        loops = list(pool.map(work, range(WORKERS)))
    try:
        for loop in loops:
            bring(loop.minor)
        assert len({loop.minor for loop in loops}) == WORKERS
        for index, loop in enumerate(loops):
            assert os.pread(loop.fd, 1 << 20, 0) == bytes([index]) * (64 << 10)
            backing = oracle.sysfs(loop.minor, "loop/backing_file")
            assert backing == str(tmp_path / f"{index}.img")
    finally:
        for loop in loops:
            loop.close()


WORK = """
import sys
from loopdev.loop import LoopControl
with LoopControl() as control, open(sys.argv[1], "r+b") as file:
    print("ready", flush=True)
    sys.stdin.readline()
    with control.loop_for_fd(file.fileno(), autoclear=True, blocksize=int(sys.argv[2])) as loop:
        print(loop.minor, flush=True)
        sys.stdin.readline()
"""


def test_processes(tmp_path, bring, sector_size):
    """Each gets a device of its own, with its own file."""
    processes = []
    try:
        for index in range(WORKERS):
            path = tmp_path / f"{index}.img"
            path.write_bytes(bytes([index]) * (64 << 10))
            command = [sys.executable, "-c", WORK, path, str(sector_size)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            processes.append(subprocess.Popen(command, text=True, **pipes))
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        numbers = [int(process.stdout.readline()) for process in processes]
        for number in numbers:
            bring(number)
        assert len(set(numbers)) == WORKERS
        for index, number in enumerate(numbers):
            backing = oracle.sysfs(number, "loop/backing_file")
            assert backing == str(tmp_path / f"{index}.img")
            size = oracle.sysfs(number, "queue/logical_block_size")
            assert size == str(sector_size)
    finally:
        for process in processes:
            process.communicate()
    assert [process.returncode for process in processes] == [0] * WORKERS
    assert [bound_to(tmp_path / f"{index}.img") for index in range(WORKERS)] == [[]] * WORKERS
