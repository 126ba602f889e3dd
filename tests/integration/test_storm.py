# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Many processes at once: every attach succeeds, every device shows its own file, nothing stays."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from conftest import bound_to, nodes, numbers
from oracle import run, wait_until

import loopdev

PROCESSES = 32
CYCLES = 50

OPENER = """
import os, fcntl
print("ready", flush=True)
while True:
    for name in os.listdir("/dev"):
        if not name.startswith("loop") or name == "loop-control":
            continue
        try:
            fd = os.open("/dev/" + name, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pread(fd, 4096, 0)
        except OSError:
            pass
        os.close(fd)
"""


def cycles(image: Path, mark: bytes, options: dict[str, object]) -> None:
    for turn in range(CYCLES):
        with loopdev.attach(image, timeout=120, **options) as device:
            with open(device.path, "r+b", buffering=0) as file:
                assert file.read(8) == mark, "this is somebody else's file"
                file.seek(4096)
                file.write(struct.pack("<Q504x", turn))
            # Whoever looks at every device may have it open, for as long as that takes.
            device.detach(timeout=60)
        with open(image, "rb") as file:
            file.seek(4096)
            assert struct.unpack("<Q", file.read(8)) == (turn,), "the write is lost"


def storm(directory: Path, options: dict[str, object]) -> None:
    """Run the storm, each process in a child; the children report by their exit code."""
    children = []
    for index in range(PROCESSES):
        image = directory / f"{index}.img"
        mark = struct.pack("<Q", index)
        with open(image, "wb") as file:
            file.write(mark)
            file.truncate(1 << 20)
        pid = os.fork()
        if pid == 0:
            try:
                cycles(image, mark, options)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * PROCESSES


@pytest.mark.parametrize("lock", [False, True])
def test_storm(tmp_path, lock):
    devices_before, nodes_before = numbers(), nodes()
    storm(tmp_path, {"lock": lock})
    assert bound_to(str(tmp_path)) == {}
    if os.environ.get("LOOPDEV_TEST_LOOP") == "1":  # nobody else adds devices
        assert (numbers() - devices_before, nodes() - nodes_before) == (set(), set())


def test_storm_among_openers_of_every_device(tmp_path):
    openers = [
        subprocess.Popen([sys.executable, "-c", OPENER], stdout=subprocess.PIPE) for _ in range(2)
    ]
    try:
        for opener in openers:
            opener.stdout.readline()
        storm(tmp_path, {})
    finally:
        for opener in openers:
            opener.kill()
            opener.wait()
            opener.stdout.close()
    assert bound_to(str(tmp_path)) == {}


def test_storm_of_commands(tmp_path):
    """The same by the command, whose processes remember nothing."""
    command = Path(sys.executable).with_name("loopdev")
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(1 << 20)
    script = (
        f'for i in $(seq 10); do {command} detach "$({command} attach {image})" || exit 1; done'
    )
    shells = [subprocess.Popen(["sh", "-ec", script]) for _ in range(8)]
    assert [shell.wait() for shell in shells] == [0] * 8
    assert run("losetup", "-j", image) == ""


def test_killed_in_the_middle(tmp_path):
    """SIGKILL at any point of attach() or detach() leaves no device bound."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    run("sfdisk", "-q", image, input="label: gpt\nsize=1MiB\n")
    code = f"""
import loopdev
print("ready", flush=True)
while True:
    with loopdev.attach({str(image)!r}, partscan=True):
        pass
"""
    for turn in range(25):
        victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        victim.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            victim.wait(0.0007 * turn)
        victim.kill()
        victim.wait()
        victim.stdout.close()
        wait_until(lambda: not bound_to(str(tmp_path)))
