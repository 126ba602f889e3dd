# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the documents say is what happens: their commands run, their options exist."""

from __future__ import annotations

import os
import re
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


@pytest.mark.parametrize("script", blocks("sh"))
def test_readme_commands(place, script):
    done = subprocess.run(["sh", "-eux"], input=script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert run("losetup", "-j", place / "disk.img") == ""


@pytest.mark.parametrize("program", blocks("python"))
def test_readme_programs(place, program):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "/dev/loop" in done.stdout
    assert run("losetup", "-j", place / "disk.img") == ""


def test_there_are_blocks():
    assert len(blocks("sh")) >= 2
    assert len(blocks("python")) >= 1


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
    assert "every checksum is right" in done.stdout
    assert "no loop device has the image" in done.stdout


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
