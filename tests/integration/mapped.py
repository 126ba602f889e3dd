# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Maps for tests, and what is left of them: seen in /run, /proc and /sys, not asked of our code."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loads import Reader
from oracle import SLOW, run, sysfs, wait_until

sys.path.append(str(Path(__file__).resolve().parent.parent / "unit"))
from pbs import make_snapshot

COMMAND = os.path.join(os.path.dirname(sys.executable), "loopdev")
ROOT = Path("/run/loopdev/maps")
KIB, MIB = 1 << 10, 1 << 20
SNAPSHOT = "vm/100/2026-01-02T03:04:05Z"
ARCHIVE = "disk.img"
_counter = itertools.count()


class Map:
    """A map as its files and processes show it."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.directory = ROOT / name
        self.image = self.directory / "image"
        self.diskseq = sysfs(self.number, "diskseq") if device else None

    @property
    def number(self) -> int:
        return int(self.device.removeprefix("/dev/loop"))

    def supervisor(self) -> int | None:
        """Return the process that has the supervisor's lock open."""
        found = openers(self.directory / "supervisor")
        # A worker has it, too, until it has closed what is not its own.
        first = [pid for pid in found if parent_of(pid) not in found]
        return first[0] if first else None

    def workers(self) -> list[int]:
        supervisor = self.supervisor()
        found = [pid for pid in openers(self.directory / "lock") if pid != supervisor]
        # Not who waits for the end of the map.
        return [pid for pid in found if parent_of(pid) in (supervisor, 1)]

    def processes(self) -> list[int]:
        return openers(self.directory / "lock")

    def info(self) -> dict[str, object]:
        [found] = [info for info in infos() if info["name"] == self.name]
        return found

    def exists(self) -> bool:
        return self.directory.exists()

    def is_bound(self) -> bool:
        return sysfs(self.number, "loop/backing_file") == str(self.image)

    def is_gone(self) -> bool:
        return not leftovers(self.name)

    def is_attached(self) -> bool:
        """Return whether the device is still this attachment, whatever its file is called."""
        bound = sysfs(self.number, "loop/backing_file") is not None
        return bound and sysfs(self.number, "diskseq") == self.diskseq

    def wait_gone(self, timeout: float = 10.0) -> None:
        wait_until(self.is_gone, timeout)


class Maps:
    """Makes the maps of one test, and sees that none of them leaves anything.

    Args:
        directory: The test's own.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names: list[str] = []
        self.made: list[Map] = []

    def name(self) -> str:
        """Return a name that no other test takes."""
        self.names.append(f"t-{os.getpid()}-{next(_counter)}")
        return self.names[-1]

    def __call__(self, source: object, *options: object, name: str | None = None) -> Map:
        """Map an image, which must succeed."""
        name = name or self.name()
        log = self.directory / f"{name}.log"
        words = ("map", source, "--name", name, "--log", log, *options)
        done = loopdev(*words)
        assert (done.returncode, done.stderr) == (0, ""), done
        self.made.append(Map(name, done.stdout.strip()))
        return self.made[-1]

    def log(self, of: Map) -> str:
        path = self.directory / f"{of.name}.log"
        return path.read_text() if path.exists() else ""

    def left(self) -> list[str]:
        """Return what is there of the test's maps."""
        found = [f"{made.device} is attached" for made in self.made if made.is_attached()]
        return found + [what for name in self._all_names() for what in leftovers(name)]

    def _all_names(self) -> set[str]:
        return {*self.names, *self._unnamed()}

    def _unnamed(self) -> list[str]:
        # Maps that a test let the command name.
        found = []
        for path in ROOT.glob("*/state.json"):
            with contextlib.suppress(OSError):
                if str(self.directory) in path.read_text():
                    found.append(path.parent.name)
        return found

    def remove(self) -> None:
        """Remove, by hand, what is left."""
        for name in self._all_names():
            demolish(name)
            Path(f"/var/log/loopdev/{name}.log").unlink(missing_ok=True)
        for made in self.made:
            if made.is_attached():
                subprocess.run(["losetup", "-d", made.device])
        while Reader.all:
            Reader.all.pop().end()


def loopdev(*words: object, **options) -> subprocess.CompletedProcess[str]:
    """Run the command, for at most 60 seconds (on a usual machine)."""
    options = {"capture_output": True, "timeout": 60 * SLOW, "text": True, **options}
    return subprocess.run([COMMAND, *map(str, words)], **options)


def ok(*words: object, **options) -> str:
    """Run the command, which must succeed without a complaint."""
    done = loopdev(*words, **options)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


def refused(done: subprocess.CompletedProcess[str], exit_code: int, reason: str) -> None:
    """Check that a command failed with one clear line."""
    assert (done.returncode, done.stdout) == (exit_code, ""), done
    assert done.stderr.startswith("loopdev: "), done
    assert done.stderr.count("\n") == 1, done
    assert reason in done.stderr, done


def infos() -> list[dict[str, object]]:
    return json.loads(ok("maps", "--json"))


def openers(path: Path) -> list[int]:
    """Return the processes that have a file, or one below a directory, open."""
    processes = [process for process in Path("/proc").iterdir() if process.name.isdecimal()]
    return sorted(
        int(process.name)
        for process in processes
        if any(link == str(path) or link.startswith(f"{path}/") for link in links(process))
    )


def links(process: Path) -> list[str]:
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(process / "fd"):
            with contextlib.suppress(OSError):
                found.append(os.readlink(process / "fd" / name))
    return found


def mounts() -> list[str]:
    """Return the mount points, as the kernel has them."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4].replace("\\040", " ") for line in lines]


def leftovers(name: str) -> list[str]:
    """Return what is there of a map."""
    until = time.monotonic() + SLOW
    while (found := _leftovers(name)) and all(what.startswith("process") for what in found):
        if time.monotonic() > until:
            break  # else it may be somebody who looks at all maps
    return found


def _leftovers(name: str) -> list[str]:
    directory = ROOT / name
    found = [f"{directory} exists"] if os.path.lexists(directory) else []
    found += [f"{target} is mounted" for target in mounts() if target == f"{directory}/image"]
    found += [f"process {pid}" for pid in openers(directory)]
    for block in Path("/sys/block").glob("loop*"):
        with contextlib.suppress(OSError):
            if (block / "loop/backing_file").read_text().startswith(f"{directory}/"):
                found.append(f"{block.name} is bound")
    return found


def demolish(name: str) -> None:
    """Remove a map by hand, whatever state it is in."""
    directory = ROOT / name
    for pid in openers(directory):
        kill(pid)
    for block in Path("/sys/block").glob("loop*"):
        with contextlib.suppress(OSError):
            if (block / "loop/backing_file").read_text().startswith(f"{directory}/"):
                subprocess.run(["losetup", "-d", f"/dev/{block.name}"])
    while f"{directory}/image" in mounts():
        subprocess.run(["umount", "-l", directory / "image"])
    subprocess.run(["rm", "-rf", directory])


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def state_of(pid: int) -> str:
    """Return the state of a process as ps has it, "" when it is dead."""
    return stat(pid)[0].replace("Z", "")  # Z: nobody has waited for it yet


def parent_of(pid: int) -> int:
    return int(stat(pid)[1])


def stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["", "0"]


def stop(pid: int) -> None:
    """Stop a process, and return when it is."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state_of(pid) == "T")


def noise(length: int, seed: int = 1) -> bytes:
    """Return bytes in which no two places look alike."""
    return random.Random(seed).randbytes(length)


def store(directory: Path, data: bytes, chunk_size: int = 4 * MIB) -> tuple[object, ...]:
    """Write a datastore with one image, and return the words that name it."""
    place = directory / "store"
    make_snapshot(place, SNAPSHOT, data, chunk_size, ARCHIVE)
    return f"{SNAPSHOT}/{ARCHIVE}", "--repository", place


def raw(directory: Path, data: bytes) -> tuple[object, ...]:
    """Write a raw image, and return the words that name it."""
    path = directory / "raw.img"
    path.write_bytes(data)
    return (path,)


def read_direct(path: object, offset: int, length: int) -> bytes:
    """Read past the page cache."""
    with mmap.mmap(-1, max(length, 1)) as buffer:
        fd = os.open(str(path), os.O_RDONLY | os.O_DIRECT)
        try:
            count = os.preadv(fd, [memoryview(buffer)[:length]], offset)
        finally:
            os.close(fd)
        return buffer[:count]


def read_all(path: object, direct: bool = False) -> bytes:
    """Read a device from its beginning to its end."""
    options = ["iflag=direct"] if direct else []
    words = ["dd", f"if={path}", "bs=1M", "status=none", *options]
    return subprocess.run(words, check=True, capture_output=True).stdout


def read_fails(path: object, offset: int, length: int = 4096) -> int | None:
    """Return the errno of a direct read, None if it succeeds."""
    try:
        read_direct(path, offset, length)
    except OSError as exc:
        return exc.errno
    return None


def drop_cache(path: object) -> None:
    """Have the next read of a file or device ask whoever is behind it."""
    fd = os.open(str(path), os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def padded(data: bytes, sector: int = 512) -> bytes:
    return data + bytes(-len(data) % sector)


def empty_filesystem(directory: Path) -> Path:
    image = directory / "fs.img"
    with open(image, "wb") as file:
        file.truncate(8 * MIB)
    run("mkfs.ext4", "-q", image)
    return image


@contextlib.contextmanager
def mounted(device: str, where: Path, options: str = "ro"):
    where.mkdir(exist_ok=True)
    run("mount", "-o", options, device, where)
    try:
        yield where
    finally:
        run("umount", where)


@functools.cache
def can_resend() -> bool:
    """Return whether the kernel gives to other workers what a dead one had: Linux 6.9 does."""
    from loopdev.fuse.session import Session
    from loopdev.kernel import mounts

    with tempfile.NamedTemporaryFile() as file:
        session = Session.mount(file.name, "test")
        mounts.umount(file.name)  # umount(8) would ask for attributes, and nobody answers
        session.close()
    return session.init.resend


def elapsed(since: float) -> float:
    """Return how many seconds it would have taken on a usual machine."""
    return (time.monotonic() - since) / SLOW


EIO = errno.EIO
