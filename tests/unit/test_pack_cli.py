# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev pack`` and ``loopdev key`` as commands, with right and with wrong arguments."""

from __future__ import annotations

import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pbs import KEY, KEY_FILE, VECTORS
from pbs_reader import fingerprint, read_image, snapshots

import loopdev
from loopdev.cli.pack import moment

START = "import sys; from loopdev.cli import main; sys.exit(main())"
PASSWORD = {"PBS_ENCRYPTION_PASSWORD": "correct horse"}


def run(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PBS_")}
    return subprocess.run(
        [sys.executable, "-c", START, *map(str, words)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**clean, **(env or {})},
    )


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    """A directory with a datastore, an image, and things that are neither."""
    (tmp_path / "store/.chunks").mkdir(parents=True)
    (tmp_path / "disk.img").write_bytes(b"contents")
    (tmp_path / "empty.img").touch()
    (tmp_path / "disk.qcow2").write_bytes(b"QFI\xfb" + bytes(600))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prints_what_map_takes(place):
    words = ("pack", "disk.img", "b=disk.img", "--repository", "./store", "--id", "vm/100")
    done = run(*words, "--time", "2024-01-02T03:04:05Z")
    assert done.returncode == 0, done.stderr
    prefix = "vm/100/2024-01-02T03:04:05Z"
    assert done.stdout == f"{prefix}/disk.img\n{prefix}/b.img\n"
    assert done.stderr.startswith("loopdev: 16B, 16B of it read, 50% there already, ")
    assert read_image(place / "store", prefix, "b.img") == b"contents"


def test_repository_of_the_environment(place):
    env = {"PBS_REPOSITORY": "./store"}
    done = run("pack", "disk.img", "--id", "vm/100", "--ns", "a/b", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ns/a/b/vm/100/")


def test_json(place):
    words = ("pack", "disk.img", "--repository", "./store", "--id", "vm/1", "--time", "0", "-J")
    done = run(*words, "--keyfile", KEY_FILE)
    found = json.loads(done.stdout)
    assert found["snapshot"] == "vm/1/1970-01-01T00:00:00Z"
    assert found["crypt_mode"] == "encrypt"
    assert found["images"] == [
        {
            "archive": "disk.img",
            "source": str(place / "disk.img"),
            "size": 8,
            "changed": False,
        }
    ]
    assert found["counts"]["new"] == 8
    assert found["seconds"] >= 0
    assert done.stderr == ""
    assert read_image(place / "store", found["snapshot"], "disk.img", KEY) == b"contents"


def test_key_with_a_password(place):
    key = VECTORS / "keys/key-scrypt-n1024.json"
    words = ("pack", "disk.img", "--repository", "./store", "--id", "vm/1", "--keyfile", key)
    assert run(*words, env=PASSWORD).returncode == 0
    [name] = snapshots(place / "store")
    assert read_image(place / "store", name, "disk.img", KEY) == b"contents"
    assert "no password" in run(*words).stderr


PACK = ("--repository", "./store", "--id", "vm/100")
BAD = {
    "no image": (PACK, 2, "IMAGE"),
    "no id": (("disk.img", "--repository", "./store"), 2, "say whose snapshot it is"),
    "no repository": (("disk.img", "--id", "vm/1"), 2, "say which datastore"),
    "bad id": (("disk.img", *PACK[:2], "--id", "vm/../x"), 2, "is no group"),
    "bad type": (("disk.img", *PACK[:2], "--id", "qm/100"), 2, "is no group"),
    "empty id": (("disk.img", *PACK[:2], "--id", ""), 2, "is no group"),
    "snapshot as id": (("disk.img", *PACK[:2], "--id", "vm/1/x"), 2, "is no group"),
    "bad ns": (("disk.img", *PACK, "--ns", "a/../b"), 2, "is no namespace"),
    "deep ns": (("disk.img", *PACK, "--ns", "/".join("abcdefgh")), 2, "at most 7 levels"),
    "bad time": (("disk.img", *PACK, "--time", "yesterday"), 2, "not a valid TIME"),
    "no such day": (("disk.img", *PACK, "--time", "2023-02-29T00:00:00Z"), 2, "not a valid TIME"),
    "late": (("disk.img", *PACK, "--time", "999999999999"), 2, "from 1970 to 9999"),
    "bad level": (("disk.img", *PACK, "--level", "23"), 2, "from 0 to 22"),
    "no level": (("disk.img", *PACK, "--level", "-1"), 2, "level"),
    "no jobs": (("disk.img", *PACK, "--jobs", "0"), 2, "not a valid N"),
    "many jobs": (("disk.img", *PACK, "--jobs", "5000"), 2, "from 1 to 1024"),
    "same names": (("disk.img", "./disk.img", *PACK), 2, "there is one named disk.img"),
    "no name": (("link=", *PACK), 3, ""),
    "missing image": (("missing.img", *PACK), 3, "missing.img: No such file"),
    "directory": (("full", *PACK), 6, "full: "),
    "device": (("null=/dev/null", *PACK), 6, "/dev/null"),
    "empty image": (("empty.img", *PACK), 6, "empty.img: is empty"),
    "other format": (("disk.qcow2", *PACK), 6, "is a qcow2 image"),
    "no store": (("disk.img", *PACK[2:], "--repository", "./missing"), 3, "no such datastore"),
    "no store there": (("disk.img", *PACK[2:], "--repository", "./full"), 3, "no such datastore"),
    "file": (("disk.img", *PACK[2:], "--repository", "./disk.img"), 3, "no such datastore"),
    "server": (("disk.img", *PACK[2:], "--repository", "me@pbs@host:store"), 2, "on a server"),
    "not empty": (
        ("disk.img", "--create-store", *PACK[2:], "--repository", "./full"),
        2,
        "neither a datastore nor empty",
    ),
    "nowhere": (
        ("disk.img", "--create-store", *PACK[2:], "--repository", "./a/b"),
        1,
        "No such file or directory",
    ),
    "missing key": (("disk.img", *PACK, "--keyfile", "missing"), 8, "missing: No such file"),
    "no key": (("disk.img", *PACK, "--crypt-mode", "encrypt"), 2, "needs a key file"),
    "unused key": (
        ("disk.img", *PACK, "--crypt-mode", "none", "--keyfile", KEY_FILE),
        2,
        "takes no key file",
    ),
    "no mode": (("disk.img", *PACK, "--crypt-mode", "rot13"), 2, "encrypt, sign-only or none"),
    "damaged key": (("disk.img", *PACK, "--keyfile", "disk.img"), 8, "is no key file"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments(place, case):
    """Each is told in one line, with its exit code, and leaves the store as it was."""
    words, code, message = BAD[case]
    done = run("pack", *words)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    left = {str(path.relative_to(place / "store")) for path in (place / "store").rglob("*")}
    assert left <= {".chunks", ".lock"}
    assert sorted(os.listdir(place / "full")) == ["file"]
    assert not (place / "missing").exists()


def test_the_same_time_is_refused(place):
    words = ("pack", "disk.img", *PACK, "--time", "1")
    assert run(*words).returncode == 0
    done = run(*words)
    assert done.returncode == 2
    assert "vm/100/1970-01-01T00:00:01Z: this snapshot exists already" in done.stderr
    assert len(snapshots(place / "store")) == 1


def test_bytes_as_they_are(place):
    """What is refused as an image of another format can still be asked for."""
    assert run("pack", "raw:disk.qcow2", *PACK, "--time", "1").returncode == 0
    name = "vm/100/1970-01-01T00:00:01Z"
    assert read_image(place / "store", name, "disk.qcow2.img") == b"QFI\xfb" + bytes(600)


@pytest.mark.parametrize(
    ("word", "archive"),
    [
        ("disk.img", "disk.img"),
        ("x=disk.img", "x.img"),
        ("x.img=disk.img", "x.img"),
        ("x.img.fidx=disk.img", "x.img"),
        ("x.raw=disk.img", "x.img"),
        ("a=b=disk.img", "a.img"),
        ("./a=b.img", "a-b.img"),
    ],
)
def test_names_of_archives(place, word, archive):
    (place / "b=disk.img").write_bytes(b"contents")
    (place / "a=b.img").write_bytes(b"contents")
    result = loopdev.pack([word], "./store", "vm/1")
    assert [image.archive for image in result.images] == [archive]
    assert (place / "store" / result.snapshot / f"{archive}.fidx").exists()


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("2024-01-02T03:04:05Z", 1704164645)])
def test_moment(text, seconds):
    assert moment(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1.5", "٣", "2024-01-02", "2024-01-02T03:04:05"])
def test_moment_refuses(text):
    with pytest.raises(ValueError):
        moment(text)


def test_bar_on_a_terminal(place):
    """The bar is on standard error, is wiped, and what remains is the summary."""
    main, terminal = pty.openpty()
    words = [sys.executable, "-c", START, "pack", "disk.img", *PACK]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    shown = os.read(main, 65536).decode()
    os.close(main)
    assert done.returncode == 0
    assert "pack [" in shown
    assert "there already" in shown
    assert shown.rpartition("\x1b[K")[2].startswith("loopdev: 8B, ")


def test_key_without_password(place):
    old = os.umask(0)
    try:
        done = run("key", "create", "--kdf", "none", "key.json")
    finally:
        os.umask(old)
    assert done.returncode == 0, done.stderr
    text = (place / "key.json").read_text()
    assert "\n" not in text
    content = json.loads(text)
    import base64

    key = base64.b64decode(content["data"])
    assert len(key) == 32
    assert (content["kdf"], content["fingerprint"]) == (None, fingerprint(key))
    assert f"fingerprint: {fingerprint(key)}\n" in done.stdout
    assert stat.S_IMODE((place / "key.json").stat().st_mode) == 0o600
    assert content["data"] not in done.stdout + done.stderr


def test_key_with_password_is_the_one_that_reads(place):
    done = run("key", "create", "key.json", "--hint", "a horse", env=PASSWORD)
    assert done.returncode == 0, done.stderr
    words = ("disk.img", *PACK, "--keyfile", "key.json")
    assert run("pack", *words, env=PASSWORD).returncode == 0
    [name] = snapshots(place / "store")
    words = ("verify", f"{name}/disk.img", *PACK[:2], "--keyfile", "key.json")
    assert run(*words, env=PASSWORD).returncode == 0
    done = run(*words, env={"PBS_ENCRYPTION_PASSWORD": "other horse"})
    assert done.returncode == 8
    assert "password hint: a horse" in done.stderr


def test_key_show_needs_no_password(place):
    done = run("key", "show", VECTORS / "keys/key-scrypt.json", "--json")
    found = json.loads(done.stdout)
    assert found["fingerprint"] == fingerprint(KEY)
    assert (found["kdf"], found["created"]) == ("scrypt", "2024-01-02T03:04:05Z")
    assert found["hint"]


@pytest.mark.parametrize(
    ("name", "kdf", "told"),
    [
        ("key-none.json", "none", fingerprint(KEY)),
        ("key-none-no-fingerprint.json", "none", fingerprint(KEY)),
        ("key-pbkdf2.json", "pbkdf2", fingerprint(KEY)),
    ],
)
def test_key_show(name, kdf, told):
    info = loopdev.show_key(str(VECTORS / "keys" / name))
    assert (info.kdf, info.fingerprint) == (kdf, told)


def test_key_is_asked_for_twice(place):
    """On a terminal, which shows nothing of it."""
    pid, main = pty.fork()
    if pid == 0:
        os.environ.pop("PBS_ENCRYPTION_PASSWORD", None)
        words = ["key", "create", "key.json"]
        os.execv(sys.executable, [sys.executable, "-c", START, *words])
    shown = b""
    for _ in range(2):
        while not shown.endswith(b": "):
            shown += os.read(main, 1024)
        os.write(main, b"correct horse\n")
        shown += os.read(main, 1)
    try:
        while more := os.read(main, 1024):
            shown += more
    except OSError:
        pass  # EIO: all that had the terminal open are gone
    os.close(main)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    assert b"correct horse" not in shown
    assert b"fingerprint: " in shown
    assert loopdev.show_key("key.json").kdf == "scrypt"


BAD_KEYS = {
    "no action": (("key",), 2, "ACTION"),
    "no file": (("key", "create"), 2, "FILE"),
    "other action": (("key", "delete", "x"), 2, "invalid choice"),
    "other kdf": (("key", "create", "x", "--kdf", "md5"), 2, "not a valid none|scrypt"),
    "exists": (("key", "create", "disk.img", "--kdf", "none"), 2, "exists: a key that is overwr"),
    "nowhere": (("key", "create", "a/x", "--kdf", "none"), 1, "No such file"),
    "no terminal": (("key", "create", "x"), 8, "there is no terminal to ask on"),
    "hint alone": (("key", "create", "x", "--kdf", "none", "--hint", "h"), 2, "must be a password"),
    "show nothing": (("key", "show", "x"), 8, "x: No such file"),
    "show no key": (("key", "show", "disk.img"), 8, "disk.img: is no key file"),
    "show a directory": (("key", "show", "full"), 8, "full: Is a directory"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_wrong_arguments_of_key(place, case):
    words, code, message = BAD_KEYS[case]
    done = run(*words)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert message in done.stderr
    assert not (place / "x").exists()
    assert (place / "disk.img").read_bytes() == b"contents"


@pytest.mark.parametrize(("password", "hint"), [("1234", None), ("correct", "x" * 65)])
def test_password_or_hint_of_a_wrong_length(place, password, hint):
    words = ("key", "create", "x", *(("--hint", hint) if hint else ()))
    done = run(*words, env={"PBS_ENCRYPTION_PASSWORD": password})
    assert done.returncode == (2 if hint else 8)
    assert password not in done.stderr
    assert not (place / "x").exists()


def test_shown_damaged_key(place):
    for name in ("bad-length.json", "bad-fingerprint.json"):
        done = run("key", "show", VECTORS / "keys" / name)
        assert done.returncode == 8, name
