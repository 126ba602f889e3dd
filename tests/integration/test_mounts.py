# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""mount(2), umount2(2) and what /proc says of it: against findmnt, and on servers that hang."""

from __future__ import annotations

import json
import os
import time

import pytest
from oracle import run

from loopdev.errors import DeviceBusyError, KernelError, NoSuchDeviceError, NotPermittedError
from loopdev.kernel import mounts
from loopdev.kernel.mounts import mounted

NAMES = ["plain", "a b\tc", "back\\slash", "#hash", "new\nline", "\\040", "bücher", "\udcff"]


@pytest.fixture
def place(tmp_path):
    """A directory, from which everything is unmounted at the end."""
    path = tmp_path / "place"
    path.mkdir()
    yield str(path)
    while mounted(str(path)) is not None:
        mounts.umount(str(path), mounts.MNT_DETACH)


def tmpfs(place: str, source: str = "none") -> None:
    mounts.mount(source, place, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "size=64k")


def test_mount_and_umount(place):
    assert mounted(place) is None
    tmpfs(place, "a source")
    mount = mounted(place)
    assert (mount.target, mount.fstype, mount.source) == (place, "tmpfs", "a source")
    assert mount.device == os.stat(place).st_dev
    found = json.loads(run("findmnt", "--json", "-o", "SOURCE,OPTIONS", "-M", place))
    entry = found["filesystems"][0]
    assert entry["source"] == "a source"
    assert {"nosuid", "nodev", "size=64k"} <= set(entry["options"].split(","))
    assert "noexec" not in entry["options"].split(",")
    mounts.umount(place)
    assert mounted(place) is None
    assert os.stat(place).st_dev == os.stat(os.path.dirname(place)).st_dev


@pytest.mark.parametrize("name", NAMES)
def test_names(place, name):
    path, source = f"{place}/{name}", name.replace("\udcff", "ÿ")
    tmpfs(place)
    os.mkdir(path)
    tmpfs(path, source)
    try:
        mount = mounted(path)
        assert (mount.target, mount.source) == (path, source)
        assert mount.device == os.stat(path).st_dev
    finally:
        mounts.umount(path)


def test_the_last_mount_is_seen(place):
    for source in ("first", "second"):
        tmpfs(place, source)
    assert mounted(place).source == "second"
    mounts.umount(place)
    assert mounted(place).source == "first"


def test_a_path_through_a_link(place, tmp_path):
    tmpfs(place)
    (tmp_path / "link").symlink_to(tmp_path)
    assert mounted(f"{tmp_path}/link/place") == mounted(place)
    assert mounted(f"{tmp_path}/link/../link/./place/") == mounted(place)


def test_a_file_as_the_mount_point(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("data")
    target.touch()
    mounts.mount(str(source), str(target), "none", 4096, "")  # MS_BIND
    try:
        assert target.read_text() == "data"
        assert mounted(str(target)).target == str(target)
    finally:
        mounts.umount(str(target), mounts.UMOUNT_NOFOLLOW)
    assert mounted(str(target)) is None


def test_a_fuse_server_that_never_answers(place):
    """Nobody reads from the descriptor: whoever looks at the mount hangs, and this does not."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    try:
        data = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
        mounts.mount("silent", place, "fuse.loopdev-test", 0, data)
        begin = time.monotonic()
        mount = mounted(place)
        assert time.monotonic() - begin < 5
        assert (mount.fstype, mount.source) == ("fuse.loopdev-test", "silent")
    finally:
        os.close(fd)
    assert mounted(place) == mount  # it is dead now, and still mounted
    mounts.umount(place, mounts.MNT_FORCE | mounts.MNT_DETACH)
    assert mounted(place) is None


def test_refusals(place):
    with pytest.raises(NoSuchDeviceError, match=r"mount: .*ENODEV"):
        mounts.mount("none", place, "no-such-filesystem", 0, "")
    with pytest.raises(KernelError, match=r"mount: .*EINVAL"):
        mounts.mount("none", place, "tmpfs", 0, "no_such_option")
    with pytest.raises(KernelError, match="ENOENT"):
        mounts.mount("none", place + "/none", "tmpfs", 0, "")
    with pytest.raises(KernelError, match=r"umount2: .*EINVAL"):
        mounts.umount(place)


def test_busy(place):
    tmpfs(place)
    with open(f"{place}/file", "w"):
        with pytest.raises(DeviceBusyError, match=r"umount2: .*EBUSY"):
            mounts.umount(place)
    mounts.umount(place)


def test_not_permitted(place):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setuid(65534)
            tmpfs("/")
        except NotPermittedError:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
