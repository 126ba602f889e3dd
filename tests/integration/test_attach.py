# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""attach(): what the kernel has afterwards is what was asked for."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import counting_bytes
from oracle import is_bound, losetup, run, sysfs, wait_until

import loopdev


def test_attach_sets_sector_size(counting_file, sector_size):
    """The kernel uses the sector size that was asked for."""
    with loopdev.attach(counting_file, sector_size=sector_size) as device:
        assert sysfs(device.number, "queue/logical_block_size") == str(sector_size)
        assert device.sector_size == sector_size


def test_device_shows_the_file(counting_file, sector_size):
    with loopdev.attach(counting_file, sector_size=sector_size) as device:
        assert Path(device.path).read_bytes() == counting_bytes(0, 128 << 10)
        assert device.size == 128 << 10


def test_offset_and_sizelimit(counting_file, sector_size):
    offset, limit = 3 * sector_size, 5 * sector_size
    with loopdev.attach(
        counting_file, offset=offset, sizelimit=limit, sector_size=sector_size
    ) as device:
        assert Path(device.path).read_bytes() == counting_bytes(offset, limit)
        assert sysfs(device.number, "loop/offset") == str(offset)
        assert sysfs(device.number, "loop/sizelimit") == str(limit)
        assert (device.offset, device.sizelimit, device.size) == (offset, limit, limit)


def test_properties_agree_with_sysfs(image, sector_size):
    with loopdev.attach(image, sector_size=sector_size) as device:
        status = os.stat(image)
        seen = losetup(device.path)
        assert seen["back-file"] == str(image) == device.backing_file
        assert seen["back-ino"] == status.st_ino
        assert device.backing_id == (status.st_dev, status.st_ino)
        assert device.diskseq == int(sysfs(device.number, "diskseq"))
        assert device.autoclear is seen["autoclear"] is True
        assert device.read_only is seen["ro"] is False
        assert device.direct_io is seen["dio"]
        assert os.stat(device.path).st_rdev == device.rdev
        assert device.path == f"/dev/loop{device.number}"


def test_direct_io_is_the_default_where_the_file_can(image):
    with loopdev.attach(image) as device:
        asked = bool(int(sysfs(device.number, "loop/dio")))
        assert device.direct_io is asked is True
    with loopdev.attach(image, direct_io=False) as device:
        assert sysfs(device.number, "loop/dio") == "0"


def test_direct_io_falls_back_where_the_file_cannot():
    fd = os.memfd_create("no-direct-io")
    try:
        os.ftruncate(fd, 1 << 20)
        with loopdev.attach(fd) as device:
            assert sysfs(device.number, "loop/dio") == "0"
        with pytest.raises(loopdev.BackingFileError, match="direct I/O"):
            loopdev.attach(fd, direct_io=True)
    finally:
        os.close(fd)


def test_read_only(counting_file):
    with loopdev.attach(counting_file, read_only=True) as device:
        assert sysfs(device.number, "ro") == "1"
        assert device.read_only
        with pytest.raises(OSError), open(device.path, "r+b", buffering=0) as file:
            file.write(b"x" * 512)
    assert counting_file.read_bytes() == counting_bytes(0, 128 << 10)


@pytest.mark.parametrize("kind", ["str", "bytes", "path", "file", "descriptor", "relative"])
def test_backing_may_be(counting_file, kind, monkeypatch):
    monkeypatch.chdir(counting_file.parent)
    with open(counting_file, "r+b") as file:
        backing = {
            "str": str(counting_file),
            "bytes": os.fsencode(counting_file),
            "path": counting_file,
            "file": file,
            "descriptor": file.fileno(),
            "relative": counting_file.name,
        }[kind]
        with loopdev.attach(backing) as device:
            assert sysfs(device.number, "loop/backing_file") == str(counting_file)
            info = loopdev.info(device)
            assert info.loop_ref == str(counting_file)[:63]
        assert not file.closed
        os.fstat(file.fileno())


def test_block_device_as_backing(counting_file, sector_size):
    with loopdev.attach(counting_file) as lower:
        with loopdev.attach(lower.path, offset=4096, sector_size=sector_size) as upper:
            data = Path(upper.path).read_bytes()
            assert data == counting_bytes(4096, (128 << 10) - 4096)
            assert [found.path for found in loopdev.find(lower.path)] == [upper.path]
            assert [h.name for h in loopdev.holders(lower)] == [f"loop{upper.number}"]


def test_descriptor_with_append_or_direct_flags(counting_file):
    """Flags of the caller's description must not change what the device does."""
    for flags in (os.O_APPEND, os.O_DIRECT):
        fd = os.open(counting_file, os.O_RDWR | flags)
        try:
            with loopdev.attach(fd, direct_io=False) as device:
                assert sysfs(device.number, "loop/dio") == "0"
                block = b"\xa5" * 512
                with open(device.path, "r+b") as file:
                    file.write(block)
        finally:
            os.close(fd)
        assert counting_file.read_bytes() == block + counting_bytes(512, (128 << 10) - 512)


def test_unaligned_end_is_never_cut_off_by_the_kernels_choice(tmp_path):
    """Where the size is a multiple of 512 only, all of it is readable."""
    path = tmp_path / "odd.img"
    path.write_bytes(counting_bytes(0, 9 * 512))
    with loopdev.attach(path) as device:
        assert Path(device.path).read_bytes() == counting_bytes(0, 9 * 512)


def test_loop_ref(counting_file):
    with loopdev.attach(counting_file, loop_ref="somebody's disk") as device:
        assert loopdev.info(device).loop_ref == "somebody's disk"
        assert run("losetup", "-n", "-O", "BACK-FILE", device.path).strip() == str(counting_file)


def test_wanted_number_is_added_and_removed(image):
    number = 6000 + os.getpid() % 1000
    with loopdev.attach(image, number=number) as device:
        assert device.path == f"/dev/loop{number}"
        assert is_bound(number)
    assert not os.path.exists(f"/sys/block/loop{number}")
    assert not os.path.exists(f"/dev/loop{number}")


def test_wanted_number_that_is_taken(image, counting_file):
    with loopdev.attach(counting_file) as device:
        started = time.monotonic()
        with pytest.raises(loopdev.DeviceBusyError) as caught:
            loopdev.attach(image, number=device.number)
        assert str(counting_file) in str(caught.value)
        assert time.monotonic() - started < 5, "a bound device is not waited for"
        assert sysfs(device.number, "loop/backing_file") == str(counting_file)


def test_reuse_returns_the_same_device(image):
    with loopdev.attach(image) as first:
        with loopdev.attach(image, reuse=True) as second:
            assert (second.number, second.diskseq) == (first.number, first.diskseq)
        assert is_bound(first.number)
        with loopdev.attach(image, reuse=True, offset=4096) as other:
            assert other.number != first.number
        with loopdev.attach(image, reuse=True, read_only=True) as other:
            assert other.number != first.number


def test_reuse_by_many_at_once_gives_one_device(image):
    devices, errors = [], []

    def work() -> None:
        try:
            devices.append(loopdev.attach(image, reuse=True, persist=True))
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for device in devices[1:]:
        device.close()
    devices[0].detach()
    assert not errors
    assert len({device.number for device in devices}) == 1


def test_persistent_device_outlives_its_handle(image):
    with loopdev.attach(image, persist=True) as device:
        assert not device.autoclear
    assert is_bound(device.number)
    with loopdev.LoopDevice.open(device.path, device.diskseq) as again:
        again.detach()
    assert not is_bound(device.number)


def test_owner_killed_leaves_nothing(image):
    code = f"""
        import loopdev, time
        device = loopdev.attach({str(image)!r}, partscan=True)
        print(device.number, flush=True)
        time.sleep(100)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    number = int(owner.stdout.readline())
    assert sysfs(number, "loop/backing_file") == str(image)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_until(lambda: sysfs(number, "loop/backing_file") != str(image))


def test_forgotten_handle_is_closed_with_a_warning(image):
    with pytest.warns(ResourceWarning, match="was not closed"):
        device = loopdev.attach(image)
        number = device.number
        del device
        gc.collect()
    assert sysfs(number, "loop/backing_file") != str(image)


def test_failure_in_the_block_is_not_hidden(image):
    with pytest.raises(ZeroDivisionError), loopdev.attach(image) as device:
        raise ZeroDivisionError
    assert sysfs(device.number, "loop/backing_file") != str(image)


def test_verification_failure_leaves_nothing(image, monkeypatch):
    """A kernel that does otherwise than asked is found out, and the device let go."""
    real = loopdev._attach.configure

    def smaller(fd, path, backing, config):
        config.sizelimit, wanted = 4096, config.sizelimit
        real(fd, path, backing, config)
        config.sizelimit = wanted

    monkeypatch.setattr("loopdev._attach.configure", smaller)
    for persist in (False, True):
        with pytest.raises(loopdev.VerificationError, match="sizelimit 0, the kernel made it 4096"):
            loopdev.attach(image, persist=persist)
        assert run("losetup", "-j", image) == ""


def test_interrupt_during_set_up_leaves_nothing(image, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("loopdev._attach._Attachment._verify", interrupted)
    number = 7000 + os.getpid() % 1000
    for options in ({}, {"persist": True}, {"partscan": True}, {"number": number}):
        with pytest.raises(KeyboardInterrupt):
            loopdev.attach(image, **options)
        assert run("losetup", "-j", image) == ""
    assert not os.path.exists(f"/sys/block/loop{number}")


def test_find_by_identity(image, counting_file, tmp_path):
    """A file is found by what it is, not by how it is called."""
    other_name = tmp_path / "hard link"
    os.link(image, other_name)
    with loopdev.attach(image) as one, loopdev.attach(image, offset=4096) as two:
        with loopdev.attach(counting_file):
            assert {d.path for d in loopdev.find(other_name)} == {one.path, two.path}
    assert loopdev.find(image) == []
    with pytest.raises(FileNotFoundError):
        loopdev.find(tmp_path / "none")


def test_devices_lists_foreign_ones(image):
    path = run("losetup", "-f", "--show", "-o", 4096, image).strip()
    try:
        found = {device.path: device for device in loopdev.devices()}[path]
        assert (found.backing_file, found.offset) == (str(image), 4096)
        assert found.size == (16 << 20) - 4096
        with found.open() as device:
            assert device.diskseq == found.diskseq
    finally:
        run("losetup", "-d", path)
    with pytest.raises(loopdev.NotBoundError):
        found.open()


def test_refresh_size(image):
    with loopdev.attach(image) as device:
        os.truncate(image, 32 << 20)
        assert device.size == 16 << 20
        assert device.refresh_size() == 32 << 20
        assert sysfs(device.number, "size") == str((32 << 20) // 512)
        os.truncate(image, 8 << 20)
        assert device.refresh_size() == 8 << 20


def test_open_refuses_what_is_no_loop_device(tmp_path, image):
    for path in ("/dev/null", str(image), str(tmp_path)):
        with pytest.raises(loopdev.NoSuchDeviceError, match="is not a loop device"):
            loopdev.LoopDevice.open(path)
    with pytest.raises(loopdev.NoSuchDeviceError):
        loopdev.LoopDevice.open("/dev/loop-none")


def test_listing_names_that_are_hard_to_write(tmp_path):
    name = os.fsencode(tmp_path) + b"/new\nline \xff\xfe.img"
    with open(name, "wb") as file:
        file.truncate(1 << 20)
    with loopdev.attach(name) as device:
        assert os.fsencode(device.backing_file) == name
        assert [d.path for d in loopdev.find(name)] == [device.path]
        assert [d.path for d in loopdev.devices() if os.fsencode(d.backing_file) == name]


def test_deleted_file_goes_on(image):
    with loopdev.attach(image) as device:
        image.unlink()
        assert device.backing_file == f"{image} (deleted)"
        with open(device.path, "r+b") as file:
            file.write(b"x" * 4096)
        device.sync()


def test_device_without_a_node_is_passed_over(image):
    """Somebody has removed a node from /dev; LOOP_CTL_GET_FREE may name its device for ever."""
    number = 13000 + os.getpid() % 1000
    with loopdev.loop.LoopControl() as control:
        control.add(number)
        os.unlink(f"/dev/loop{number}")
        try:
            attached = [loopdev.attach(image) for _ in range(12)]
            for device in attached:
                device.detach()
            assert number not in [device.number for device in attached]
        finally:
            control.remove(number)


def test_reuse_gives_only_what_was_asked(image):
    with loopdev.attach(image) as owned:
        with loopdev.attach(image, reuse=True, direct_io=False) as other:
            assert other.number != owned.number
        lasting = loopdev.attach(image, reuse=True, persist=True)
        assert lasting.number != owned.number
        lasting.detach()
        os.truncate(image, 32 << 20)
        with loopdev.attach(image, reuse=True) as larger:
            assert larger.number != owned.number
            assert larger.size == 32 << 20


def test_signal_while_the_kernel_binds(image, monkeypatch):
    """It is seen when the request is done: the device must be let go all the same."""
    real = loopdev._attach.configure

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr("loopdev._attach.configure", interrupted)
    for persist in (False, True):
        with pytest.raises(KeyboardInterrupt):
            loopdev.attach(image, persist=persist)
        assert run("losetup", "-j", image) == ""


def test_max_part_of_the_module(image, monkeypatch):
    """Where max_part is set, the kernel sets PARTSCAN on its own account."""
    real = loopdev._attach.configure

    def with_partscan(fd, path, backing, config):
        config.flags |= 8
        real(fd, path, backing, config)
        config.flags &= ~8

    monkeypatch.setattr("loopdev._attach.configure", with_partscan)
    with pytest.raises(loopdev.VerificationError, match="flags"):
        loopdev.attach(image)
    monkeypatch.setattr("loopdev._attach.probe", SimpleNamespace(part_shift=lambda: 1))
    loopdev.attach(image).close()
