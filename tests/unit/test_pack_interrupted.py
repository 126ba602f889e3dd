# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Pack is ended at every point, by signals and by errors: what was in the store stays readable.

strace brings each about: it kills the process at the Nth call of a kind, or has that call fail.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from pbs import KEY, KEY_FILE
from pbs_reader import CHUNK, read_image, snapshots

import loopdev
from loopdev.images.pbs._workdir import PREFIX, WorkDirectory, remove_abandoned

START = "import sys; from loopdev.cli import main; sys.exit(main())"
OLD = "vm/100/2024-01-02T03:04:05Z"
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a tmpfs")


def contents(*seeds: int) -> bytes:
    """Return a chunk for each seed, and a short one."""
    return b"".join(random.Random(seed).randbytes(CHUNK) for seed in seeds) + b"end"


OLD_IMAGE = contents(1, 2, 3)
NEW_IMAGE = contents(4, 5, 2, 6)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A datastore with one snapshot, of contents(1)."""
    fill(tmp_path / "store", tmp_path)
    return tmp_path / "store"


def fill(store: Path, directory: Path) -> None:
    (store / ".chunks").mkdir(parents=True)
    old = directory / "disk.img"
    old.write_bytes(OLD_IMAGE)
    loopdev.pack([str(old)], str(store), "vm/100", time=1704164645)


@pytest.fixture
def image(tmp_path: Path) -> str:
    """An image that shares one chunk with the snapshot that is there."""
    path = tmp_path / "new.img"
    path.write_bytes(NEW_IMAGE)
    return str(path)


def command(store: Path, image: str, *options: str) -> list[str]:
    words = ["pack", image, "--repository", str(store), "--id", "vm/100", *options]
    return [sys.executable, "-c", START, *words]


def run(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*words], capture_output=True, text=True, **options)


def traced(what: str, store: Path, image: str) -> subprocess.CompletedProcess[str]:
    """Run pack with faults injected where strace's expression says."""
    log = os.fspath(store.parent / "trace")
    return run(
        *("strace", "-f", "-qq", "-o", log, "-e", f"inject={what}"),
        *command(store, image, "--jobs", "1"),
    )


def check(store: Path, complete: int | None = None) -> None:
    """Check that every snapshot that is listed reads, the old one among them."""
    listed = snapshots(store)
    assert OLD in listed
    assert complete is None or len(listed) == complete
    for name in listed:
        archive = "disk.img" if name == OLD else "new.img"
        data = OLD_IMAGE if name == OLD else NEW_IMAGE
        assert read_image(store, name, archive) == data
    for directory in store.glob("vm/100/*Z"):
        assert (directory / "index.json.blob").exists(), "half a snapshot"
    for chunk in store.glob(".chunks/*/*"):
        assert re.fullmatch("[0-9a-f]{64}", chunk.name)
        assert chunk.stat().st_size > 0


def leftovers(store: Path) -> list[Path]:
    return [*store.glob(f"{PREFIX}*")]


# How often one thread makes each, at least: rename for three chunks and the snapshot, and so on.
CALLS = {
    "rename": 4,
    "writev": 3,
    "syncfs": 2,
    "fsync": 4,
    "mkdir": 4,
    "utimensat": 1,
    "fchmod": 3,
    "chmod": 1,
    "flock": 2,
    "rmdir": 1,
}


@needs_strace
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_every_call(store, image, call):
    """SIGKILL at the first, second, ... call of a kind, until there is no such call."""
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        done = traced(f"{call}:signal=SIGKILL:when={number}", store, image)
        code = done.returncode
        check(store)
    assert code == 0, done.stderr
    assert number - 1 >= CALLS[call]
    assert leftovers(store) == []


@needs_strace
@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("writev:error=ENOSPC", 1, "No space left on device"),
        ("syncfs:error=EIO", 1, "syncfs: Input/output error"),
        ("rename:error=EDQUOT", 1, "Disk quota exceeded"),
        ("fsync:error=EIO", 1, "fsync: Input/output error"),
        ("preadv2:error=EIO", 6, "Input/output error (bytes"),
        ("utimensat:error=EPERM", 5, "Operation not permitted"),
        ("mkdir:error=EROFS", 1, "Read-only file system"),
    ],
)
def test_error_at_every_call(store, image, what, code, message):
    """The same with errors: these are told, and leave nothing."""
    number, failed = 0, 0
    while True:
        number += 1
        done = traced(f"{what}:when={number}", store, image)
        check(store)
        assert leftovers(store) == []
        if done.returncode == 0:
            break
        failed += 1
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
    assert failed > 0


@needs_strace
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("call", ["writev", "syncfs", "preadv2"])
def test_signals_undo(store, image, call, number):
    done = traced(f"{call}:signal={number.name}:when=1:delay_exit=100000", store, image)
    if done.returncode != 0:  # it may come too late to be noticed: then it was done
        assert done.returncode in (128 + number, -number), done.stderr
        assert done.stdout == ""
    assert leftovers(store) == []
    check(store, 1 if done.returncode else 2)


def test_killed_at_random(store, image):
    """Without strace's help, at any moment between start and end."""
    begun = time.monotonic()
    assert run(*command(store, image, "--time", "7")).returncode == 0
    whole = time.monotonic() - begun
    source = random.Random(5)
    for _ in range(15):
        for path in store.glob("vm/100/2[!0]*"):
            shutil.rmtree(path)
        process = subprocess.Popen(
            command(store, image), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(source.uniform(0, whole * 1.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        check(store)
    assert run(*command(store, image)).returncode == 0
    check(store)
    assert leftovers(store) == []


@needs_strace
def test_what_is_on_the_disk_when(store, image):
    """No chunk gets its name, and no snapshot appears, before a sync has vouched for it."""
    log = store.parent / "trace"
    done = run(
        *("strace", "-f", "-qq", "-y", "-s", "300", "-o", str(log)),
        *("-e", "trace=openat,rename,syncfs,fsync"),
        *command(store, image, "--jobs", "1"),
    )
    assert done.returncode == 0, done.stderr
    kinds = [*filter(None, map(kind_of, log.read_text().splitlines()))]
    order = "".join(kind for kind, _ in groups(kinds))
    # Chunks are written, synced, renamed; the index written, synced with the chunks' names; then
    # the manifest written and synced with its directory, the snapshot renamed, and that synced.
    assert order == "WSRIS" + "M" + "F" + "P" + "F", order


def kind_of(line: str) -> str:
    if re.search(r"openat\(.*/[0-9a-f]{64}\", O_WRONLY", line):
        return "W"
    if re.search(r"rename\(\"[^\"]*/[0-9a-f]{64}\"", line):
        return "R"
    if re.search(r"openat\(.*\.fidx\", O_WRONLY", line):
        return "I"
    if re.search(r"openat\(.*index\.json\.blob\", O_WRONLY", line):
        return "M"
    if re.search(r"rename\(.*/snapshot\"", line):
        return "P"
    return {"syncfs": "S", "fsync(": "F"}.get(line.split(maxsplit=1)[1][:6], "")


def groups(kinds: list[str]) -> list[tuple[str, int]]:
    import itertools

    return [(kind, len([*same])) for kind, same in itertools.groupby(kinds)]


def test_what_a_killed_run_left_is_removed_and_what_runs_is_not(store, image):
    dead = store / f"{PREFIX}dead"
    (dead / "snapshot").mkdir(parents=True)
    (dead / "snapshot/x").write_bytes(b"x")
    (store / f"{PREFIX}file").write_bytes(b"no directory")
    (store / f"{PREFIX}link").symlink_to(store / "vm")
    with WorkDirectory.make(str(store)) as running:
        assert not dead.exists()
        assert run(*command(store, image)).returncode == 0
        assert os.path.isdir(running.path)
    assert remove_abandoned(str(store)) == 0
    check(store, 2)


def test_two_at_once(store, image):
    """Two packs of the same images into the same group, and more into others."""
    words = command(store, image)
    groups = ["vm/100", "vm/100", "vm/101", "ns/a/vm/100", "ns/a/vm/101"]
    processes = [
        subprocess.Popen([*words[:-1], group], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for group in groups
    ]
    names = set()
    for process in processes:
        out, error = process.communicate()
        assert process.returncode == 0, error
        names.add(out.decode().strip().removesuffix("/new.img"))
    assert len(names) == len(groups)
    for name in names:
        assert read_image(store, name, "new.img") == NEW_IMAGE
    assert leftovers(store) == []


def test_the_same_time_twice_at_once(store, image):
    """One of them has it, the other is refused, and nothing is half."""
    words = command(store, image, "--time", "2025-01-01T00:00:00Z")
    processes = [
        subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in "12"
    ]
    errors = [process.communicate()[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    assert b"exists already" in b"".join(errors)
    check(store, 2)


@pytest.fixture
def small(tmp_path: Path):
    """A datastore with one snapshot, on a filesystem with room for one chunk more."""
    where = tmp_path / "mnt"
    where.mkdir()
    options = f"size={5 * CHUNK + (64 << 10)}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], check=True)
    try:
        fill(where / "store", tmp_path)
        yield where / "store"
    finally:
        subprocess.run(["umount", where], check=True)


@needs_root
def test_full_disk(small, image):
    before = os.statvfs(small).f_bfree
    done = run(*command(small, image))
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    check(small, 1)
    assert leftovers(small) == []
    assert before - os.statvfs(small).f_bfree <= (CHUNK + 65536) // 4096


@needs_root
def test_read_only_store(small, image):
    subprocess.run(["mount", "-o", "remount,ro", small.parent], check=True)
    done = run(*command(small, image))
    assert done.returncode == 1
    assert done.stderr == f"loopdev: {small}: mkdir: Read-only file system (EROFS)\n"
    check(small, 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_store_of_somebody_else(tmp_path):
    """Modes let anybody read it, and only its owner write."""
    # Whoever that is cannot come to Python or tmp_path: all is imported before, and below /tmp.
    program = (
        "import os, sys, loopdev; os.chdir(sys.argv[1])\n"
        "for user in (0, 65534):\n"
        "    os.setuid(user)\n"
        "    loopdev.pack(['disk.img'], './store', 'vm/100')\n"
    )
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        fill(Path(name, "store"), Path(name))
        done = run(sys.executable, "-c", program, name)
        assert "loopdev.errors.NotPermittedError: " in done.stderr, done.stderr
        assert "mkdir: Permission denied (EACCES)" in done.stderr
        listed = snapshots(Path(name, "store"))
        assert len(listed) == 2
        assert all(read_image(Path(name, "store"), x, "disk.img") == OLD_IMAGE for x in listed)


def test_image_that_shrinks(store, tmp_path):
    """Whether it is read or taken for a hole by then: what is missing is told."""
    path = tmp_path / "shrinks.img"
    for size in (0, CHUNK, 40 * CHUNK):
        path.write_bytes(contents(7, 8))
        os.truncate(path, 50 * CHUNK)
        with pytest.raises(loopdev.ImageReadError, match="shorter while it was"):
            loopdev.pack(
                [str(path)], str(store), "vm/100", report=lambda _, end=size: os.truncate(path, end)
            )
        check(store, 1)
    assert leftovers(store) == []


def test_image_that_vanishes(store, image):
    """The name goes; the file that was opened does not."""
    unlink = {image}

    def remove(_progress: object) -> None:
        if unlink:
            os.unlink(unlink.pop())

    loopdev.pack([image], str(store), "vm/100", report=remove, keyfile=KEY_FILE)
    [new] = set(snapshots(store)) - {OLD}
    assert read_image(store, new, "new.img", KEY) == NEW_IMAGE


def test_error_of_the_callers_own(store, image):
    """What report() raises ends the run, and passes."""
    with pytest.raises(ZeroDivisionError):
        loopdev.pack([image], str(store), "vm/100", report=lambda _: 1 // 0)
    check(store, 1)
    assert leftovers(store) == []
