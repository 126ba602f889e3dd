# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The end of a map, whoever asks for it and however: nothing is left, and nobody else is hurt."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from loads import Holder, Reader
from mapped import (
    COMMAND,
    EIO,
    KIB,
    MIB,
    ROOT,
    Map,
    elapsed,
    empty_filesystem,
    loopdev,
    mounted,
    noise,
    ok,
    raw,
    read_all,
    read_fails,
    refused,
    stop,
    store,
)
from oracle import SLOW, losetup, run, wait_until
from test_bad_input import in_namespace


@pytest.fixture
def mapping(maps, tmp_path) -> Map:
    return maps(*raw(tmp_path, noise(MIB)))


@pytest.mark.parametrize("form", ["name", "path", "number"])
def test_what_it_is_called(mapping, form):
    what = {"name": mapping.name, "path": mapping.device, "number": mapping.number}[form]
    began = time.monotonic()
    assert ok("unmap", what) == ""
    assert elapsed(began) < 3
    assert mapping.is_gone()


def test_busy(mapping):
    """It is refused with who holds it, and the device is as it was."""
    with Holder(mapping.device) as holder:
        began = time.monotonic()
        refused(loopdev("unmap", mapping.name, "--timeout", 0.3), 4, f"(pid {holder.pid})")
        assert elapsed(began) < 8
        assert losetup(mapping.device)["autoclear"] is False
        assert read_all(mapping.device) == noise(MIB)
    ok("unmap", mapping.name)
    assert mapping.is_gone()


def test_busy_until_its_user_leaves(mapping):
    holder = Holder(mapping.device)
    unmap = subprocess.Popen([COMMAND, "unmap", mapping.name])
    time.sleep(0.3)
    assert unmap.poll() is None
    with holder:
        pass
    assert unmap.wait(5) == 0
    assert mapping.is_gone()


def test_lazy(mapping):
    """It is served until its last user leaves; then all of it goes, and nobody has to ask."""
    with Holder(mapping.device):
        ok("unmap", mapping.name, "--lazy")
        assert losetup(mapping.device)["autoclear"] is True
        assert read_all(mapping.device) == noise(MIB)
        assert mapping.exists()
    mapping.wait_gone(5)


@pytest.fixture
def filesystem(maps, tmp_path) -> Map:
    """A map whose users, being mounts, will not leave by themselves."""
    return maps(empty_filesystem(tmp_path))


def test_lazy_and_mounted(filesystem, tmp_path):
    with mounted(filesystem.device, tmp_path / "mnt", "ro,noload") as where:
        done = loopdev("unmap", filesystem.name)
        refused(done, 4, str(where))
        ok("unmap", filesystem.name, "--lazy")
        assert (where / "lost+found").is_dir()
    filesystem.wait_gone(5)


def test_lazy_and_nobody_uses_it(mapping):
    ok("unmap", mapping.name, "--lazy")
    assert mapping.is_gone()


def test_force(mapping):
    """Its users get errors; all of it is gone at once but the device, which they hold."""
    with Holder(mapping.device):
        began = time.monotonic()
        ok("unmap", mapping.name, "--force")
        assert elapsed(began) < 3
        assert not mapping.exists()
        assert read_fails(mapping.device, 0) == EIO
    wait_until(lambda: not os.path.exists(f"/sys/block/loop{mapping.number}/loop"))


def reads_of(number: int) -> int:
    return int(Path(f"/sys/block/loop{number}/stat").read_text().split()[0])


def test_force_during_reads(maps, tmp_path):
    mapping = maps(*store(tmp_path, noise(8 * MIB), 64 * KIB), "--cache-limit", MIB)
    words = ["dd", f"if={mapping.device}", "of=/dev/null", "iflag=direct", "bs=4k"]
    readers = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    before = reads_of(mapping.number)
    wait_until(lambda: reads_of(mapping.number) > before)
    ok("unmap", mapping.device, "--force")
    for reader in readers:
        _, said = reader.communicate(timeout=5 * SLOW)
        assert reader.returncode == 0 or "Input/output error" in said
    wait_until(lambda: not os.path.exists(f"/sys/block/loop{mapping.number}/loop"))


def test_the_file_itself_is_open(mapping):
    """Nobody needs it once the device is gone."""
    with Holder(mapping.image):
        ok("unmap", mapping.name, "--timeout", 0.3)
        assert not mapping.exists()
    mapping.wait_gone(5)


def test_twice_at_once(maps, tmp_path):
    for _ in range(5):
        mapping = maps(*raw(tmp_path, noise(MIB)))
        both = [
            subprocess.Popen([COMMAND, "unmap", mapping.name], stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [process.communicate(timeout=20 * SLOW)[1] for process in both]
        codes = sorted(process.returncode for process in both)
        assert codes in ([0, 0], [0, 3]), said
        assert mapping.is_gone()


def has_lock(pid: int) -> bool:
    """Return whether a process has locked a file or directory."""
    with contextlib.suppress(OSError):
        return any("lock:" in info.read_text() for info in Path(f"/proc/{pid}/fdinfo").iterdir())
    return False


def test_one_who_ends_it_is_stopped(mapping):
    """Another one does not wait for him for ever, and can do it when he is gone."""
    holder = Holder(mapping.device)
    first = subprocess.Popen([COMMAND, "unmap", mapping.name])
    wait_until(lambda: has_lock(first.pid))
    stop(first.pid)
    done = loopdev("unmap", mapping.name, "--timeout", 0.1)
    refused(done, 7, "somebody else is ending it")
    first.kill()
    first.wait()
    with holder:
        pass
    ok("unmap", mapping.name)


@pytest.mark.parametrize("what", ["t-nothing", "", ".", "..", "../maps", "a/b", ".new-x"])
def test_nothing_of_this_name(what):
    refused(loopdev("unmap", "--", what), 3, "nothing is mapped")


@pytest.mark.parametrize("what", ["/dev/null", "/dev/loop-control", "/nonexistent", "99999"])
def test_no_device_of_ours(what):
    done = loopdev("unmap", what)
    assert done.returncode in (2, 3), done
    assert done.stderr.startswith("loopdev: ")


def test_a_foreign_device(tmp_path):
    """It is left alone, and its backing file is named."""
    [image] = raw(tmp_path, noise(MIB))
    device = run("losetup", "-f", "--show", image).strip()
    try:
        for words in ((), ("--lazy",), ("--force",)):
            refused(loopdev("unmap", device, *words), 3, str(image))
        refused(loopdev("unmap", device.removeprefix("/dev/loop")), 3, str(image))
        assert losetup(device)["back-file"] == str(image)
    finally:
        run("losetup", "-d", device)


def test_one_that_fails_does_not_keep_the_others(maps, tmp_path):
    source = raw(tmp_path, noise(MIB))
    first, busy, last = maps(*source), maps(*source), maps(*source)
    with Holder(busy.device):
        done = loopdev("unmap", first.name, busy.name, "t-nothing", last.name, "--timeout", 0.2)
        assert done.returncode == 3
        assert len(done.stderr.splitlines()) == 2
        assert first.is_gone()
        assert last.is_gone()
        assert busy.is_bound()
    ok("unmap", busy.name)


ALL = """
lower=$("$1" map "$2" --name t-a) && "$1" map "$lower" --name t-b >&2 &&
"$1" maps >&2 && "$1" unmap --all --timeout 1 && "$1" maps && "$1" unmap --all &&
ls -A /run/loopdev/maps
"""


def test_all(tmp_path):
    """A map of a map, whose name sorts behind it; where nobody else has maps."""
    words = in_namespace(
        "mount -t tmpfs none /run",
        "sh",
        "-eu",
        "-c",
        ALL,
        "sh",
        COMMAND,
        *raw(tmp_path, noise(MIB)),
    )
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done
    assert done.stderr.count("serving") == 2


def test_all_and_a_name():
    assert loopdev("unmap", "--all", "x").returncode == 2


def test_without_a_name(mapping):
    """It lists what there is, and unmaps nothing."""
    assert mapping.name in ok("unmap")
    assert mapping.is_bound()
    ok("unmap", mapping.name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_supervisor(mapping, number):
    os.kill(mapping.supervisor(), number)
    mapping.wait_gone(5)


def test_a_signal_while_it_is_in_use(maps, filesystem, tmp_path):
    """As with unmap it is refused, and the log says by whom."""
    with mounted(filesystem.device, tmp_path / "mnt", "ro,noload") as where:
        os.kill(filesystem.supervisor(), signal.SIGTERM)
        wait_until(lambda: str(where) in maps.log(filesystem))
        assert filesystem.is_bound()
    ok("unmap", filesystem.name)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGPIPE])
def test_signals_that_say_nothing(mapping, number):
    for pid in mapping.processes():
        os.kill(pid, number)
    for pid in mapping.workers():
        os.kill(pid, signal.SIGTERM)
    assert read_all(mapping.device, direct=True) == noise(MIB)
    assert mapping.info()["restarts"] == 0
    ok("unmap", mapping.name)


def test_detached_by_hand(mapping):
    """losetup -d: the map ends by itself."""
    run("losetup", "-d", mapping.device)
    mapping.wait_gone(5)


def test_detached_by_hand_and_attached_by_another(maps, mapping, tmp_path):
    """The device is another's by then, and is left alone."""
    other = tmp_path / "other.img"
    other.write_bytes(noise(MIB, 8))
    run("losetup", "-d", mapping.device)
    run("losetup", mapping.device, other)
    try:
        mapping.wait_gone(5)
        assert losetup(mapping.device)["back-file"] == str(other)
    finally:
        run("losetup", "-d", mapping.device)


def test_the_mount_is_taken_away(mapping):
    """umount -l by hand: what has no user goes, and the device with it."""
    run("umount", "-l", mapping.image)
    wait_until(lambda: not os.path.exists(f"/sys/block/loop{mapping.number}/loop"))
    mapping.wait_gone(5)


def test_aborted_from_outside(mapping):
    """umount -f by hand: readers get errors, the list says why, and it can be unmapped."""
    subprocess.run(["umount", "-f", mapping.image], capture_output=True)
    wait_until(lambda: mapping.info()["status"] == "failed")
    assert mapping.info()["reason"] == "the connection was aborted"
    assert read_fails(mapping.device, 0) == EIO
    ok("unmap", mapping.name)
    assert mapping.is_gone()


def test_gc_leaves_what_lives(mapping):
    assert mapping.name not in ok("gc")
    reader = Reader(mapping.device, 0)
    assert reader.result(5) == 0
    ok("unmap", mapping.name)


def test_gc_and_what_is_no_map():
    """Directories that a maker left before they had a name; what is in them of others stays."""
    ROOT.mkdir(exist_ok=True)
    begun = ROOT / ".new-t-x-1-abcdef"
    begun.mkdir()
    (begun / "lock").touch()
    assert ".new-t-x-1-abcdef: never begun, removed" in ok("gc").splitlines()
    assert not begun.exists()


def test_gc_json(mapping):
    import json

    assert mapping.name not in {item["name"] for item in json.loads(ok("gc", "--json"))}
    ok("unmap", mapping.name)
