# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The beginning of a map: what goes wrong there is told, and leaves nothing; names; --once."""

from __future__ import annotations

import os
import random
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mapped import (
    COMMAND,
    MIB,
    ROOT,
    SNAPSHOT,
    elapsed,
    infos,
    kill,
    leftovers,
    loopdev,
    noise,
    ok,
    raw,
    read_all,
    refused,
    store,
)
from oracle import SLOW, run, wait_until
from pbs import VECTORS
from test_bad_input import in_namespace

# Images that cannot be mapped: the words after "map", the exit code, and what is said.


def test_bad_sources(maps, tmp_path):
    """Each has its exit code and one line that names what is wrong."""
    words = store(tmp_path, noise(MIB))
    place, repository = tmp_path / "store", ("--repository", tmp_path / "store")
    (tmp_path / "empty.img").touch()
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb" + bytes(1000))
    os.mkfifo(tmp_path / "pipe")
    (place / SNAPSHOT / "root.pxar.didx").touch()
    group = SNAPSHOT.rpartition("/")[0]
    for source, code, reason in (
        ((tmp_path / "none.img",), 3, "none.img"),
        ((tmp_path,), 6, "director"),
        ((tmp_path / "empty.img",), 6, "is empty"),
        ((tmp_path / "disk.qcow2",), 6, "qcow2"),
        ((tmp_path / "pipe",), 6, "pipe"),
        (("/dev/null",), 6, "null"),
        ((words[0], "--repository", tmp_path / "nowhere"), 3, "nowhere"),
        ((words[0], "--ns", "a/b", *repository), 3, "a/b"),
        ((f"{group}/2020-01-01T00:00:00Z/disk.img", *repository), 3, "2020-01-01T00:00:00Z"),
        (("vm/999/latest/disk.img", *repository), 3, "vm/999"),
        ((f"{SNAPSHOT}/other.img", *repository), 3, "other.img"),
        ((f"{SNAPSHOT}/root.pxar.didx", *repository), 2, "didx"),
        ((words[0], "--keyfile", tmp_path / "none.json", *repository), 8, "none.json"),
    ):
        name = maps.name()
        done = loopdev("map", *source, "--name", name)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert re.fullmatch(r"loopdev: [^\n]+\n", done.stderr), done
        assert reason in done.stderr, done
        assert leftovers(name) == []


def test_bad_keys(maps):
    """An encrypted image, without its key and with another one."""
    source = ("ns/test/vm/101/2024-01-03T03:04:05Z/drive-scsi0.img",)
    source += ("--repository", VECTORS / "datastore")
    for more in ((), ("--keyfile", VECTORS / "keys/key-none-other.json")):
        name = maps.name()
        done = loopdev("map", *source, *more, "--name", name)
        assert (done.returncode, done.stdout) == (8, ""), done
    mapping = maps(*source, "--keyfile", VECTORS / "keys/key-none.json")
    assert len(read_all(mapping.device)) == (8 << 20) + 540672
    ok("unmap", mapping.name)


@pytest.mark.parametrize(
    "words",
    [
        *(("--name", ""), ("--name", "a/b"), ("--name", ".x"), ("--name", "x" * 65)),
        *(("--name", "7"), ("--name", "-x"), ("--name", "\u00e4"), ("--workers", "0")),
        *(("--workers", "65"), ("--workers", "x"), ("--io-timeout", "0"), ("--io-timeout", "-1")),
        *(("--io-timeout", "nan"), ("--cache-limit", "-1"), ("--log", "/nonexistent/log")),
    ],
)
def test_bad_options(maps, tmp_path, words):
    done = loopdev("map", *raw(tmp_path, noise(MIB)), *words)
    assert done.returncode in (2, 3, 1), done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


# Names.


def test_a_name_that_is_taken(maps, tmp_path):
    source = raw(tmp_path, noise(MIB))
    mapping = maps(*source)
    refused(loopdev("map", *source, "--name", mapping.name), 4, f"named {mapping.name}")
    assert read_all(mapping.device) == noise(MIB)
    ok("unmap", mapping.name)


def test_names_that_are_made(maps, tmp_path):
    """Two maps of one image are two maps; a number is no name, since it is a device's."""
    image = tmp_path / "4711"
    image.write_bytes(noise(MIB))
    first, second = ok("map", image).strip(), ok("map", image).strip()
    assert first != second
    names = {info["device"]: info["name"] for info in infos()}
    assert names[first].startswith("image-4711")
    assert names[second] != names[first]
    odd = tmp_path / ".\u00fc b\n.img"
    odd.write_bytes(noise(MIB))
    third = ok("map", odd).strip()
    ok("unmap", first, second, third)


def test_once(maps, tmp_path):
    [image] = raw(tmp_path, noise(MIB))
    (tmp_path / "link.img").hardlink_to(image)
    mapping = maps(image)
    assert ok("map", image, "--once") == f"{mapping.device}\n"
    assert ok("map", tmp_path / "link.img", "--once") == f"{mapping.device}\n"
    other = ok("map", image).strip()
    assert other != mapping.device
    ok("unmap", mapping.name, other)
    again = ok("map", image, "--once").strip()
    assert read_all(again) == noise(MIB)
    ok("unmap", again)


def test_once_by_many_at_once(maps, tmp_path):
    source = store(tmp_path, noise(MIB))
    words = [COMMAND, "map", *map(str, source), "--once"]
    running = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    devices = {process.communicate(timeout=30 * SLOW)[0] for process in running}
    assert [process.returncode for process in running] == [0] * 8
    assert len(devices) == 1
    ok("unmap", devices.pop().strip())


def test_once_and_the_first_is_dead(maps, tmp_path):
    source = raw(tmp_path, noise(MIB))
    mapping = maps(*source)
    for pid in (mapping.supervisor(), *mapping.workers()):
        kill(pid)
    wait_until(lambda: not mapping.processes())
    device = ok("map", *source, "--once").strip()
    assert read_all(device) == noise(MIB)
    ok("unmap", device)
    ok("gc")


# A system that lacks something.


def in_system(script: str, name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Map where the mounts are other ones; then print what that left."""
    words = ("map", *words, "--name", name)
    look = (
        f'"$@"; code=$?; find /run/loopdev 2>/dev/null | grep {name}; '
        f"grep {name} /proc/self/mountinfo; exit $code"
    )
    command = in_namespace(script, "sh", "-c", look, "sh", COMMAND, *words)
    return subprocess.run(command, capture_output=True, text=True, timeout=60 * SLOW)


NO_FUSE = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/loop-control c 10 237"


@pytest.mark.parametrize(
    ("script", "code", "reason"),
    [
        (NO_FUSE, 3, "/dev/fuse"),
        ("mount --bind /dev/null /dev/fuse", 1, "mount"),
        ("mount -t tmpfs -o ro none /run", 1, "/run/loopdev"),
        (f"{NO_FUSE} && mknod /dev/fuse c 10 229 && rm /dev/loop-control", 3, "loop-control"),
    ],
)
def test_a_system_that_lacks_something(maps, tmp_path, script, code, reason):
    done = in_system(script, maps.name(), *raw(tmp_path, noise(MIB)))
    assert (done.returncode, done.stdout) == (code, ""), done
    assert re.fullmatch(r"loopdev: [^\n]+\n", done.stderr), done
    assert reason in done.stderr


LITTLE = [f"size={size}k" for size in (4, 8, 12, 16, 20, 24)]
LITTLE += [f"nr_inodes={count}" for count in range(2, 12)]


@pytest.mark.parametrize("limit", LITTLE)
def test_a_full_run(maps, tmp_path, limit):
    """Whatever cannot be written: an error, and nothing left; or a map that works."""
    script, name = f"mount -t tmpfs -o {limit} none /run", maps.name()
    done = in_system(script, name, *raw(tmp_path, noise(MIB)), "--log", tmp_path / "log")
    if done.returncode:
        assert done.stdout == "", done
        assert "No space left on device" in done.stderr
        assert done.stderr.count("\n") == 1
    else:
        # Its /run is no longer there, but its processes are.
        run("losetup", "-d", done.stdout.split()[0])
        pids = [p for p in Path("/proc").iterdir() if f"map {name}" in command_of(p)]
        assert pids
        wait_until(lambda: not any(name in command_of(pid) for pid in pids), 20)


def command_of(process: Path) -> str:
    try:
        return (process / "cmdline").read_text() if process.name.isdecimal() else ""
    except OSError:
        return ""


@pytest.mark.parametrize(
    "words", [("map", "IMAGE"), ("maps",), ("gc",), ("unmap", "NAME"), ("unmap", "--all")]
)
def test_no_privilege(maps, words):
    """Every command says so; none takes what it may not see for nothing."""
    place = Path(run("mktemp", "-d").strip())
    place.chmod(0o755)
    mapping = maps(*raw(place, noise(MIB)))
    try:
        named = {"IMAGE": place / "raw.img", "NAME": mapping.name}
        arguments = [str(named.get(word, word)) for word in words]
        command = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]
        script = "import sys; from loopdev.cli import main; sys.exit(main(sys.argv[1:]))"
        python = [os.path.realpath(sys.executable), "-c", script, *arguments]
        path = ":".join(path for path in sys.path if path)
        done = subprocess.run(
            [*command, *python], capture_output=True, text=True, env={"PYTHONPATH": path}
        )
        assert (done.returncode, done.stdout) == (5, ""), done
        assert "root" in done.stderr
        assert done.stderr.count("\n") == 1
    finally:
        ok("unmap", mapping.name)
        run("rm", "-r", place)


def test_rights(maps, tmp_path):
    """Only root can look into /run/loopdev/maps, and at the image."""
    mapping = maps(*raw(tmp_path, noise(MIB)))
    assert stat.S_IMODE(ROOT.stat().st_mode) == 0o700
    for path in mapping.directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    ok("unmap", mapping.name)


# The one who makes the map dies.


def test_the_caller_is_killed_while_the_map_begins(maps, tmp_path):
    """At any moment: what is left goes by itself, or by gc; nothing goes on."""
    source = store(tmp_path, noise(MIB))
    rng, names = random.Random(4), []
    began = time.monotonic()
    ok("unmap", maps(*source).name)
    whole = time.monotonic() - began
    for _ in range(60):
        names.append(maps.name())
        process = subprocess.Popen(
            [COMMAND, "map", *map(str, source), "--name", names[-1]], stdout=subprocess.PIPE
        )
        time.sleep(rng.random() * whole)
        process.kill()
        out, _ = process.communicate()
        if out:
            ok("unmap", names[-1])
    orphans = 0
    for name in names:
        try:
            wait_until(lambda name=name: not leftovers(name), 3)
        except AssertionError:
            orphans += 1
            maps_now = {info["name"]: info["status"] for info in infos()}
            if maps_now.get(name) != "dead":  # it was made, but could not be printed
                ok("unmap", name)
    ok("gc")
    assert [left for name in names for left in leftovers(name)] == []
    assert [name for name in os.listdir(ROOT) if "t-" in name and name.startswith(".")] == []
    assert orphans < 10


def test_output_that_cannot_be_written(maps, tmp_path):
    """Nobody learns the device's name, so it does not stay."""
    for target in ("/dev/full", None):
        name = maps.name()
        words = [COMMAND, "map", *map(str, raw(tmp_path, noise(MIB))), "--name", name]
        reading, writing = os.pipe()
        os.close(reading)
        output = open(target, "wb") if target else os.fdopen(writing, "wb")
        try:
            done = subprocess.run(words, stdout=output, stderr=subprocess.PIPE)
        finally:
            output.close()
            if target:
                os.close(writing)
        assert done.returncode != 0
        assert leftovers(name) == []


def test_workers_that_cannot_begin(maps, tmp_path):
    """The caller is told why, and nothing is left."""
    name = maps.name()
    script = (
        "import sys, loopdev.mapping._worker as worker; from loopdev.cli import main; "
        "worker._serve = lambda *args: 9; sys.exit(main(sys.argv[1:]))"
    )
    words = ["map", *raw(tmp_path, noise(MIB)), "--name", name, "--log", tmp_path / "log"]
    command = [sys.executable, "-c", script, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30 * SLOW)
    refused(done, 1, "12 workers died one after the other, the last ended with code 9")
    assert leftovers(name) == []


def test_begin_is_quick(maps, tmp_path):
    began = time.monotonic()
    mapping = maps(*store(tmp_path, noise(64 * MIB)))
    assert elapsed(began) < 3
    ok("unmap", mapping.name)
