# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What of the loop module needs no device: checks, packing, retries, pauses."""

from __future__ import annotations

import errno
import os
import struct
import types

import pytest

from loopdev import _backoff, _configure
from loopdev._backoff import backoff
from loopdev._configure import LoopConfig, check_extent, check_sector_size, cut_loop_ref, patiently
from loopdev._loopinfo import LoopInfo
from loopdev.errors import InvalidValueError, KernelError, WaitTimeoutError, kernel_error
from loopdev.kernel import abi, probe

PAGE = os.sysconf("SC_PAGESIZE")
DEV = "/dev/loop3"


class Clock:
    """Time that passes only in sleep()."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(_backoff, "time", clock)
    return clock


class Kernel:
    """Stands in for ioctl(): records the requests, answers with the errnos given for them."""

    def __init__(self, **answers: list[int]) -> None:
        self._answers = answers
        self.asked: list[str] = []
        self.args: dict[str, object] = {}

    def ioctl(self, fd: int, request: int, path: str, arg: object = 0) -> int:
        assert (fd, path) == (99, DEV)
        name = abi.request_name(request)
        self.asked.append(name)
        self.args[name] = arg
        answers = self._answers.get(name) or [0]
        code = answers.pop(0) if len(answers) > 1 else answers[0]
        if code:
            raise kernel_error(OSError(code, os.strerror(code)), path, name)
        return 0


@pytest.fixture
def kernel(monkeypatch):
    def make(**answers: list[int]) -> Kernel:
        kernel = Kernel(**answers)
        monkeypatch.setattr(_configure, "ioctl", kernel.ioctl)
        monkeypatch.setattr(probe, "ioctl", kernel.ioctl)
        monkeypatch.setattr(probe, "_answers", {})
        return kernel

    return make


# Pauses.


def test_backoff_tries_at_once(clock):
    assert next(backoff(clock.now + 1)) == 0
    assert clock.slept == []


@pytest.mark.parametrize("late", [0, 1e-9, 5])
def test_backoff_tries_once_when_it_is_late(clock, late):
    assert list(backoff(clock.now - late)) == [0]
    assert clock.slept == []


@pytest.mark.parametrize("timeout", [1e-6, 0.01, 1, 30])
def test_backoff_ends_at_the_deadline(clock, timeout):
    start = clock.now
    tries = list(backoff(start + timeout))
    assert tries == [0, *clock.slept]
    assert clock.now - start == pytest.approx(timeout)
    assert len(tries) >= 2


def test_backoff_pauses_grow_to_a_limit(clock):
    list(backoff(clock.now + 5))
    *pauses, _ = clock.slept
    assert all(0 < pause <= 20e-3 for pause in pauses)
    assert pauses[0] <= 50e-6
    # Half of the longest at the least, and there are no more tries than that allows.
    assert all(pause >= 10e-3 for pause in pauses[20:])
    assert len(pauses) < 5 / 10e-3 + 20


def test_backoff_pauses_differ(clock):
    """Two processes that met once do not meet again and again."""
    list(backoff(clock.now + 5))
    assert len(set(clock.slept[20:-1])) > 10


def test_backoff_counts_the_time_of_the_tries(clock):
    tries = 0
    for _ in backoff(clock.now + 1):
        tries += 1
        clock.now += 0.4
    assert 3 <= tries <= 4


# Retries.


@pytest.mark.parametrize("refusals", [0, 1, 5])
def test_patiently_goes_on_after_eagain(clock, kernel, refusals):
    fake = kernel(LOOP_SET_STATUS64=[errno.EAGAIN] * refusals + [0])
    patiently(99, abi.LOOP_SET_STATUS64, DEV, b"arg")
    assert fake.asked == ["LOOP_SET_STATUS64"] * (refusals + 1)
    assert fake.args == {"LOOP_SET_STATUS64": b"arg"}


def test_patiently_gives_up_in_time(monkeypatch, kernel):
    monkeypatch.setattr(_configure, "_STEP_TIMEOUT", 0.02)
    fake = kernel(LOOP_SET_BLOCK_SIZE=[errno.EAGAIN])
    with pytest.raises(WaitTimeoutError) as caught:
        patiently(99, abi.LOOP_SET_BLOCK_SIZE, DEV, 4096)
    assert str(caught.value) == f"{DEV}: LOOP_SET_BLOCK_SIZE was still refused after 0.02 s"
    assert caught.value.__cause__.errno == errno.EAGAIN
    assert len(fake.asked) > 1


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENXIO, errno.EBUSY, errno.EPERM])
def test_patiently_passes_other_errors_on_at_once(kernel, code):
    fake = kernel(LOOP_SET_STATUS64=[errno.EAGAIN, code, 0])
    with pytest.raises(KernelError) as caught:
        patiently(99, abi.LOOP_SET_STATUS64, DEV, b"")
    assert caught.value.errno == code
    assert fake.asked == ["LOOP_SET_STATUS64"] * 2


# One request or the older ones.

ALL_FLAGS = abi.LOOP_CONFIGURE_SETTABLE_FLAGS


@pytest.fixture
def backing(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def test_configure_is_one_request(kernel, backing):
    fake = kernel()
    config = LoopConfig(512, 1024, 4096, ALL_FLAGS, b"ref")
    _configure.configure(99, DEV, backing, config)
    assert fake.asked == ["LOOP_CONFIGURE"]
    fields = abi.loop_config.unpack(fake.args["LOOP_CONFIGURE"])
    assert fields[:2] == (backing, 4096)
    assert fields[5:7] == (512, 1024)
    assert fields[10:12] == (ALL_FLAGS, b"ref".ljust(64, b"\0"))
    assert not any(fields[2:5] + fields[7:10] + fields[14:])


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EBADF, errno.EOVERFLOW, errno.ENXIO])
def test_configure_takes_only_einval_for_an_old_kernel(kernel, backing, code):
    fake = kernel(LOOP_CONFIGURE=[code])
    with pytest.raises(KernelError) as caught:
        _configure.configure(99, DEV, backing, LoopConfig(0, 0, 0, 0))
    assert caught.value.errno == code
    assert fake.asked == ["LOOP_CONFIGURE"]


def test_configure_raises_einval_of_a_kernel_that_has_it(kernel, backing):
    fake = kernel(LOOP_CONFIGURE=[errno.EINVAL, errno.EBADF])
    with pytest.raises(KernelError) as caught:
        _configure.configure(99, DEV, backing, LoopConfig(0, 0, 0, 0))
    assert caught.value.errno == errno.EINVAL
    assert set(fake.asked) == {"LOOP_CONFIGURE"}


def test_the_probe_asks_once(kernel, backing):
    fake = kernel(LOOP_CONFIGURE=[errno.EINVAL, errno.EBADF, errno.EINVAL])
    for _ in range(3):
        with pytest.raises(KernelError):
            _configure.configure(99, DEV, backing, LoopConfig(0, 0, 0, 0))
    assert fake.asked == ["LOOP_CONFIGURE"] * 4


def test_the_probe_offers_no_file(kernel, backing):
    fake = kernel(LOOP_CONFIGURE=[errno.EBADF])
    assert probe.has_loop_configure(99, DEV)
    assert struct.unpack_from("@i", fake.args["LOOP_CONFIGURE"]) == (-1,)
    assert not any(fake.args["LOOP_CONFIGURE"][4:])


def test_the_probe_guesses_nothing_from_other_errors(kernel):
    kernel(LOOP_CONFIGURE=[errno.EPERM])
    with pytest.raises(KernelError):
        probe.has_loop_configure(99, DEV)
    assert probe._answers == {}


def test_old_kernel_gets_steps_in_order(kernel, backing):
    fake = kernel(LOOP_CONFIGURE=[errno.EINVAL])
    _configure.configure(99, DEV, backing, LoopConfig(512, 1024, 4096, ALL_FLAGS, b"ref"))
    assert fake.asked == [
        *("LOOP_CONFIGURE", "LOOP_CONFIGURE", "LOOP_SET_FD", "LOOP_SET_BLOCK_SIZE"),
        *("LOOP_SET_STATUS64", "LOOP_SET_DIRECT_IO"),
    ]
    info = LoopInfo.unpack(fake.args["LOOP_SET_STATUS64"])
    assert (info.lo_offset, info.lo_sizelimit, info.loop_ref) == (512, 1024, "ref")
    # Other flags are ignored there, and are asked for in other ways.
    assert info.lo_flags == abi.LO_FLAGS_AUTOCLEAR | abi.LO_FLAGS_PARTSCAN


def test_old_kernel_gets_no_step_that_is_not_needed(kernel, backing):
    fake = kernel(LOOP_CONFIGURE=[errno.EINVAL])
    _configure.configure(99, DEV, backing, LoopConfig(0, 0, 0, 0))
    assert fake.asked[2:] == ["LOOP_SET_FD", "LOOP_SET_STATUS64"]
    assert fake.args["LOOP_SET_FD"] == backing


@pytest.mark.parametrize("step", ["LOOP_SET_BLOCK_SIZE", "LOOP_SET_STATUS64", "LOOP_SET_DIRECT_IO"])
def test_old_kernel_a_failing_step_undoes_the_rest(kernel, backing, step):
    fake = kernel(LOOP_CONFIGURE=[errno.EINVAL], **{step: [errno.EIO]})
    with pytest.raises(KernelError) as caught:
        _configure.configure(99, DEV, backing, LoopConfig(0, 0, 4096, ALL_FLAGS))
    assert (caught.value.errno, caught.value.request) == (errno.EIO, step)
    assert fake.asked[-2:] == [step, "LOOP_CLR_FD"]


def test_old_kernel_nothing_is_undone_that_was_not_done(kernel, backing):
    """Or it would be the file of another process that is let go."""
    fake = kernel(LOOP_CONFIGURE=[errno.EINVAL], LOOP_SET_FD=[errno.EBUSY])
    with pytest.raises(KernelError):
        _configure.configure(99, DEV, backing, LoopConfig(0, 0, 4096, ALL_FLAGS))
    assert fake.asked[-1] == "LOOP_SET_FD"


def test_old_kernel_direct_io_is_optional(kernel, backing):
    """As with LOOP_CONFIGURE, which leaves the flag off."""
    fake = kernel(LOOP_CONFIGURE=[errno.EINVAL], LOOP_SET_DIRECT_IO=[errno.EINVAL])
    _configure.configure(99, DEV, backing, LoopConfig(0, 0, 0, abi.LO_FLAGS_DIRECT_IO))
    assert fake.asked[-1] == "LOOP_SET_DIRECT_IO"


# Arguments.


@pytest.mark.parametrize("value", [0, 512, 4096, 3 * 512, (1 << 63) - 512])
def test_extent_is_taken(value):
    check_extent("offset", value)
    config = LoopConfig(value, value, 0, 0)
    assert (config.offset, config.sizelimit) == (value, value)


@pytest.mark.parametrize("value", [-1, -512, 1, 511, 513, (1 << 63) - 1, 1 << 63, 1 << 64])
@pytest.mark.parametrize("name", ["offset", "sizelimit"])
def test_extent_is_refused(name, value):
    with pytest.raises(InvalidValueError) as caught:
        LoopConfig(**{"offset": 0, "sizelimit": 0, name: value}, block_size=0, flags=0)
    assert (caught.value.name, caught.value.value) == (name, value)


@pytest.mark.parametrize("value", [512 << i for i in range(8) if 512 << i <= PAGE])
def test_sector_size_is_taken(value):
    check_sector_size(value)
    assert LoopConfig(0, 0, value, 0).block_size == value


@pytest.mark.parametrize(
    "value", [-1, -512, 1, 3, 256, 511, 513, 1000, 1536, 4095, 131072, 1 << 32]
)
def test_sector_size_is_refused_without_asking_the_kernel(monkeypatch, value):
    monkeypatch.setattr(probe, "max_block_size", lambda: pytest.fail("asked the kernel"))
    for check in (check_sector_size, lambda size: LoopConfig(0, 0, size, 0)):
        with pytest.raises(InvalidValueError) as caught:
            check(value)
        assert (caught.value.name, caught.value.value) == ("sector_size", value)


def test_sector_size_zero_is_the_kernels_choice():
    assert LoopConfig(0, 0, 0, 0).block_size == 0
    with pytest.raises(InvalidValueError):
        check_sector_size(0)


@pytest.mark.skipif(PAGE >= 65536, reason="no loop device has sectors over 64 KiB")
def test_sector_size_over_the_page_is_the_kernels_decision(monkeypatch):
    monkeypatch.setattr(probe, "max_block_size", lambda: 2 * PAGE)
    check_sector_size(2 * PAGE)
    monkeypatch.setattr(probe, "max_block_size", lambda: PAGE)
    with pytest.raises(InvalidValueError, match=f"at most {PAGE}"):
        check_sector_size(2 * PAGE)


@pytest.mark.parametrize("flag", [2, 32, 1 << 31])
def test_unknown_flag_is_refused(flag):
    with pytest.raises(InvalidValueError) as caught:
        LoopConfig(0, 0, 0, flag | abi.LO_FLAGS_PARTSCAN)
    assert caught.value.name == "flags"


# lo_file_name.

SMILE = "\N{GRINNING FACE}"  # four bytes


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", b""),
        ("/a.img", b"/a.img"),
        ("x" * 63, b"x" * 63),
        ("x" * 64, b"x" * 63),
        ("x" * 1000, b"x" * 63),
        ("x" * 61 + "é", b"x" * 61 + "é".encode()),
        ("x" * 62 + "é", b"x" * 62),
        ("x" * 59 + SMILE, b"x" * 59 + SMILE.encode()),
        ("x" * 60 + SMILE, b"x" * 60),
        ("x" * 61 + SMILE, b"x" * 61),
        ("x" * 62 + SMILE, b"x" * 62),
        ("x" * 63 + SMILE, b"x" * 63),
        # Bytes that are no UTF-8, as paths may hold: nothing to be careful with.
        (b"\xff" * 70, b"\xff" * 63),
        (os.fsdecode(b"\xff" * 70), b"\xff" * 63),
        (b"x" * 62 + "é".encode(), b"x" * 62),
        (b"\xff" + b"x" * 61 + "é".encode(), b"\xff" + b"x" * 61 + b"\xc3"),
    ],
)
def test_loop_ref_is_cut_between_characters(text, kept):
    assert cut_loop_ref(text) == kept


# What the kernel says.

FIELDS = {
    "lo_device": 1,
    "lo_inode": 2,
    "lo_rdevice": 3,
    "lo_offset": 4,
    "lo_sizelimit": 5,
    "lo_number": 6,
    "lo_encrypt_type": 7,
    "lo_encrypt_key_size": 8,
    "lo_flags": 9,
    "lo_file_name": b"name".ljust(64, b"\0"),
    "lo_crypt_name": b"crypt".ljust(64, b"\0"),
    "lo_encrypt_key": b"key".ljust(32, b"\0"),
    "lo_init": (10, 11),
}


def test_loop_info_packs_what_it_unpacks():
    """Against a layout written down here, so that both cannot be wrong together."""
    raw = struct.pack(
        "=5Q4I64s64s32s2Q", 1, 2, 3, 4, 5, 6, 7, 8, 9, b"name", b"crypt", b"key", 10, 11
    )
    info = LoopInfo.unpack(raw)
    assert info.as_dict() == FIELDS
    assert info.pack() == raw
    assert info == LoopInfo(**FIELDS)


@pytest.mark.parametrize(
    ("flag", "name"), [(1, "read_only"), (4, "autoclear"), (8, "partscan"), (16, "direct_io")]
)
def test_loop_info_flags(flag, name):
    names = ("read_only", "autoclear", "partscan", "direct_io")
    only = LoopInfo(**FIELDS | {"lo_flags": flag})
    assert [other for other in names if getattr(only, other)] == [name]
    but = LoopInfo(**FIELDS | {"lo_flags": 29 & ~flag})
    assert [other for other in names if not getattr(but, other)] == [name]


def test_loop_info_ref_ends_at_the_first_nul():
    assert LoopInfo(**FIELDS | {"lo_file_name": b"ab\0cd".ljust(64, b"\0")}).loop_ref == "ab"
    odd = LoopInfo(**FIELDS | {"lo_file_name": b"\xff".ljust(64, b"\0")})
    assert os.fsencode(odd.loop_ref) == b"\xff"


@pytest.mark.parametrize(
    ("device", "inode", "same"), [(1, 2, True), (1, 3, False), (2, 2, False), (2, 1, False)]
)
def test_loop_info_is_bound_to(device, inode, same):
    info = types.SimpleNamespace(st_dev=device, st_ino=inode)
    assert LoopInfo(**FIELDS).is_bound_to(info) is same
