# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A kernel before 5.8, which has no LOOP_CONFIGURE: seccomp answers in its place.

A child process installs a filter that refuses requests of ioctl() with an errno of choice, and
then does its work; what came of it is read from sysfs here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager

import oracle
import pytest
from conftest import counting_bytes

# The numbers of the system call, and of the architecture in linux/audit.h.
MACHINES = {"x86_64": (16, 0xC000003E), "aarch64": (29, 0xC00000B7)}
SYSCALL = MACHINES.get(platform.machine())

pytestmark = pytest.mark.skipif(SYSCALL is None, reason=f"no filter for {platform.machine()}")

CONFIGURE, SET_DIRECT_IO, SET_STATUS64, SET_BLOCK_SIZE = 0x4C0A, 0x4C08, 0x4C04, 0x4C09
SET_FD, CLR_FD, ADD, REMOVE = 0x4C00, 0x4C01, 0x4C80, 0x4C81
PRELUDES_OWN = 0x4C7F  # by the prelude, to see that the filter leaves all else alone
LEGACY = {CONFIGURE: errno.EINVAL}

# What each child starts with. refuse() is what a C program would do with struct sock_filter.
PRELUDE = """
import ctypes, fcntl, json, os, struct, sys

def refuse(answers, number, architecture):
    LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
    ALLOW, ERRNO = 0x7FFF0000, 0x00050000
    code = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, ALLOW)]
    code += [(LOAD, 0, 0, 0), (EQUAL, 1, 0, number), (RETURN, 0, 0, ALLOW)]
    code += [(LOAD, 0, 0, 24)]  # the lower half of the second argument
    for request, answer in answers.items():
        code += [(EQUAL, 0, 1, int(request)), (RETURN, 0, 0, ERRNO | answer)]
    code += [(RETURN, 0, 0, ALLOW)]
    raw = ctypes.create_string_buffer(b"".join(struct.pack("@HBBI", *line) for line in code))
    program = struct.pack("@HxxxxxxP", len(code), ctypes.addressof(raw))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for call in ((38, 1, 0, 0, 0), (22, 2, ctypes.c_char_p(program))):
        if prctl(*call):
            raise OSError(ctypes.get_errno(), "prctl")

def errno_of(request, *arg):
    try:
        fcntl.ioctl(control, request, *arg)
    except OSError as exc:
        return exc.errno

def say(**facts):
    print(json.dumps(facts), flush=True)
    sys.stdin.readline()

task = json.loads(sys.argv[1])
control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
if task["answers"]:
    refuse(task["answers"], *task["syscall"])
    for request, answer in task["answers"].items():
        assert errno_of(int(request)) == answer, "the filter does not work"
# What it does not know, loop-control answers with ENOSYS: all else is as it was.
assert errno_of(0x4C7F) == 38

import loopdev
from loopdev.kernel import probe
from loopdev.loop import Loop, LoopControl
flags = os.O_RDWR if task.get("writable", True) else os.O_RDONLY
backing = os.open(task["path"], flags | os.O_CLOEXEC) if "path" in task else -1
config = task.get("config", {})
"""

CONFIGURED = """
with Loop(task["number"]) as loop:
    loop.configure(backing, **config)
    say(number=loop.minor, known=probe.has_loop_configure(loop.fd, loop.path))
"""

FOR_FD = """
with LoopControl() as ctl, ctl.loop_for_fd(backing, lock=True, **config) as loop:
    say(number=loop.minor, known=probe.has_loop_configure(loop.fd, loop.path))
"""

ATTACHED = """
with loopdev.attach(task["path"], **config) as device:
    say(number=device.number, known=probe._answers.get("configure", 1))
"""

# Say what it raised, and whether the device is free once it is closed.
FAILS = """
try:
    with Loop(task["number"]) as loop:
        loop.configure(backing, **config)
except loopdev.KernelError as exc:
    say(errno=exc.errno, request=exc.request)
else:
    say(errno=0)
"""

ATTACH_FAILS = """
try:
    loopdev.attach(task["path"], number=task["number"], **config).detach()
except loopdev.KernelError as exc:
    say(errno=exc.errno, request=exc.request)
else:
    say(errno=0)
"""


@contextmanager
def child(work, answers=LEGACY, before=(), **task):
    """Run a child up to its say(), and yield what it said; then let it end well."""
    task = {"answers": answers, "syscall": SYSCALL, **task}
    command = [*before, sys.executable, "-c", PRELUDE + work, json.dumps(task)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        said = process.stdout.readline()
        yield json.loads(said) if said else None
    finally:
        _, complaints = process.communicate("\n")
    assert said, complaints
    assert process.returncode == 0, complaints


def control(request: int, number: int) -> None:
    fd = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, request, number)
    finally:
        os.close(fd)


def removed(number: int) -> bool:
    try:
        if oracle.is_bound(number):
            fd = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, CLR_FD)
            finally:
                os.close(fd)
        control(REMOVE, number)
    except OSError as exc:
        if exc.errno not in (errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOENT):
            raise
        return exc.errno in (errno.ENODEV, errno.ENOENT)
    return True


@pytest.fixture
def number():
    """An unbound device, whose number is too high to be given to anybody."""
    number = 4000 + os.getpid() % 1000
    control(ADD, number)
    yield number
    oracle.wait_until(lambda: removed(number))


@pytest.fixture(params=["configure", "loop_for_fd", "attach"])
def bound(request, counting_file):
    """A function that has a child bind the file in one of three ways."""
    way = request.param

    @contextmanager
    def bind(**config):
        writable = config.pop("writable", True)
        task = {"path": str(counting_file), "writable": writable}
        if way == "attach":
            config["sector_size"] = config.pop("blocksize", None)
            config["persist"] = not config.pop("autoclear", False)
            config.setdefault("direct_io", False)
            if not writable:
                config["read_only"] = True
            with child(ATTACHED, config=config, **task) as said:
                assert said is not None
                assert not said["known"]
                yield said["number"]
        elif way == "loop_for_fd":
            with child(FOR_FD, config=config, **task) as said:
                assert said is not None
                assert not said["known"]
                yield said["number"]
        else:
            with child(CONFIGURED, config=config, number=own, **task) as said:
                assert said == {"number": own, "known": False}
                yield own

    own = request.getfixturevalue("number") if way == "configure" else None
    return bind


def let_go(number: int) -> None:
    """Detach what a child left bound on purpose."""
    if oracle.is_bound(number):
        oracle.run("losetup", "--detach", f"/dev/loop{number}")


def preset() -> int:
    with open("/sys/module/loop/parameters/max_loop") as file:
        return int(file.read()) or 8


@pytest.fixture
def tidy():
    """A function to name the devices that were used: those added on demand go away again."""
    before, used = set(os.listdir("/sys/block")), []
    yield used.append
    for number in used:
        if number >= preset() and f"loop{number}" not in before:
            oracle.wait_until(lambda number=number: removed(number))


def contents(number: int) -> bytes:
    with open(f"/dev/loop{number}", "rb") as device:
        return device.read()


def test_all_that_one_request_would_set(bound, tidy, counting_file, sector_size):
    config = {
        "offset": 2 * sector_size,
        "sizelimit": 4 * sector_size,
        "blocksize": sector_size,
        "autoclear": True,
        "loop_ref": "old kernel",
    }
    with bound(**config) as number:
        tidy(number)
        assert oracle.sysfs(number, "loop/backing_file") == str(counting_file)
        assert oracle.sysfs(number, "loop/offset") == str(2 * sector_size)
        assert oracle.sysfs(number, "loop/sizelimit") == str(4 * sector_size)
        assert oracle.sysfs(number, "queue/logical_block_size") == str(sector_size)
        assert oracle.sysfs(number, "loop/autoclear") == "1"
        assert oracle.sysfs(number, "loop/partscan") == "0"
        assert oracle.sysfs(number, "ro") == "0"
        assert contents(number) == counting_bytes(2 * sector_size, 4 * sector_size)
        assert loop_ref(number) == b"old kernel"
    oracle.wait_until(lambda: not oracle.is_bound(number))


def loop_ref(number: int) -> bytes:
    """lo_file_name, by the offset that it has in <linux/loop.h> (test_abi.py)."""
    status = bytearray(232)
    with open(f"/dev/loop{number}", "rb") as device:
        fcntl.ioctl(device, 0x4C05, status)
    return bytes(status[56:120]).rstrip(b"\0")


def test_without_autoclear(bound, tidy, counting_file, sector_size):
    with bound(blocksize=sector_size) as number:
        tidy(number)
        assert oracle.sysfs(number, "loop/autoclear") == "0"
        assert loop_ref(number) == os.fsencode(counting_file)[:63]
    let_go(number)


@pytest.mark.parametrize("writable", [True, False])
def test_read_only(bound, tidy, sector_size, writable):
    """LOOP_SET_FD has no flags: it goes by how the descriptor was opened."""
    config = {"blocksize": sector_size, "autoclear": True, "writable": writable}
    with bound(read_only=True, **config) as number:
        tidy(number)
        assert oracle.sysfs(number, "ro") == "1"
        assert contents(number) == counting_bytes(0, 128 << 10)
        with pytest.raises(OSError), open(f"/dev/loop{number}", "r+b", buffering=0) as device:
            device.write(bytes(sector_size))


def test_partscan(bound, tidy, counting_file, sector_size):
    # With a table, so that attach() finds one: at the sector size of the device.
    os.truncate(counting_file, 4 << 20)
    oracle.make_gpt(counting_file, "label: gpt\nstart=64, size=128\n", sector_size)
    with bound(partscan=True, blocksize=sector_size, autoclear=True) as number:
        tidy(number)
        assert oracle.sysfs(number, "loop/partscan") == "1"
        assert oracle.sysfs(number, "queue/logical_block_size") == str(sector_size)
        for start, size in oracle.partitions(number).values():
            assert (start, size) == (64 * sector_size, 128 * sector_size)


@pytest.fixture
def _direct_io(counting_file):
    """Ask util-linux whether the file can."""
    device = oracle.run("losetup", "--find", "--show", "--direct-io=on", counting_file).strip()
    try:
        can = oracle.sysfs(int(device.removeprefix("/dev/loop")), "loop/dio") == "1"
    finally:
        oracle.run("losetup", "--detach", device)
    if not can:
        pytest.skip("the filesystem of the test does not take direct I/O")


@pytest.mark.usefixtures("_direct_io")
@pytest.mark.parametrize("direct_io", [True, False])
def test_direct_io(bound, tidy, sector_size, direct_io):
    config = {"blocksize": sector_size, "autoclear": True}
    with bound(direct_io=direct_io, **config) as number:
        tidy(number)
        assert oracle.sysfs(number, "loop/dio") == str(int(direct_io))
        assert contents(number) == counting_bytes(0, 128 << 10)


def test_direct_io_where_the_file_cannot(number, counting_file, sector_size):
    """As with LOOP_CONFIGURE the flag stays off, and nothing is said."""
    answers = LEGACY | {SET_DIRECT_IO: errno.EINVAL}
    config = {"direct_io": True, "blocksize": sector_size, "autoclear": True}
    task = {"path": str(counting_file), "number": number, "config": config}
    with child(CONFIGURED, answers, **task) as said:
        assert said == {"number": number, "known": False}
        assert oracle.sysfs(number, "loop/dio") == "0"
        assert oracle.sysfs(number, "loop/backing_file") == str(counting_file)


@pytest.mark.parametrize("work", [FAILS, ATTACH_FAILS], ids=["configure", "attach"])
@pytest.mark.parametrize(
    ("request_code", "name"),
    [
        (SET_BLOCK_SIZE, "LOOP_SET_BLOCK_SIZE"),
        (SET_STATUS64, "LOOP_SET_STATUS64"),
        (SET_DIRECT_IO, "LOOP_SET_DIRECT_IO"),
        (SET_FD, "LOOP_SET_FD"),
    ],
)
def test_a_step_that_fails_leaves_nothing(number, counting_file, work, request_code, name):
    """The file is bound already by then."""
    size = "sector_size" if work is ATTACH_FAILS else "blocksize"
    config = {"offset": 4096, size: 4096, "direct_io": True}
    task = {"path": str(counting_file), "number": number, "config": config}
    with child(work, LEGACY | {request_code: errno.EIO}, **task) as said:
        assert said == {"errno": errno.EIO, "request": name}
        # At once, unless udev has it open just then.
        oracle.wait_until(lambda: not oracle.is_bound(number))
        assert oracle.run("losetup", "--associated", counting_file) == ""


PIPE = (
    """
backing = os.pipe()[0]
"""
    + FAILS
)

UNBOUND = (
    """
lower = Loop(task["number"])
backing = lower.fd
task["number"] = task["upper"]
"""
    + FAILS
)


@pytest.mark.parametrize("answers", [LEGACY, {}], ids=["old", "new"])
def test_a_pipe_is_no_file(number, answers):
    with child(PIPE, answers, number=number) as said:
        step = "LOOP_SET_FD" if answers else "LOOP_CONFIGURE"
        assert said == {"errno": errno.EINVAL, "request": step}
        assert not oracle.is_bound(number)


def requests_of(tmp_path, work, **task) -> list[int]:
    """Run a child under strace, without a filter; return the requests that it made of a device."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    log = tmp_path / "strace"
    before = ["strace", "-f", "-X", "raw", "-e", "trace=ioctl", "-o", str(log)]
    with child(work, {}, before, **task) as said:
        if said is None:
            pytest.skip("strace cannot trace here")
    numbers = [int(found, 16) for found in re.findall(r"ioctl\(\w+, (0x\w+)", log.read_text())]
    return [request for request in numbers if SET_FD <= request < PRELUDES_OWN]


def test_the_trace_shows_the_requests(number, counting_file, tmp_path):
    """Or what it does not show below would mean nothing."""
    config = {"autoclear": True}
    seen = requests_of(tmp_path, FAILS, number=number, path=str(counting_file), config=config)
    assert seen == [CONFIGURE]


def test_einval_is_not_taken_for_an_old_kernel(number, tmp_path):
    """A pipe is a bad argument, however the request is spelled."""
    # The second is the probe, which tells what the EINVAL of the first meant.
    assert requests_of(tmp_path, PIPE, number=number) == [CONFIGURE, CONFIGURE]


def test_an_unbound_device_is_no_file(number, tmp_path):
    upper = number + 1000
    control(ADD, upper)
    try:
        with child(UNBOUND, {}, number=number, upper=upper) as said:
            assert said == {"errno": errno.EINVAL, "request": "LOOP_CONFIGURE"}
        seen = requests_of(tmp_path, UNBOUND, number=number, upper=upper)
        assert seen == [CONFIGURE, CONFIGURE]
        assert not oracle.is_bound(upper)
    finally:
        oracle.wait_until(lambda: removed(upper))
