# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What shells offer at a prompt: commands, files, devices, and what is in a datastore."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from pbs import DISK, ENCRYPTED, SIGNED, SNAPSHOT, VECTORS
from shells import ask

STORE = str(VECTORS / "datastore")
IMAGES = [f"{name}/{DISK}" for name in (SNAPSHOT, ENCRYPTED, SIGNED)]
GROUPS = ["vm/100", "ns/test/vm/101", "ns/test/deep/vm/102"]

every_shell = pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("PBS_REPOSITORY", raising=False)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory to be in, with a file and a directory."""
    place = tmp_path / "place"
    (place / "directory").mkdir(parents=True)
    (place / "disk.img").touch()
    monkeypatch.chdir(place)
    return place


@every_shell
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["verify", "--repository", STORE, ""], IMAGES),
        (["verify", "--repository", STORE, "vm/"], IMAGES[:1]),
        (["verify", "--repository", STORE, "vm/100/2024-01-02T03:"], IMAGES[:1]),
        (["verify", "--repository", STORE, "--ns", "test", ""], IMAGES[1:]),
        (["verify", "--repository", STORE, "x"], []),
        (["snapshots", "--repository", STORE, ""], GROUPS),
        (["snapshots", "--repository", STORE, "vm/100", "ns/test/v"], ["ns/test/vm/101"]),
    ],
)
def test_what_is_in_a_datastore(tmp_path, shell, words, offered):
    found = ask(shell, tmp_path, *words)
    assert sorted(found) == sorted(offered)


@every_shell
def test_the_datastore_of_the_environment(tmp_path, shell, monkeypatch):
    assert ask(shell, tmp_path, "verify", "v") == []
    monkeypatch.setenv("PBS_REPOSITORY", STORE)
    assert ask(shell, tmp_path, "verify", "v") == IMAGES[:1]


@every_shell
def test_what_can_be_mapped(tmp_path, place, shell):
    found = ask(shell, tmp_path, "map", "--repository", STORE, "")
    assert {"disk.img", *IMAGES} <= set(found)


@every_shell
@pytest.mark.parametrize(("option", "offered"), [("--keyfile", True), ("--repository", False)])
def test_values_of_options(tmp_path, place, shell, option, offered):
    """A key is a file; a datastore is a directory, and no file."""
    found = {name.rstrip("/") for name in ask(shell, tmp_path, "map", option, "di")}
    assert found == ({"directory", "disk.img"} if offered else {"directory"})


@every_shell
def test_commands(tmp_path, shell):
    assert set(ask(shell, tmp_path, "un")) == {"unmap"}
    assert {"map", "maps"} <= set(ask(shell, tmp_path, "ma"))


@every_shell
def test_files_and_devices(tmp_path, place, shell):
    assert ask(shell, tmp_path, "attach", "dis") == ["disk.img"]
    assert ask(shell, tmp_path, "detach", "0", "dis") == ["disk.img"]
    devices = {str(device) for device in Path("/dev").glob("loop[0-9]*")}
    assert set(ask(shell, tmp_path, "detach", "/dev/loop")) >= devices


def test_the_names_of_snapshots_stay_one_word(tmp_path):
    """Bash would take them apart at each colon."""
    ask("bash", tmp_path, "")
    program = f'source {tmp_path / "_loopdev"}; echo "$COMP_WORDBREAKS"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert ":" not in done.stdout
