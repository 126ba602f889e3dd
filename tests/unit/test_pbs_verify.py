# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Verifying, and the commands ``snapshots`` and ``verify``."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from pbs import (
    DISK,
    ENCRYPTED,
    KEY_FILE,
    OTHER_KEY_FILE,
    SIGNED,
    SNAPSHOT,
    VALUES,
    VECTORS,
    copy_store,
    make_snapshot,
    plain_blob,
)

from loopdev.cli import main
from loopdev.images import open_image
from loopdev.images.pbs.verify import verify_image

STORE = str(VECTORS / "datastore")
IMAGE = f"{SNAPSHOT}/{DISK}"
COMMAND = (sys.executable, "-c", "from loopdev.cli import entry; entry()")


@pytest.fixture
def store(tmp_path):
    return copy_store(tmp_path)


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.delenv("PBS_REPOSITORY", raising=False)


def damage(store, digest, data=None):
    path = store / ".chunks" / digest[:4] / digest
    path.unlink() if data is None else path.write_bytes(data)


def test_good():
    image = open_image(IMAGE, repository=STORE)
    report = verify_image(image)
    image.close()
    assert (report.size, report.chunks, report.distinct) == (8929280, 3, 3)
    assert report.checked == 8929280
    assert report.damaged == ()


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_every_distinct_chunk_is_read_once(tmp_path, jobs):
    parts = [hashlib.shake_128(bytes([i])).digest(4096) for i in (1, 2, 1, 3, 2, 1)]
    store = tmp_path / "store"
    digests = make_snapshot(store, SNAPSHOT, b"".join(parts) + b"end")
    damage(store, digests[0], plain_blob(b"x" * 4096))
    damage(store, digests[3])
    image = open_image(IMAGE, repository=str(store))
    done = []
    report = verify_image(image, jobs, done.append)
    image.close()
    assert (report.chunks, report.distinct, report.checked) == (7, 4, 3 * 4096 + 3)
    first, second = report.damaged
    assert (first.digest, first.offsets, first.length) == (digests[0], (0, 8192, 20480), 4096)
    assert (second.digest, second.offsets) == (digests[3], (12288,))
    assert "another chunk" in first.reason
    assert "is missing" in second.reason
    assert done[-1] == image.size
    assert done == sorted(done)


def test_zeros_are_not_believed(store):
    """To read an image, nobody needs its zeros; but another reader fetches them."""
    damage(store, VALUES["datastore_none"]["digests"][0], b"")
    image = open_image(IMAGE, repository=str(store))
    report = verify_image(image)
    image.close()
    assert [found.offsets for found in report.damaged] == [(0,)]


# The commands


def run(capsys, *argv):
    code = main(list(argv))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_verify_command(capsys):
    code, out, err = run(capsys, "verify", "--repository", STORE, IMAGE)
    assert (code, err) == (0, "")
    assert out == f"{STORE}: {IMAGE}: 8.5M, 3 chunks, 8.5M checked: good\n"


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ((f"{ENCRYPTED}/{DISK}", "--keyfile", KEY_FILE), 0),
        ((f"{SIGNED}/{DISK}", "--keyfile", KEY_FILE), 0),
        (("vm/101/latest/drive-scsi0.img", "--ns", "test", "--keyfile", KEY_FILE), 0),
        (("pbs:vm/100/latest/drive-scsi0.img", "--jobs", "1"), 0),
        ((f"{ENCRYPTED}/{DISK}",), 8),
        ((f"{ENCRYPTED}/{DISK}", "--keyfile", OTHER_KEY_FILE), 8),
        ((f"{SNAPSHOT}/other.img",), 3),
        ((f"{SNAPSHOT}/qemu-server.conf",), 2),
        (("nonsense",), 2),
        ((IMAGE, "--ns", "../x"), 2),
        ((IMAGE, "--ns", "none"), 3),
    ],
)
def test_verify_exit_codes(capsys, argv, code):
    found, out, err = run(capsys, "verify", "--repository", STORE, *argv)
    assert found == code
    assert (err == "") == (code == 0)
    assert (out == "") == (code != 0)


@pytest.mark.parametrize("jobs", ["0", "-1", "x", "1.5"])
def test_wrong_jobs(capsys, jobs):
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--repository", STORE, IMAGE, f"--jobs={jobs}"])
    assert caught.value.code == 2
    assert "--jobs" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("snapshots",), ("verify", IMAGE)])
def test_no_repository(capsys, command):
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "PBS_REPOSITORY" in err
    assert run(capsys, *command, "--repository", "/nowhere")[0] == 3
    assert run(capsys, *command, "--repository", "host:/store")[0] == 3
    assert run(capsys, *command, "--repository", "a@b:store")[0] == 2


def test_what_is_damaged_is_named(capsys, store):
    digest = VALUES["datastore_none"]["digests"][1]
    damage(store, digest)
    code, out, err = run(capsys, "verify", "--repository", str(store), IMAGE)
    assert (code, err) == (6, "")
    assert f"chunk {digest}: is missing: 4194304 bytes at 4194304\n" in out
    assert out.endswith("4M damaged\n")
    code, out, _ = run(capsys, "verify", "--repository", str(store), IMAGE, "--json")
    assert code == 6
    (found,) = json.loads(out)["damaged"]
    assert found["digest"] == digest
    assert found["offsets"] == [4194304]


def test_many_places_are_not_all_printed(capsys, tmp_path):
    store = tmp_path / "store"
    digests = make_snapshot(store, SNAPSHOT, b"x" * 4096 * 20)
    damage(store, digests[0])
    _, out, _ = run(capsys, "verify", "--repository", str(store), IMAGE)
    assert "28672 and 12 more places" in out


def test_snapshots_command(capsys, monkeypatch):
    monkeypatch.setenv("PBS_REPOSITORY", STORE)
    code, out, err = run(capsys, "snapshots")
    assert (code, err) == (0, "")
    titles, *rows = out.splitlines()
    assert titles.split() == ["IMAGE", "SIZE", "MODE", "SIGNED", "PROTECTED", "NOTES"]
    assert [row.split()[:5] for row in rows] == [
        [IMAGE, "8.5M", "none", "no", "no"],
        [f"{ENCRYPTED}/{DISK}", "8.5M", "encrypt", "yes", "no"],
        [f"{SIGNED}/{DISK}", "8.5M", "sign-only", "yes", "no"],
    ]
    assert rows[0].endswith("first line")


def test_what_is_listed_can_be_opened(capsys):
    _, out, _ = run(capsys, "snapshots", "--repository", STORE, "--json")
    for snapshot in json.loads(out):
        for image in snapshot["images"]:
            found = open_image(image["source"], repository=STORE, keyfile=KEY_FILE)
            assert found.size == image["size"]
            found.close()


def test_snapshots_of_a_group(capsys):
    argv = ("snapshots", "--repository", STORE, "--json")
    assert [i["id"] for i in json.loads(run(capsys, *argv, "vm/100")[1])] == ["100"]
    found = json.loads(run(capsys, *argv, "--ns", "test", "vm/101")[1])
    assert found[0]["fingerprint"] == VALUES["keys"]["K_00_1f"]["fingerprint"]
    assert run(capsys, *argv, "vm/7")[0] == 3
    assert run(capsys, *argv, "vm")[0] == 2
    assert run(capsys, *argv, "--ns", "none")[0] == 3


def test_an_empty_store(capsys, tmp_path):
    (tmp_path / ".chunks").mkdir()
    assert run(capsys, "snapshots", "--repository", str(tmp_path)) == (0, "", "")
    assert run(capsys, "snapshots", "--repository", str(tmp_path), "--json") == (0, "[]\n", "")


def test_a_damaged_manifest_hides_no_other(capsys, store):
    (store / SNAPSHOT / "index.json.blob").write_bytes(b"")
    (store / SNAPSHOT / ".protected").write_bytes(b"")
    code, out, err = run(capsys, "snapshots", "--repository", str(store))
    assert code == 6
    assert [row.split()[0] for row in out.splitlines()[2:]] == [
        f"{ENCRYPTED}/{DISK}",
        f"{SIGNED}/{DISK}",
    ]
    assert out.splitlines()[1].split() == [SNAPSHOT, "-", "damaged", "no", "yes"]
    assert "index.json.blob" in err


def test_notes_cannot_harm_a_terminal(capsys, store):
    from pbs import write_manifest

    notes = "\x1b[2Jowned\nsecond"
    write_manifest(store, SNAPSHOT, [], unprotected={"notes": notes})
    _, out, _ = run(capsys, "snapshots", "--repository", str(store), "vm/100")
    assert "\x1b" not in out
    assert "\\x1b[2Jowned" in out
    assert "second" not in out


def has_open(pid: int, what: str) -> bool:
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            if what in os.readlink(f"/proc/{pid}/fd/{name}"):
                return True
        except FileNotFoundError:
            pass  # closed meanwhile
    return False


def test_signals_end_it(tmp_path):
    """In the middle of the work: 130, and no traceback."""
    store = tmp_path / "store"
    noise = hashlib.shake_128(b"noise").digest(4096 * 8000)
    make_snapshot(store, SNAPSHOT, noise)
    with subprocess.Popen(
        [*COMMAND, "verify", "--repository", str(store), IMAGE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        while not has_open(process.pid, "/.chunks"):
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err == b""
