# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Where the password of a key comes from, and that it goes nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest
from pbs import KEY_FILE, VECTORS

from loopdev.errors import EncryptionKeyError
from loopdev.images.pbs import passwords
from loopdev.images.pbs.passwords import VARIABLE, from_environment, load_key_file

SCRYPT = str(VECTORS / "keys/key-scrypt-n1024.json")
PASSWORD = "correct horse"


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for suffix in ("", "_FD", "_FILE", "_CMD"):
        monkeypatch.delenv(VARIABLE + suffix, raising=False)


def pipe_with(data: bytes) -> int:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return read


def test_none_is_set():
    assert from_environment() is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"correct horse", b"correct horse"),
        (b"correct horse\nmore\n", b"correct horse"),
        (b"correct horse\r\n", b"correct horse"),
        (b" spaces  \n", b" spaces  "),
        (b"\xff\xfe\xfd raw\n", b"\xff\xfe\xfd raw"),
        (b"", b""),
        (b"\nsecond", b""),
    ],
)
@pytest.mark.parametrize("way", ["", "_FD", "_FILE", "_CMD"])
def test_each_way(monkeypatch, tmp_path, way, text, expected):
    path = tmp_path / "a file"
    path.write_bytes(text)
    fd = pipe_with(text)
    values = {
        "": os.fsdecode(text),
        "_FD": str(fd),
        "_FILE": str(path),
        "_CMD": f"cat '{path}'",
    }
    monkeypatch.setenv(VARIABLE + way, values[way])
    assert from_environment() == expected
    os.close(fd)


def test_the_first_that_is_set_wins(monkeypatch, tmp_path):
    path = tmp_path / "file"
    path.write_text("from the file")
    fd = pipe_with(b"from the descriptor")
    monkeypatch.setenv(f"{VARIABLE}_CMD", "echo from the command")
    assert from_environment() == b"from the command"
    monkeypatch.setenv(f"{VARIABLE}_FILE", str(path))
    assert from_environment() == b"from the file"
    monkeypatch.setenv(f"{VARIABLE}_FD", str(fd))
    assert from_environment() == b"from the descriptor"
    monkeypatch.setenv(VARIABLE, "itself")
    assert from_environment() == b"itself"
    monkeypatch.setenv(VARIABLE, "")
    assert from_environment() == b""
    os.close(fd)


def test_a_pipe_that_stays_open(monkeypatch):
    """A line is enough: nobody has to close anything."""
    read, write = os.pipe()
    os.write(write, b"correct horse\n")
    monkeypatch.setenv(f"{VARIABLE}_FD", str(read))
    assert from_environment() == b"correct horse"
    os.close(read)
    os.close(write)


def test_no_shell_reads_the_command(monkeypatch):
    monkeypatch.setenv(f"{VARIABLE}_CMD", "echo $HOME; echo 'a b'  # x")
    assert from_environment() == b"$HOME; echo a b # x"


@pytest.mark.parametrize(
    ("suffix", "value"),
    [
        ("_FD", "x"),
        ("_FD", "-1"),
        ("_FD", "9999"),
        ("_FD", "9" * 30),
        ("_FD", ""),
        ("_FILE", "/nowhere"),
        ("_FILE", "/"),
        ("_FILE", ""),
        ("_FILE", "/dev/zero"),
        ("_CMD", ""),
        ("_CMD", "false"),
        ("_CMD", "/nowhere/command"),
        ("_CMD", "echo 'unclosed"),
        ("_CMD", "sh -c 'echo secret; exit 3'"),
    ],
)
def test_what_fails(monkeypatch, suffix, value):
    monkeypatch.setenv(VARIABLE + suffix, value)
    with pytest.raises(EncryptionKeyError) as caught:
        from_environment()
    assert "secret" not in str(caught.value).replace(value, "")


def test_a_key_file(monkeypatch):
    monkeypatch.setenv(VARIABLE, PASSWORD)
    expected = load_key_file(KEY_FILE).fingerprint
    assert load_key_file(SCRYPT).fingerprint == expected


def test_the_wrong_password_is_not_shown(monkeypatch):
    monkeypatch.setenv(VARIABLE, "battery staple")
    with pytest.raises(EncryptionKeyError) as caught:
        load_key_file(SCRYPT)
    assert "battery" not in str(caught.value)
    assert SCRYPT in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere", "/", "", "a\0b", "/dev/zero"])
def test_no_key_file(path):
    with pytest.raises(EncryptionKeyError) as caught:
        load_key_file(path)
    assert caught.value.exit_code == 8


def test_nobody_to_ask():
    program = (
        "import sys\n"
        "from loopdev.images.pbs.passwords import load_key_file\n"
        "from loopdev.errors import EncryptionKeyError\n"
        "try:\n    load_key_file(sys.argv[1])\n"
        "except EncryptionKeyError as exc:\n    print(exc)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, SCRYPT],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert "no terminal" in done.stdout
    assert done.stderr == ""


def at_a_terminal(program: str, answers: list[str]) -> str:
    """Run a program at a terminal of its own, answer each prompt, and return what is seen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program, SCRYPT])
    seen = b""
    for answer in answers:
        while not seen.endswith(b": "):
            seen += os.read(terminal, 1000)
        seen += b"|"
        os.write(terminal, answer.encode() + b"\n")
    try:
        while more := os.read(terminal, 1000):
            seen += more
    except OSError:
        pass  # it ended
    os.close(terminal)
    os.waitpid(pid, 0)
    return seen.decode()


def test_the_terminal_is_asked():
    program = (
        "import sys\nfrom loopdev.images.pbs.passwords import load_key_file\n"
        "print(load_key_file(sys.argv[1]))\n"
    )
    seen = at_a_terminal(program, [PASSWORD])
    assert f"Password of {SCRYPT}: " in seen
    assert "CryptKey(0e:ab" in seen
    assert PASSWORD not in seen


@pytest.mark.parametrize(("second", "expected"), [("first one", "b'first one'"), ("x", "not the")])
def test_a_new_password_is_asked_for_twice(second, expected):
    program = (
        "from loopdev.images.pbs.passwords import new_password\n"
        "from loopdev.errors import EncryptionKeyError\n"
        "try:\n    print(new_password())\n"
        "except EncryptionKeyError as exc:\n    print(exc)\n"
    )
    assert expected in at_a_terminal(program, ["first one", second])


def test_a_new_password_from_the_environment(monkeypatch):
    monkeypatch.setenv(VARIABLE, PASSWORD)
    assert passwords.new_password() == PASSWORD.encode()
