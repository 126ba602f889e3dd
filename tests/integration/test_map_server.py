# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Maps of images on a server, by the command: the whole way, with a real device."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from server_maps import DISK, LOOPDEV, MAPS, NAME, Maps, content, padded, wait_for

import pbs  # isort: skip - it is found through server_maps
import pbs_server  # isort: skip


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return pbs_server.make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def server(tmp_path, certificate):
    path, fingerprint = certificate
    with pbs_server.PbsServer(pbs.copy_store(tmp_path), path) as running:
        running.fingerprint = pbs_server.with_colons(fingerprint)
        yield running


@pytest.fixture
def maps(server, tmp_path):
    with Maps(server, tmp_path / "map.log") as found:
        yield found


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (DISK, []),
        (f"vm/100/latest/{pbs.DISK}", ["--workers", "1"]),
        (f"{pbs.ENCRYPTED}/{pbs.DISK}", ["--keyfile", pbs.KEY_FILE]),
        (f"vm/102/latest/{pbs.DISK}", ["--ns", "test/deep", "--keyfile", pbs.KEY_FILE]),
    ],
)
def test_the_device_has_the_image(maps, source, options):
    device = maps.map(source, *options)
    assert content(device) == padded(pbs.disk())
    maps.unmap()
    wait_for(lambda: maps.server.sessions == 0)


def test_one_url(maps):
    url = f"pbs://{pbs_server.USER}@127.0.0.1:{maps.server.port}/{pbs_server.STORE}/{DISK}"
    assert content(maps.map(url)) == padded(pbs.disk())


def test_a_token_and_a_fingerprint_that_is_an_option(maps):
    maps.environment |= {"PBS_PASSWORD": pbs_server.SECRET, "PBS_FINGERPRINT": ""}
    options = ["--repository", maps.server.token_repository]
    options += ["--fingerprint", maps.server.fingerprint]
    assert content(maps.map(DISK, *options)) == padded(pbs.disk())


def test_unmap_without_an_argument_lists(maps):
    device = maps.map()
    done = maps.run("unmap")
    assert done.returncode == 0
    assert f"{device}:\t{NAME}\t{maps.server.repository}: {DISK}" in done.stdout.splitlines()
    maps.unmap()
    assert NAME not in maps.run("unmap").stdout


def test_once_knows_the_image_again(maps):
    device = maps.map(DISK, "--once")
    done = maps.run("map", "--once", "--repository", maps.server.repository, DISK)
    assert done.stdout.strip() == device


def test_each_chunk_is_fetched_once_though_all_workers_want_it(maps):
    data = os.urandom(24 << 20)
    pbs.make_snapshot(maps.server.store.root, "vm/200/2024-01-02T03:04:05Z", data, 1 << 20)
    device = maps.map(f"vm/200/latest/{pbs.DISK}", "--workers", "4")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(hashlib.sha256(content(device)).hexdigest()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {hashlib.sha256(data).hexdigest()}
    chunks = maps.server.requests("/chunk")
    assert sorted(chunks) == sorted(set(chunks))
    assert len(chunks) == 24


def test_secrets_are_in_no_place_that_others_see(maps):
    device = maps.map()
    content(device)
    maps.server.drop()
    content(device)
    secrets = [pbs_server.PASSWORD.encode(), b"PBS:backup", b"CSRF"]
    seen = [path.read_bytes() for path in (MAPS / NAME).iterdir() if path.name != "image"]
    seen += [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in maps.processes()]
    seen.append(Path("/proc/self/mountinfo").read_bytes())
    seen.append(maps.log.read_bytes() if maps.log.exists() else b"")
    assert len(maps.processes()) >= 2
    for secret in secrets:
        assert not any(secret in text for text in seen)


def test_a_traceback_has_no_secret(maps):
    bad = "hunter2-\x01-hunter2"
    code = (
        "import loopdev.images, sys\n"
        f"loopdev.images.resolve({DISK!r}, repository={maps.server.token_repository!r})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=maps.environment | {"PBS_PASSWORD": bad},
        capture_output=True,
        text=True,
    )
    assert "Traceback" in done.stderr
    assert "AccessDeniedError" in done.stderr
    assert "hunter2" not in done.stderr


def test_reads_wait_for_a_server_that_is_restarted(maps):
    device = maps.map()
    maps.server.stop()
    result: list[bytes] = []
    reader = threading.Thread(target=lambda: result.append(content(device)))
    reader.start()
    reader.join(1.0)
    assert reader.is_alive()
    maps.server.start()
    reader.join(20)
    assert result == [padded(pbs.disk())]
    assert "connected again" in maps.log.read_text()


def test_only_the_io_timeout_is_an_error_and_then_it_is_well_again(maps):
    device = maps.map(DISK, "--io-timeout", "1")
    maps.server.stop()
    begin = time.monotonic()
    with open(device, "rb", buffering=0) as file:
        file.seek(4 << 20)
        with pytest.raises(OSError, match="Input/output error"):
            file.read(4096)
    assert time.monotonic() - begin < 10
    maps.server.start()

    def is_well() -> bool:
        try:
            return content(device) == padded(pbs.disk())
        except OSError:
            return False

    wait_for(is_well, 30)


def test_a_worker_that_is_killed_connects_anew(maps):
    device = maps.map(DISK, "--workers", "1")
    before = set(maps.processes())
    (worker,) = [pid for pid in before if b"worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(worker, signal.SIGKILL)
    assert content(device) == padded(pbs.disk())
    assert len(maps.server.requests("/api2/json/reader")) == 2


def test_a_snapshot_that_is_removed_while_it_is_mapped(maps):
    device = maps.map(DISK, "--io-timeout", "1")
    shutil.rmtree(maps.server.store.root / pbs.SNAPSHOT)
    maps.server.drop()
    with open(device, "rb", buffering=0) as file:
        file.seek(4 << 20)
        with pytest.raises(OSError, match="Input/output error"):
            file.read(4096)
    assert "does not exist" in maps.log.read_text()
    maps.unmap()


def test_verbose_stays_in_the_foreground(maps):
    process = subprocess.Popen(
        [LOOPDEV, *maps.words(DISK, "--verbose")],
        env=maps.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    device = process.stdout.readline().strip()
    assert content(device) == padded(pbs.disk())
    process.terminate()
    process.communicate(timeout=20)
    assert not (MAPS / NAME).exists()


def test_snapshots_are_listed_as_in_a_directory(maps):
    there = maps.run("snapshots", "--repository", maps.server.repository)
    here = maps.run("snapshots", "--repository", str(maps.server.store.root))
    assert there.returncode == 0
    assert there.stdout == here.stdout
    for words in (["vm/100"], ["--ns", "test"], ["--ns", "test", "vm/101"]):
        one = maps.run("snapshots", "--repository", maps.server.repository, *words)
        other = maps.run("snapshots", "--repository", str(maps.server.store.root), *words)
        assert (one.stdout, one.returncode) == (other.stdout, other.returncode)


def test_the_lists_as_json_have_the_same_fields(maps):
    there, here = (
        json.loads(maps.run("snapshots", "--json", "--repository", where).stdout)
        for where in (maps.server.repository, str(maps.server.store.root))
    )
    for one in here:
        one["notes"] = one["notes"].partition("\n")[0]  # a server lists the first line
    assert there == here


def test_verify(maps):
    done = maps.run("verify", "--repository", maps.server.repository, DISK)
    assert (done.returncode, "good" in done.stdout) == (0, True)
    chunk = next(
        path
        for path in (maps.server.store.root / ".chunks").glob("*/*")
        if path.name in str(maps.server.requests("/chunk"))
    )
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    done = maps.run("verify", "--repository", maps.server.repository, DISK)
    assert done.returncode == 6
    assert chunk.name in done.stdout


# Bad input: one message, an exit code, and nothing left


def other(server, **changes: str) -> str:
    repository = server.repository
    for old, new in changes.items():
        repository = repository.replace({"store": pbs_server.STORE, "host": "127.0.0.1"}[old], new)
    return repository


BAD = {
    "unknown host": (lambda s: {"repository": other(s, host="nowhere.invalid")}, 9, "unknown host"),
    "closed port": (lambda s: s.stop() or {}, 9, "nothing listens"),
    "no TLS": (lambda s: setattr(s.faults, "plain", True), 9, "does not speak TLS"),
    "fingerprint": (lambda s: {"PBS_FINGERPRINT": "ab:" * 31 + "ab"}, 9, "fingerprint is"),
    "no fingerprint": (lambda s: {"PBS_FINGERPRINT": None}, 9, "fingerprint is"),
    "bad fingerprint": (lambda s: {"PBS_FINGERPRINT": "xyz"}, 2, "is no fingerprint"),
    "password": (lambda s: {"PBS_PASSWORD": "hunter2"}, 5, "was refused"),
    "no password": (lambda s: {"PBS_PASSWORD": None}, 5, "PBS_PASSWORD is not set"),
    "token": (lambda s: {"repository": s.token_repository}, 5, "authentication failed"),
    "privilege": (
        lambda s: s.privileges.update({pbs_server.USER: {"audit"}}),
        5,
        "no permissions on /datastore/store1",
    ),
    "datastore": (lambda s: {"repository": other(s, store="store9")}, 3, "no such datastore"),
    "namespace": (lambda s: {"source": f"ns/nope/{DISK}"}, 3, "namespace"),
    "snapshot": (
        lambda s: {"source": f"vm/100/2020-01-01T00:00:00Z/{pbs.DISK}"},
        3,
        "no such snapshot",
    ),
    "group": (lambda s: {"source": f"vm/9/latest/{pbs.DISK}"}, 3, "no such group"),
    "archive": (lambda s: {"source": f"{pbs.SNAPSHOT}/x.img"}, 3, "there is drive-scsi0.img"),
    "no key": (lambda s: {"source": f"{pbs.ENCRYPTED}/{pbs.DISK}"}, 8, "missing key"),
    "wrong key": (
        lambda s: {"source": f"{pbs.ENCRYPTED}/{pbs.DISK}", "key": pbs.OTHER_KEY_FILE},
        8,
        "wrong key",
    ),
    "repository": (lambda s: {"repository": "root@pam:hunter2@host:store1"}, 2, "is no repository"),
    "locked": (lambda s: s.locked.add("vm/100"), 4, "locked"),
    "HTTP 500": (
        lambda s: s.faults.answers.update({"/api2": (500, "out of order")}),
        9,
        "out of order",
    ),
    "HTTP 401": (lambda s: s.faults.answers.update({"/api2/json/reader": (401, "no")}), 5, "no"),
    "reset": (lambda s: setattr(s.faults, "reset_after", 100), 9, "connection"),
    "half a frame": (lambda s: setattr(s.faults, "end_after", 3000), 9, "connection"),
    "wrong length": (lambda s: setattr(s.faults, "wrong_length", True), 9, "cut off"),
    "goodbye": (lambda s: setattr(s.faults, "goaway_after", 0), 9, "ended the session"),
    "garbage": (lambda s: setattr(s.faults, "garbage", b"\xff" * 99), 9, "broken the HTTP/2"),
    "first chunk": (
        lambda s: s.faults.answers.update({"/download": (400, "wrong file extension")}),
        9,
        "wrong file",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(maps, what):
    prepare, code, text = BAD[what]
    found = prepare(maps.server)
    changes = dict(found) if isinstance(found, dict) else {}
    options = ["--repository", changes.pop("repository", maps.server.repository)]
    if "key" in changes:
        options += ["--keyfile", changes.pop("key")]
    words = maps.words(changes.pop("source", DISK), *options)
    done = maps.run(*words, environment=changes)
    assert done.returncode == code, done.stderr
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert "hunter2" not in done.stderr
    assert not (MAPS / NAME).exists()
    assert not maps.processes()
    wait_for(lambda: maps.server.sessions == 0)


def test_completion_asks_nobody(maps):
    script = subprocess.run([LOOPDEV, "completion", "bash"], capture_output=True, text=True).stdout
    line = f"loopdev map --repository {maps.server.repository} ''"
    code = f"""
        {script}
        COMP_WORDS=({LOOPDEV} map --repository {maps.server.repository} '')
        _loopdev_images ''
    """

    def offered(**changes: str) -> str:
        return subprocess.run(
            ["setsid", "bash", "-c", code],
            env=maps.environment | changes,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout

    assert offered().split()[0] == DISK, line
    assert offered(PBS_PASSWORD="hunter2") == ""
