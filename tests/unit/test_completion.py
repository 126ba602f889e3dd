# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What shells offer at a prompt: commands, files, devices, and what is in a datastore."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pbs_server
import pytest
from pbs import DISK, ENCRYPTED, SIGNED, SNAPSHOT, VECTORS
from shells import ask, complete

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


# What is on a server: asked with the secrets that the environment has, and of nobody else


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return pbs_server.make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(certificate, monkeypatch):
    path, fingerprint = certificate
    monkeypatch.setenv("PBS_PASSWORD", pbs_server.PASSWORD)
    monkeypatch.setenv("PBS_FINGERPRINT", pbs_server.with_colons(fingerprint))
    with pbs_server.PbsServer(Path(STORE), path) as running:
        yield running


@every_shell
@pytest.mark.parametrize("form", ["--repository {}", "--repository={}"])
def test_what_is_on_a_server(tmp_path, shell, server, form):
    option = form.format(server.repository)
    assert sorted(ask(shell, tmp_path, "verify", option, "")) == sorted(IMAGES)
    found = ask(shell, tmp_path, "snapshots", "--ns", "test", option, "")
    assert sorted(found) == sorted(GROUPS[1:])
    assert ask(shell, tmp_path, "map", option, "vm/100/2024-01-02T03:") == IMAGES[:1]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("form", [["--repository", "{}"], ["--repository={}"]])
@pytest.mark.parametrize("typed", ["vm/100/2024-01-02T03:", "vm/100/2024-01-02T03:04:05Z/drive-s"])
def test_the_line_is_right_in_the_end(tmp_path, shell, server, form, typed):
    """Whatever a shell takes words apart at: colons, at signs and equals signs are in it."""
    words = ["map", *(word.format(server.repository) for word in form)]
    assert complete(shell, tmp_path, *words, typed) == ["loopdev", *words, IMAGES[0]]


@every_shell
def test_a_token_of_the_environment(tmp_path, shell, server, monkeypatch):
    monkeypatch.setenv("PBS_PASSWORD", pbs_server.SECRET)
    monkeypatch.setenv("PBS_REPOSITORY", server.token_repository)
    assert sorted(ask(shell, tmp_path, "verify", "")) == sorted(IMAGES)


@every_shell
@pytest.mark.parametrize("option", ["--fingerprint {}", "--fingerprint={}"])
def test_the_fingerprint_of_the_line(tmp_path, shell, server, monkeypatch, option, certificate):
    monkeypatch.delenv("PBS_FINGERPRINT")
    words = ["verify", "--repository", server.repository]
    assert ask(shell, tmp_path, *words, "v") == []
    option = option.format(pbs_server.with_colons(certificate[1]))
    assert ask(shell, tmp_path, *words, option, "v") == IMAGES[:1]


@every_shell
@pytest.mark.parametrize("trouble", ["password", "no password", "no server", "refusal"])
def test_nothing_is_offered_nor_asked_when_it_fails(tmp_path, shell, server, monkeypatch, trouble):
    """A prompt for a password would hang here, and a message would be an answer of the shell."""
    if trouble == "password":
        monkeypatch.setenv("PBS_PASSWORD", "hunter2")
    elif trouble == "no password":
        monkeypatch.delenv("PBS_PASSWORD")
    elif trouble == "no server":
        server.stop()
    else:
        server.faults.answers["/api2"] = (500, "out of order")
    assert ask(shell, tmp_path, "verify", "--repository", server.repository, "v") == []


@every_shell
def test_a_directory_behind_an_equals_sign(tmp_path, shell):
    assert ask(shell, tmp_path, "verify", f"--repository={STORE}", "v") == IMAGES[:1]
    found = ask(shell, tmp_path, "verify", f"--repository={STORE}", "--ns=test", "")
    assert sorted(found) == sorted(IMAGES[1:])


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize("words", [["--keyfile", "dis"], ["--keyfile=dis"]])
def test_a_value_behind_an_equals_sign(tmp_path, place, shell, words):
    found = ask(shell, tmp_path, "map", *words)
    assert [name.removeprefix("--keyfile=") for name in found] == ["disk.img"]


@every_shell
def test_a_directory_in_the_home(tmp_path, shell, monkeypatch):
    monkeypatch.setenv("HOME", str(VECTORS))
    assert ask(shell, tmp_path, "verify", "--repository", "~/datastore", "v") == IMAGES[:1]
