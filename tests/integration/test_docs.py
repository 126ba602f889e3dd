# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the documents say is what happens: their commands run, their options exist."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from oracle import run

from loopdev.cli import COMMANDS
from loopdev.cli._args import load

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
MAN = ROOT / "docs/loopdev.1"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory as the README's reader has it: disk.img with a filesystem, and mnt."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    run("sfdisk", "-q", image, input="label: gpt\nsize=8MiB\nsize=20MiB\n")
    run("mkfs.ext4", "-q", "-E", f"offset={9 << 20}", image, "20M")
    (tmp_path / "mnt").mkdir()
    bin_directory = os.path.dirname(sys.executable)
    monkeypatch.setenv("PATH", f"{bin_directory}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The maps that a document makes are its own: others on the machine neither see them nor are
# touched by its gc. In memory, a datastore's 65536 directories cost little.
ALONE = """
mkdir -p /run/loopdev store && mount -t tmpfs none /run/loopdev && mount -t tmpfs none store
if [ "$1" = full ]; then
    loopdev key create --kdf none key.json
    loopdev pack --repository store --create-store --id vm/100 --keyfile key.json disk.img
fi >/dev/null 2>&1
shift
"$@"
code=$?
[ -z "$(ls /run/loopdev/maps 2>/dev/null)" ] || { ls -R /run/loopdev >&2; code=99; }
loopdev unmap --all --force
exit $code
"""


def alone(*command: str, text: str = "", full: bool) -> subprocess.CompletedProcess[str]:
    """Run a command with /run/loopdev and ./store to itself; full: the store has a snapshot."""
    how = "full" if full else "empty"
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", ALONE, "alone", how, *command],
        input=text,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("script", blocks("sh"))
def test_readme_commands(place, script):
    done = alone("sh", "-eux", text=script, full="store" in script and "pack" not in script)
    assert done.returncode == 0, done.stderr
    assert run("losetup", "-j", place / "disk.img") == ""


@pytest.mark.parametrize("program", blocks("python"))
def test_readme_programs(place, program):
    done = alone(sys.executable, "-W", "error", "-c", program, full="store" in program)
    assert done.returncode == 0, done.stderr
    assert "/dev/loop" in done.stdout
    assert run("losetup", "-j", place / "disk.img") == ""


def test_a_leftover_of_a_document_is_seen(place):
    """Else the tests above would not see one."""
    done = alone("loopdev", "map", "disk.img", full=False)
    assert done.returncode == 99
    assert "/run/loopdev/maps/disk.img" in done.stderr
    assert run("losetup", "-j", place / "disk.img") == ""


def test_there_are_blocks():
    """Each command is run by a document, but for the ones that print or change nothing here."""
    assert len(blocks("python")) >= 2
    shown = set(re.findall(r"loopdev ([a-z]+)", "".join(blocks("sh"))))
    assert set(COMMANDS) - shown == {"remove", "completion"}


def test_readme_names_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        assert set(re.findall(r"\bmake ([a-z][a-z-]+)\b(?! it)", text)) & {"demo", "test"}
        for target in re.findall(r"^    make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets


def test_demo():
    done = subprocess.run([sys.executable, ROOT / "tools/demo"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every checksum is right") == 2
    assert "no loop device has the image" in done.stdout
    assert "has a read that it did not answer" in done.stdout
    assert "no device, no mount, no process, no file" in done.stdout
    assert left_by_demo() == []


@pytest.mark.parametrize(
    "moment",
    ["loopdev info", "--create-store", "--cache-limit", "mount -o ro,noload", "has a read that it"],
)
def test_demo_cleans_up(moment):
    """When it is ended in the middle: attached, packing, mounted, with a worker stopped."""
    demo = subprocess.Popen(
        [sys.executable, ROOT / "tools/demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with demo:
        seen = any(moment in line for line in demo.stdout)
        demo.send_signal(signal.SIGTERM)
        demo.stdout.read()
    assert seen
    assert demo.returncode == 1
    assert left_by_demo() == []


def left_by_demo() -> list[str]:
    """Return the demo's files, mounts, devices and maps."""
    found = [str(path) for path in Path("/var/tmp").glob("loopdev-demo-*")]
    for directory in ("/run/loopdev/maps", "/var/log/loopdev"):
        found += [str(path) for path in Path(directory).glob("demo-*")]
    text = run("losetup", "--list", "-n", "-O", "BACK-FILE") + Path("/proc/mounts").read_text()
    return found + [line for line in text.splitlines() if "demo-" in line]


def test_man_page_has_every_command_and_option():
    text = MAN.read_text().replace("\\-", "-")
    for name in COMMANDS:
        command = load(name)
        assert f'.SS "loopdev {name}"' in text
        for option in command.OPTIONS:
            for word in option.names:
                assert re.search(rf"{re.escape(word)}\b", text), f"{word} of {name}"


def test_man_page_is_sound():
    done = subprocess.run(
        ["man", "--warnings", "-l", MAN],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "LOOPDEV(1)" in done.stdout
