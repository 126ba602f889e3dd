# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A datastore's contents, its locks, and what is in the way of reading it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import subprocess
import sys

import pytest
from pbs import DISK, ENCRYPTED, SIGNED, SNAPSHOT, VECTORS, copy_store, make_snapshot, plain_blob

from loopdev.errors import (
    DeviceBusyError,
    ImageFormatError,
    ImageNotFoundError,
    InvalidValueError,
    KernelError,
)
from loopdev.images.pbs import names
from loopdev.images.pbs._locks import lock_name, lock_snapshot
from loopdev.images.pbs.datastore import Datastore
from loopdev.images.pbs.listing import list_snapshots

STORE = str(VECTORS / "datastore")
PARSED = names.parse_snapshot(SNAPSHOT)


@pytest.fixture
def store(tmp_path):
    return copy_store(tmp_path)


def test_namespaces():
    assert Datastore.open(STORE).namespaces() == ["test", "test/deep"]
    assert Datastore.open(STORE).namespaces("test") == ["test/deep"]
    assert Datastore.open(STORE).namespaces("none") == []


def test_groups_and_snapshots(store):
    for name in ("vm/9", "vm/100", "ct/5", "host/b", "host/a"):
        for when in ("2024-03-01T00:00:00Z", "2023-03-01T00:00:00Z"):
            make_snapshot(store, f"{name}/{when}", b"x")
    found = Datastore.open(str(store))
    groups = found.groups()
    assert list(map(str, groups)) == ["vm/9", "vm/100", "ct/5", "host/a", "host/b"]
    assert [snapshot.path for snapshot in found.snapshots(groups[1])] == [
        "vm/100/2023-03-01T00:00:00Z",
        SNAPSHOT,
        "vm/100/2024-03-01T00:00:00Z",
    ]
    assert str(found.latest(groups[1])) == "vm/100/2024-03-01T00:00:00Z"


def test_what_is_not_listed(store):
    """An unfinished snapshot, and whatever else lies around."""
    group = store / "vm/100"
    (group / "2025-01-01T00:00:00Z").mkdir()
    (group / "2025-13-01T00:00:00Z").mkdir()
    (group / "2025-01-02T00:00:00Z").write_text("a file")
    (group / "tmp_x").mkdir()
    (store / "vm/-bad").mkdir()
    (store / "vm/a b").mkdir()
    (store / "other/1").mkdir(parents=True)
    (store / "ns/.hidden/vm/1").mkdir(parents=True)
    found = Datastore.open(str(store))
    assert found.snapshots(PARSED.group) == [PARSED]
    assert list(map(str, found.groups())) == ["vm/100"]
    assert found.namespaces() == ["test", "test/deep"]


def test_namespaces_in_a_circle_end(store):
    (store / "ns/loop/ns").mkdir(parents=True)
    (store / "ns/loop/ns/again").symlink_to(store / "ns/loop")
    assert Datastore.open(str(store)).namespaces("loop") == [
        "loop" + "/again" * count for count in range(1, 7)
    ]


@pytest.mark.parametrize("repository", ["/nowhere", "/etc/passwd", str(VECTORS)])
def test_what_is_no_datastore(repository):
    with pytest.raises(ImageNotFoundError) as caught:
        Datastore.open(repository)
    assert caught.value.what == "datastore"


@pytest.mark.parametrize("repository", ["store1", "host:store1", "root@pam@host:8007:store1", ""])
def test_repositories_on_a_server(repository, monkeypatch):
    monkeypatch.delenv("PBS_REPOSITORY", raising=False)
    with pytest.raises(InvalidValueError):
        Datastore.open(repository)


def test_no_repository(monkeypatch):
    monkeypatch.delenv("PBS_REPOSITORY", raising=False)
    with pytest.raises(InvalidValueError) as caught:
        Datastore.open(None)
    assert "PBS_REPOSITORY" in str(caught.value)


def test_a_relative_directory(store, monkeypatch):
    monkeypatch.chdir(store.parent)
    for name in ("store", "./store"):
        assert Datastore.open(name).root == str(store)


def test_what_is_not_there():
    found = Datastore.open(STORE)
    with pytest.raises(ImageNotFoundError):
        found.groups("none")
    with pytest.raises(ImageNotFoundError):
        found.snapshots(names.parse_group("vm/1"))
    with pytest.raises(ImageNotFoundError):
        found.latest(names.parse_group("vm/1"))
    with pytest.raises(ImageNotFoundError):
        found.manifest(names.parse_snapshot("vm/100/2020-01-01T00:00:00Z"))


@pytest.mark.parametrize("kind", ["fifo", "directory", "huge"])
def test_manifests_that_are_none(store, kind):
    path = store / SNAPSHOT / "index.json.blob"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises((KernelError, ImageFormatError)):
        Datastore.open(str(store)).manifest(PARSED)


def test_listing():
    found = list_snapshots(STORE)
    assert [info.snapshot for info in found] == [SNAPSHOT, ENCRYPTED, SIGNED]
    assert [info.signed for info in found] == [False, True, True]
    assert found[0].notes == "first line\nsecond line"
    assert found[2].notes == "café"
    (image,) = found[1].images
    assert image.as_dict() == {
        "name": DISK,
        "source": f"{ENCRYPTED}/{DISK}",
        "size": 8929280,
        "crypt_mode": "encrypt",
    }


def test_listing_a_part():
    assert [info.namespace for info in list_snapshots(STORE, "test")] == ["test", "test/deep"]
    assert [info.id for info in list_snapshots(STORE, "test", ["vm/101"])] == ["101"]
    assert [info.id for info in list_snapshots(STORE, groups=["ns/test/vm/101", "vm/100"])] == [
        "101",
        "100",
    ]
    for namespace, groups in (("none", []), ("", ["vm/1"]), ("test", ["vm/100"])):
        with pytest.raises(ImageNotFoundError):
            list_snapshots(STORE, namespace, groups)
    with pytest.raises(InvalidValueError):
        list_snapshots(STORE, "", ["vm"])


def test_listing_goes_on_after_a_damaged_manifest(store):
    (store / SNAPSHOT / "index.json.blob").write_bytes(plain_blob(b"{}"))
    (store / SNAPSHOT / ".protected").write_bytes(b"")
    found = list_snapshots(str(store))
    assert [info.error is None for info in found] == [False, True, True]
    assert (found[0].protected, found[0].images) == (True, ())


# Locks


def test_lock_names():
    assert lock_name(PARSED) == "vm-100-2024\\x2d01\\x2d02T03\\x3a04\\x3a05Z"
    long = names.parse_snapshot(f"host/{'x' * 250}/2024-01-02T03:04:05Z")
    name = lock_name(long)
    digest = hashlib.sha256(str(long).encode()).hexdigest()
    assert name.startswith("hashed/host-" + "x" * 75 + "...")
    assert name.endswith(f"-{digest}")
    assert len(name.removeprefix("hashed/")) == 80 + 3 + 80 + 1 + 64


@pytest.fixture
def server(store, tmp_path):
    """What a server has below /run, and its configuration."""
    locks = tmp_path / "run/locks"
    locks.mkdir(parents=True)
    locks.chmod(0o750)
    if os.geteuid() == 0:
        os.chown(locks, 34, 34)
    config = tmp_path / "datastore.cfg"
    config.write_text(
        f"datastore: other\n\tpath /x\n\ndatastore: main\n\tcomment y\n\tpath {store}\n"
    )
    return locks, config


def take(store, server, snapshot=PARSED):
    locks, config = server
    return lock_snapshot(str(store), snapshot, str(locks), str(config))


def close(taken):
    for fd in taken:
        fd.close()


@pytest.mark.parametrize("name", [SNAPSHOT, SIGNED])
def test_the_servers_lock_file(store, server, name):
    snapshot = names.parse_snapshot(name)
    taken = take(store, server, snapshot)
    namespace = snapshot.namespace.replace("/", ":")
    path = server[0] / "main" / namespace / lock_name(snapshot)
    status, owner = path.stat(), server[0].stat()
    assert stat.S_IMODE(status.st_mode) == 0o660
    for made in (path, path.parent, server[0] / "main"):
        assert (made.stat().st_uid, made.stat().st_gid) == (owner.st_uid, owner.st_gid)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o750
    with open(path, "rb") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_UN)
        close(taken)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(DeviceBusyError):
            take(store, server, snapshot)


def test_a_lock_file_that_is_there(store, server):
    path = server[0] / "main" / lock_name(PARSED)
    path.parent.mkdir()
    path.write_bytes(b"")
    path.chmod(0o640)
    close(take(store, server))
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_lock_file_that_is_removed_at_that_moment(store, server):
    """A real server: it locks, removes and unlocks, again and again, while we lock."""
    path = server[0] / "main" / lock_name(PARSED)
    path.parent.mkdir()
    program = (
        "import fcntl, os, sys\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o660)\n"
        "    fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "    if os.path.exists(sys.argv[1]):\n"
        "        os.unlink(sys.argv[1])\n"
        "    os.close(fd)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        locked = 0
        for _ in range(300):
            try:
                taken = take(store, server)
            except DeviceBusyError:
                continue
            if len(taken) == 2:
                locked += 1
                # While we have it, nobody removes it.
                assert os.path.samestat(os.fstat(taken[1].fileno()), os.stat(path))
            close(taken)
        other.kill()
    assert locked > 0


@pytest.mark.parametrize("why", ["old locking", "another store", "no config", "no tree"])
def test_no_lock_file_where_none_belongs(store, server, why):
    locks, config = server
    if why == "old locking":
        (locks.parent / "old-locking").write_bytes(b"")
    elif why == "another store":
        config.write_text("datastore: other\n\tpath /x\n")
    elif why == "no config":
        config.unlink()
    else:
        locks.rmdir()
    taken = take(store, server)
    assert len(taken) == 1
    close(taken)
    assert not locks.exists() or list(locks.iterdir()) == []


def test_the_directory_is_locked_as_well(store, server):
    with pytest.raises(FileNotFoundError):
        take(store, server, names.parse_snapshot("vm/7/2024-01-02T03:04:05Z"))
    fd = os.open(store / SNAPSHOT, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(DeviceBusyError):
        take(store, server)
    os.close(fd)
