# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""detach(): nothing that was written is lost, and the device is gone or its holders are named."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import counting_bytes
from oracle import partitions, run, sysfs, wait_until

import loopdev
from loopdev.loop import Loop, LoopControl

BLOCK = counting_bytes(2, 256 << 10)


def write(path: str, data: bytes, fsync: bool) -> None:
    with open(path, "r+b", buffering=0) as file:
        file.write(data)
        if fsync:
            os.fsync(file.fileno())


def gone(device: loopdev.LoopDevice) -> bool:
    """Whether this attachment is over; the number may have a new one."""
    return sysfs(device.number, "diskseq") != str(device.diskseq)


@pytest.mark.parametrize("fsync", [True, False])
@pytest.mark.parametrize("how", ["detach", "lazy", "close", "with", "persistent", "reopened"])
@pytest.mark.parametrize("direct_io", [True, False])
def test_what_was_written_is_in_the_file(image, sector_size, fsync, how, direct_io):
    persist = how in ("persistent", "reopened")
    device = loopdev.attach(image, sector_size=sector_size, direct_io=direct_io, persist=persist)
    write(device.path, BLOCK, fsync)
    if how == "with":
        with device:
            write(device.path, BLOCK, fsync)
    elif how == "close":
        device.close()
    elif how == "reopened":
        device.close()
        with loopdev.LoopDevice.open(device.path) as again:
            write(device.path, BLOCK, fsync)
            again.detach()
    else:
        device.detach(lazy=how == "lazy")
    wait_until(lambda: gone(device))
    assert image.read_bytes()[: len(BLOCK)] == BLOCK


def test_a_writer_that_closes_in_the_last_moment_loses_nothing(image):
    """The writer closes while detach() is under way: the case in which LOOP_CLR_FD drops pages."""
    for round_ in range(40):
        data = bytes([round_ + 1]) * (64 << 10)
        device = loopdev.attach(image)
        file = open(device.path, "r+b", buffering=0)
        file.write(data)
        closer = threading.Timer(0.0002 * (round_ % 10), file.close)
        closer.start()
        device.detach(timeout=10)
        closer.join()
        assert image.read_bytes()[: len(data)] == data


def test_low_level_clear_fd_keeps_what_was_written(image, sector_size):
    with LoopControl() as control, open(image, "r+b") as backing:
        with control.loop_for_fd(backing.fileno(), blocksize=sector_size) as loop:
            os.pwrite(loop.fd, BLOCK, 0)
            loop.clear_fd()
    assert image.read_bytes()[: len(BLOCK)] == BLOCK


def test_file_is_free_when_detach_returns(tmp_path, image):
    """The filesystem of the image can be unmounted at once."""
    lower = tmp_path / "lower"
    lower.mkdir()
    run("mkfs.ext4", "-q", image)
    with loopdev.attach(image) as outer:
        for _ in range(5):
            run("mount", outer.path, lower)
            inner_image = lower / "inner.img"
            inner_image.write_bytes(bytes(1 << 20))
            inner = loopdev.attach(inner_image)
            write(inner.path, BLOCK, False)
            inner.detach()
            run("umount", lower)


def test_methods_after_the_end_raise(image):
    device = loopdev.attach(image)
    device.detach()
    device.close()
    calls = [
        lambda: device.size,
        lambda: device.partitions,
        lambda: device.offset,
        lambda: device.backing_file,
        lambda: device.backing_id,
        lambda: device.autoclear,
        device.fileno,
        device.sync,
        device.rescan,
        device.refresh_size,
        device.detach,
        device.remove,
        device.__enter__,
    ]
    for call in calls:
        with pytest.raises(loopdev.ClosedError, match=f"{device.path} is closed"):
            call()
    assert device.number >= 0 and device.path  # names are still good for messages


def test_mounted_device_is_busy_and_stays(tmp_path, image):
    run("mkfs.ext4", "-q", image)
    point = tmp_path / "mnt with space"
    point.mkdir()
    with loopdev.attach(image) as device:
        run("mount", device.path, point)
        try:
            started = time.monotonic()
            with pytest.raises(loopdev.DeviceBusyError) as caught:
                device.detach(timeout=60)
            assert time.monotonic() - started < 20, "a mount is not waited for"
            assert [(h.kind, h.name) for h in caught.value.holders] == [("mount", str(point))]
            assert caught.value.errno == errno.EBUSY
            assert not gone(device)
            (point / "file").write_text("still writable")
        finally:
            run("umount", point)


def test_mount_in_another_namespace_is_found(tmp_path, image):
    run("mkfs.ext4", "-q", image)
    with loopdev.attach(image) as device:
        script = f"mount {device.path} {tmp_path} && echo done && exec sleep 100"
        other = subprocess.Popen(
            ["unshare", "-m", "--propagation", "private", "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert other.stdout.readline() == "done\n"
            found = [h for h in loopdev.holders(device) if h.kind == "mount"]
            assert [(h.name, h.pid) for h in found] == [(str(tmp_path), other.pid)]
            with pytest.raises(loopdev.DeviceBusyError) as caught:
                device.detach(timeout=0.3)
            assert (str(tmp_path), other.pid) in [(h.name, h.pid) for h in caught.value.holders]
            assert not gone(device)
        finally:
            other.kill()
            other.wait()
            other.stdout.close()


@pytest.mark.parametrize("persist", [False, True])
def test_process_that_has_it_open_is_named_and_the_device_is_as_it_was(image, persist):
    run("sfdisk", "-q", image, input="label: gpt\nsize=4MiB\nsize=4MiB\n")
    device = loopdev.attach(image, partscan=True, persist=persist)
    with open(device.path, "rb") as file:
        holder = subprocess.Popen(["sleep", "100"], stdin=file)
    try:
        before = loopdev.info(device)
        with pytest.raises(loopdev.DeviceBusyError) as caught:
            device.detach(timeout=0.2)
        assert [(h.kind, h.pid) for h in caught.value.holders] == [("process", holder.pid)]
        assert "sleep" in str(caught.value)
        assert loopdev.info(device) == before
        assert len(device.partitions) == 2
        assert sysfs(device.number, "loop/autoclear") == str(int(not persist))
    finally:
        holder.kill()
        holder.wait()
        device.detach()


def test_detach_waits_for_one_who_leaves(image):
    device = loopdev.attach(image)
    with open(device.path, "rb") as file:
        holder = subprocess.Popen(["sleep", "0.3"], stdin=file)
    device.detach(timeout=10)
    assert gone(device)
    holder.wait()


def test_open_partition_keeps_the_others(image):
    run("sfdisk", "-q", image, input="label: gpt\nsize=4MiB\nsize=4MiB\nsize=4MiB\n")
    with loopdev.attach(image, partscan=True) as device:
        nodes = [part.path for part in device.partitions]
        with open(nodes[2], "rb"):
            with pytest.raises(loopdev.DeviceBusyError):
                device.detach(timeout=0.1)
            assert [part.path for part in device.partitions] == nodes
            assert all(map(os.path.exists, nodes))


@pytest.mark.parametrize("persist", [False, True])
def test_lazy_detach_while_mounted(tmp_path, image, persist):
    run("mkfs.ext4", "-q", image)
    point = tmp_path / "mnt"
    point.mkdir()
    device = loopdev.attach(image, persist=persist)
    run("mount", device.path, point)
    (point / "before").write_text("before")
    device.detach(lazy=True)
    assert not gone(device)
    (point / "after").write_text("after")
    run("umount", point)
    wait_until(lambda: gone(device))
    with loopdev.attach(image, read_only=True) as again:
        run("mount", "-o", "ro", again.path, point)
        assert (point / "before").read_text() == "before"
        assert (point / "after").read_text() == "after"
        run("umount", point)


def test_stale_handle_never_touches_the_next_attachment(image, counting_file):
    """The device is given another file behind our back: another diskseq."""
    other = image.with_name("other.img")
    other.write_bytes(bytes(16 << 20))
    device = loopdev.attach(image, read_only=True)
    with Loop(device.number, read_only=True) as loop, open(other, "rb") as file:
        loop.change_fd(file.fileno())
    with pytest.raises(loopdev.NotBoundError, match="another backing file"):
        device.detach()
    with pytest.raises(loopdev.NotBoundError, match="another backing file"):
        device.detach(lazy=True)
    assert sysfs(device.number, "loop/backing_file") == str(other)
    with pytest.raises(loopdev.NotBoundError):
        loopdev.LoopDevice.open(device.path, device.diskseq)
    device.close()


def test_stale_snapshot_is_refused(image, counting_file):
    number = 8000 + os.getpid() % 1000
    with loopdev.attach(image, number=number) as device:
        snapshot = loopdev.info(device)
    with loopdev.attach(counting_file, number=number), pytest.raises(loopdev.NotBoundError):
        snapshot.open()


def test_write_error_at_detach_is_reported_and_nothing_is_let_go(tmp_path):
    """The filesystem below is full: the data cannot get there, and detach() says so."""
    small = tmp_path / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1M", "none", small)
    try:
        path = small / "disk.img"
        with open(path, "wb") as file:
            file.truncate(8 << 20)
        device = loopdev.attach(path)
        with open(device.path, "r+b", buffering=0) as file:
            file.write(os.urandom(4 << 20))
            with pytest.raises(loopdev.KernelError) as caught:
                device.detach(timeout=0.5)
        assert caught.value.errno in (errno.EIO, errno.ENOSPC)
        assert not gone(device)
        device.detach()
        assert gone(device)
    finally:
        run("umount", small)


def test_remove(image):
    number = 9000 + os.getpid() % 1000
    device = loopdev.attach(image, number=number)
    device.remove()
    assert not os.path.exists(f"/sys/block/loop{number}")
    with LoopControl() as control:
        control.add(number)
        device = loopdev.attach(image, number=number)
        device.detach()
        assert not os.path.exists(f"/sys/block/loop{number}")


def test_two_owners_race_for_one_number(image, counting_file):
    """One of them gets it, the other is told who has it."""
    number = 10000 + os.getpid() % 1000
    code = """
import sys, loopdev
sys.stdin.readline()
try:
    device = loopdev.attach(sys.argv[1], number=int(sys.argv[2]))
except loopdev.DeviceBusyError as exc:
    print("busy", exc, flush=True)
else:
    print("bound", flush=True)
    sys.stdin.readline()
    device.detach()
"""
    for _ in range(5):
        owners = [
            subprocess.Popen(
                [sys.executable, "-c", code, path, str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for path in (image, counting_file)
        ]
        for owner in owners:
            owner.stdin.write("go\n")
            owner.stdin.flush()
        answers = [owner.stdout.readline().split(maxsplit=1) for owner in owners]
        assert sorted(answer[0] for answer in answers) == ["bound", "busy"]
        bound = sysfs(number, "loop/backing_file")
        assert bound in next(answer[1] for answer in answers if answer[0] == "busy")
        for owner in owners:
            owner.communicate("go\n")
            assert owner.returncode == 0
        assert not os.path.exists(f"/sys/block/loop{number}")


def test_hung_backing_filesystem_does_not_hang_the_listing(tmp_path):
    """devices() and find() return although one backing file's server does not answer."""
    from fake_fuse import StoppedFuse

    with StoppedFuse(tmp_path / "fuse") as fuse:
        with loopdev.attach(fuse.file, persist=False, direct_io=False, read_only=True) as device:
            fuse.stop()
            try:
                started = time.monotonic()
                found = {d.path: d for d in loopdev.devices()}
                assert found[device.path].loop_ref is None
                assert found[device.path].backing_file == str(fuse.file)
                loopdev.find("/etc/passwd")
                assert time.monotonic() - started < 15
            finally:
                fuse.resume()


def test_detach_with_an_opener_that_looks_at_every_device(image):
    """A process that opens and locks every device, as udev does, delays nothing for good."""
    code = """
import os, fcntl, glob
print("ready", flush=True)
while True:
    for path in glob.glob("/dev/loop[0-9]*"):
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.pread(fd, 4096, 0)
        except OSError:
            pass
        os.close(fd)
"""
    run("sfdisk", "-q", image, input="label: gpt\nsize=4MiB\n")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        for _ in range(30):
            with loopdev.attach(image, partscan=True) as device:
                assert Path(device.partitions[0].path).is_block_device()
            assert gone(device)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_holder_in_this_process_is_named(image):
    """The most common mistake: a file object that was not closed."""
    with loopdev.attach(image) as device:
        assert loopdev.holders(device) == ()
        with open(device.path, "rb"):
            with pytest.raises(loopdev.DeviceBusyError) as caught:
                device.detach(timeout=0.1)
            assert [h.pid for h in caught.value.holders] == [os.getpid()]


@pytest.mark.parametrize("how", ["detach", "close", "lazy", "killed"])
def test_nothing_stays_of_partitions_that_came_by_rescan(image, how):
    run("sfdisk", "-q", image, input="label: gpt\nsize=4MiB\nsize=4MiB\n")
    child = os.fork() if how == "killed" else None
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
        assert run("losetup", "-j", image) == ""
        return
    device = loopdev.attach(image)
    nodes = [part.path for part in device.rescan()]
    assert all(map(os.path.exists, nodes)) and len(nodes) == 2
    if how == "killed":
        os.kill(os.getpid(), 9)
    elif how == "close":
        device.close()
    else:
        device.detach(lazy=how == "lazy")
    wait_until(lambda: gone(device))
    assert not any(map(os.path.exists, nodes))
    assert partitions(device.number) == {}


def test_forked_child_leaves_the_device_alone(image):
    run("sfdisk", "-q", image, input="label: gpt\nsize=4MiB\n")
    with loopdev.attach(image, partscan=True) as device:
        child = os.fork()
        if not child:
            device.__exit__(None, None, None)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert not gone(device)
        assert os.path.exists(device.partitions[0].path)


def test_detach_without_diskseq(image, counting_file, monkeypatch):
    """As on a kernel before 5.15: another file is known by its name then."""
    for module in ("_attach", "_device", "_detach"):
        monkeypatch.setattr(f"loopdev.{module}.diskseq_of", lambda fd, path: None)
    monkeypatch.setattr("loopdev.kernel.sysfs.diskseq", lambda number: None)
    with loopdev.attach(image) as device:
        assert device.diskseq is None
    assert sysfs(device.number, "loop/backing_file") != str(image)


def test_a_wrongly_learnt_number_of_links_is_not_believed(image, monkeypatch):
    """detach() never says that it is done by a hint alone."""
    monkeypatch.setattr("loopdev.kernel.sysfs.is_bare", lambda number: True)
    with loopdev.attach(image) as device, open(device.path, "rb"):
        with pytest.raises(loopdev.DeviceBusyError):
            device.detach(timeout=0.1)
        assert not gone(device)
