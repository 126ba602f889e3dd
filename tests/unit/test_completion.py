# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What shells offer: in bash as at a prompt, in zsh and fish where they are installed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pbs import DISK, ENCRYPTED, SIGNED, SNAPSHOT, VECTORS

from loopdev.cli import main

STORE = str(VECTORS / "datastore")
LOOPDEV = str(Path(sys.executable).parent / "loopdev")
IMAGES = [f"{name}/{DISK}" for name in (SNAPSHOT, ENCRYPTED, SIGNED)]
GROUPS = ["vm/100", "ns/test/vm/101", "ns/test/deep/vm/102"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("PBS_REPOSITORY", raising=False)


@pytest.fixture
def script(tmp_path, capsys):
    def make(shell: str) -> str:
        assert main(["completion", shell]) == 0
        path = tmp_path / f"completion.{shell}"
        path.write_text(capsys.readouterr().out)
        return str(path)

    return make


def in_bash(script: str, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    line = " ".join(map(shlex.quote, (LOOPDEV, *words)))
    ask = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; "
        '_shtab_loopdev; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["verify", ""], IMAGES),
        (["verify", "vm/"], IMAGES[:1]),
        (["verify", "vm/100/2024-01-02T03:"], IMAGES[:1]),
        (["verify", "--ns", "test", ""], IMAGES[1:]),
        (["verify", "x"], []),
        (["snapshots", ""], GROUPS),
        (["snapshots", "vm/100", "ns/test/v"], ["ns/test/vm/101"]),
    ],
)
def test_bash(script, words, offered):
    command, *rest = words
    assert in_bash(script("bash"), command, "--repository", STORE, *rest) == offered


def test_bash_takes_the_datastore_of_the_environment(script, monkeypatch):
    path = script("bash")
    assert in_bash(path, "verify", "") == []
    monkeypatch.setenv("PBS_REPOSITORY", STORE)
    assert in_bash(path, "verify", "") == IMAGES


def test_bash_offers_files_and_devices(script, tmp_path, monkeypatch):
    (tmp_path / "disk.img").touch()
    monkeypatch.chdir(tmp_path)
    path = script("bash")
    assert in_bash(path, "attach", "dis") == ["disk.img"]
    assert in_bash(path, "detach", "dis") == ["disk.img"]
    devices = [str(device) for device in Path("/dev").glob("loop[0-9]*")]
    assert set(in_bash(path, "detach", "/dev/loop")) >= set(devices)


def test_the_names_of_snapshots_stay_one_word(script):
    """Bash would take them apart at each colon."""
    ask = f'source {script("bash")}; echo "$COMP_WORDBREAKS"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert ":" not in done.stdout


@pytest.mark.skipif(not shutil.which("fish"), reason="there is no fish")
@pytest.mark.parametrize(
    ("line", "offered"),
    [("verify --repository {} ", IMAGES), ("snapshots --repository={} ", GROUPS)],
)
def test_fish(script, line, offered):
    ask = f"source {script('fish')}; complete -C 'loopdev {line.format(STORE)}'"
    path = f"{os.path.dirname(LOOPDEV)}:{os.environ['PATH']}"
    done = subprocess.run(
        ["fish", "--no-config", "-c", ask],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.stderr == ""
    assert [row.partition("\t")[0] for row in done.stdout.splitlines()] == offered


@pytest.mark.skipif(not shutil.which("zsh"), reason="there is no zsh")
def test_zsh(script):
    """With what completes a word replaced by what prints it."""
    functions = Path(script("zsh")).read_text()
    begin = functions.index("_loopdev_table()")
    end = functions.index("\n}\n", functions.index("_loopdev_groups()")) + 3
    ask = (
        f"{functions[begin:end]}\n"
        "compadd() { print -l -- ${(P)2} }\n"
        f"words=({LOOPDEV} verify --repository {STORE} ''); _loopdev_images; _loopdev_groups"
    )
    done = subprocess.run(["zsh", "-f", "-c", ask], capture_output=True, text=True)
    assert done.stdout.split() == IMAGES + GROUPS
