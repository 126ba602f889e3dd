# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What pack writes, read by somebody else: formats, holes, deduplication, owners and modes."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pbs import KEY, KEY_FILE, VECTORS, copy_store, repeated
from pbs_reader import (
    CHUNK,
    ENCRYPTED,
    ENCRYPTED_ZSTD,
    PLAIN,
    ZSTD,
    chunk_path,
    read_image,
    read_index,
    read_manifest,
    snapshots,
)

import loopdev
from loopdev.images import open_image
from loopdev.images.pbs._locks import lock_group
from loopdev.images.pbs._workdir import PREFIX
from loopdev.images.pbs.names import parse_group

WHEN = 1704164645
STAMP = "2024-01-02T03:04:05Z"
ZERO_DIGEST = bytes.fromhex("bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A datastore as small as can be: its directories of chunks are made when they are needed."""
    (tmp_path / "store/.chunks").mkdir(parents=True)
    return tmp_path / "store"


def random_bytes(length: int, seed: int) -> bytes:
    """Return what does not compress, the same each time."""
    import random

    return random.Random(seed).randbytes(length)


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def chunks(store: Path) -> set[Path]:
    return {path for path in store.glob(".chunks/*/*") if path.is_file()}


def pack(store: Path, *images: str, group: str = "vm/100", **options) -> loopdev.PackResult:
    return loopdev.pack([*images], str(store), group, **options)


SIZES = (1, 511, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 12345)


@pytest.mark.parametrize("mode", ["none", "sign-only", "encrypt"])
@pytest.mark.parametrize("size", SIZES)
def test_round_trip(tmp_path, store, size, mode):
    data = repeated(size, 7)
    image = write(tmp_path / "disk.img", data)
    keyfile = None if mode == "none" else KEY_FILE
    result = pack(store, image, time=WHEN, keyfile=keyfile, crypt_mode=mode)
    assert result.snapshot == f"vm/100/{STAMP}"
    assert read_image(store, result.snapshot, "disk.img", KEY if keyfile else None) == data
    ours = open_image(f"{result.snapshot}/disk.img", repository=str(store), keyfile=keyfile)
    assert ours.read(0, size) == data
    ours.close()


@pytest.mark.parametrize(
    ("data", "key", "kind"),
    [
        (repeated(CHUNK, 1), None, ZSTD),
        (random_bytes(CHUNK, 1), None, PLAIN),
        (repeated(CHUNK, 1), KEY, ENCRYPTED_ZSTD),
        (random_bytes(CHUNK, 1), KEY, ENCRYPTED),
    ],
    ids=["zstd", "plain", "encrypted-zstd", "encrypted"],
)
def test_kinds_of_blobs(tmp_path, store, data, key, kind):
    image = write(tmp_path / "disk.img", data)
    result = pack(store, image, keyfile=KEY_FILE if key else None)
    assert [path.read_bytes()[:8] for path in chunks(store)] == [kind]
    assert read_image(store, result.snapshot, "disk.img", key) == data


def test_level_0_does_not_compress(tmp_path, store):
    image = write(tmp_path / "disk.img", repeated(CHUNK, 1))
    result = pack(store, image, level=0)
    assert [path.stat().st_size for path in chunks(store)] == [12 + CHUNK]
    assert read_image(store, result.snapshot, "disk.img") == repeated(CHUNK, 1)


def test_level_19_is_smaller(tmp_path, store):
    data = b"".join(b"%d\n" % (n * n) for n in range(100000))
    image = write(tmp_path / "disk.img", data)
    sizes = []
    for level in (1, 19):
        for path in chunks(store):
            path.unlink()
        result = pack(store, image, level=level)
        sizes.append(result.counts.written)
        assert read_image(store, result.snapshot, "disk.img") == data
    assert sizes[1] < sizes[0]


def test_manifest_fields(tmp_path, store):
    one = write(tmp_path / "one.img", b"1")
    two = write(tmp_path / "two.raw", bytes(CHUNK))
    result = pack(store, one, two, f"drive-scsi0={one}", time=WHEN, keyfile=KEY_FILE)
    manifest = read_manifest(store, result.snapshot, KEY)
    assert (manifest["backup-type"], manifest["backup-id"]) == ("vm", "100")
    assert manifest["backup-time"] == WHEN
    names = ["one.img.fidx", "two.img.fidx", "drive-scsi0.img.fidx"]
    assert [file["filename"] for file in manifest["files"]] == names
    assert {file["crypt-mode"] for file in manifest["files"]} == {"encrypt"}
    for file in manifest["files"]:
        size, _, csum = read_index(store / result.snapshot / file["filename"])
        assert (file["size"], file["csum"]) == (size, csum.hex())
    assert [image.archive for image in result.images] == ["one.img", "two.img", "drive-scsi0.img"]
    listed = set(os.listdir(store / result.snapshot))
    assert listed == {*names, "index.json.blob"}


def test_key_of_the_vectors_gives_their_digests(tmp_path):
    """The same image and key as in the vectors' datastore: not one chunk is new."""
    store = copy_store(tmp_path)
    before = chunks(store)
    image = bytes(CHUNK) + repeated(CHUNK, 21) + repeated(540672, 22)
    path = write(tmp_path / "disk.img", image)
    for keyfile in (None, KEY_FILE):
        result = pack(store, path, keyfile=keyfile)
        assert result.counts.new == 0
        assert result.counts.written == 0
    assert chunks(store) == before


def test_holes_are_not_read(tmp_path, store):
    """A hole of a terabyte is packed in no time, and read back as what it is."""
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        file.truncate((1 << 40) + 5)
        file.seek(10 * CHUNK + 100)
        file.write(b"data")
    result = pack(store, str(image))
    counts = result.counts
    assert counts.total == counts.done == (1 << 40) + 5
    assert counts.read == CHUNK + 5
    size, digests, _ = read_index(store / result.snapshot / "disk.img.fidx")
    assert size == (1 << 40) + 5
    assert digests[0] == digests[-2] == ZERO_DIGEST
    assert len(set(digests)) == 3
    assert len(chunks(store)) == 3


def test_sparse_file_reads_back(tmp_path, store):
    image = tmp_path / "disk.img"
    with open(image, "wb") as file:
        for offset in (0, 3 * CHUNK - 1, 5 * CHUNK, 8 * CHUNK + 4096):
            file.seek(offset)
            file.write(b"here")
        file.truncate(11 * CHUNK + 1)
    result = pack(store, str(image))
    assert read_image(store, result.snapshot, "disk.img") == image.read_bytes()
    assert result.counts.holes == 6 * CHUNK


@pytest.mark.parametrize("size", [CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 77])
@pytest.mark.parametrize("key", [None, KEY])
def test_zeros_that_are_written(tmp_path, store, size, key):
    """Zeros on the disk are one chunk, too; a short one at the end has its own digest."""
    image = write(tmp_path / "disk.img", bytes(size))
    result = pack(store, image, keyfile=KEY_FILE if key else None)
    assert read_image(store, result.snapshot, "disk.img", key) == bytes(size)
    assert len(chunks(store)) == (1 if size % CHUNK == 0 else 2)
    assert result.counts.zeros + result.counts.holes == size // CHUNK * CHUNK
    if key is None:
        assert chunk_path(store, ZERO_DIGEST).exists()


def test_nothing_is_written_twice(tmp_path, store):
    """Of an older snapshot, of another image, and of the same one."""
    first = random_bytes(CHUNK, 1)
    pack(store, write(tmp_path / "a.img", first + random_bytes(CHUNK, 2)), time=WHEN)
    before = {path: path.stat() for path in chunks(store)}
    data = first + random_bytes(CHUNK, 3) * 2
    image = write(tmp_path / "b.img", data)
    result = pack(store, image, f"copy={image}")
    assert len(chunks(store)) == len(before) + 1
    assert result.counts.new == CHUNK
    assert result.counts.reused == 5 * CHUNK
    for path, old in before.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (old.st_ino, old.st_mtime_ns)
    assert read_image(store, result.snapshot, "copy.img") == data


def test_garbage_collection_sees_the_use(tmp_path, store):
    """The access time of a chunk that is used again is now; the others' stay."""
    data = random_bytes(CHUNK, 1)
    image = write(tmp_path / "a.img", data)
    pack(store, image, time=WHEN)
    [used] = chunks(store)
    pack(store, write(tmp_path / "b.img", random_bytes(CHUNK, 2)), time=WHEN + 1)
    [other] = chunks(store) - {used}
    for path in (used, other):
        os.utime(path, (1000, 2000))
    begun = time.time()
    pack(store, image)
    assert begun - 1 <= used.stat().st_atime <= time.time()
    assert used.stat().st_mtime == 2000
    assert other.stat().st_atime == 1000


@pytest.mark.parametrize("damage", ["empty", "too big", "gone"])
def test_a_chunk_that_cannot_be_whole_is_written_anew(tmp_path, store, damage):
    data = random_bytes(CHUNK, 1)
    image = write(tmp_path / "a.img", data)
    old = pack(store, image, time=WHEN)
    [path] = chunks(store)
    if damage == "gone":
        path.rename(f"{path}.0.bad")
    else:
        os.truncate(path, 0 if damage == "empty" else CHUNK + 45)
    result = pack(store, image)
    assert result.counts.new == CHUNK
    for name in (old.snapshot, result.snapshot):
        assert read_image(store, name, "a.img") == data


def test_namespace(tmp_path, store):
    image = write(tmp_path / "disk.img", b"x")
    for group, options in (("vm/1", {"namespace": "a/b"}), ("ns/a/b/ct/2", {}), ("host/h", {})):
        pack(store, image, group=group, time=WHEN, **options)
    assert snapshots(store) == [
        f"host/h/{STAMP}",
        f"ns/a/ns/b/ct/2/{STAMP}",
        f"ns/a/ns/b/vm/1/{STAMP}",
    ]


def test_the_name_is_for_map(tmp_path, store):
    image = write(tmp_path / "disk.img", b"x")
    result = pack(store, image, namespace="a/b")
    name = f"{result.snapshot}/{result.images[0].archive}"
    opened = open_image(name, repository=str(store))
    assert opened.read(0, 1) == b"x"
    opened.close()


def test_owner_is_written_once(tmp_path, store):
    image = write(tmp_path / "disk.img", b"x")
    pack(store, image, time=WHEN)
    owner = store / "vm/100/owner"
    assert owner.read_text() == "root@pam\n"
    owner.write_text("backup@pbs\n")
    pack(store, image)
    assert owner.read_text() == "backup@pbs\n"


def test_modes_do_not_depend_on_the_umask(tmp_path, store):
    image = write(tmp_path / "disk.img", b"x")
    old = os.umask(0o077)
    try:
        result = pack(store, image)
    finally:
        os.umask(old)
    [chunk] = chunks(store)
    snapshot = store / result.snapshot
    for path in (chunk.parent, snapshot, snapshot.parent, snapshot.parent.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
    for path in (chunk, *snapshot.iterdir(), store / "vm/100/owner"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")
def test_all_belongs_to_the_owner_of_the_store(tmp_path, store):
    """A server runs as a user of its own."""
    for path in (store, store / ".chunks"):
        os.chown(path, 34, 34)
    image = write(tmp_path / "disk.img", b"x" * CHUNK + b"y")
    pack(store, image, namespace="a", keyfile=KEY_FILE)
    found = [store, *store.rglob("*")]
    assert len(found) > 10
    assert {(path.stat().st_uid, path.stat().st_gid) for path in found} == {(34, 34)}


def test_create_store(tmp_path):
    """A new store has what a server's has, and a second run finds it."""
    root = tmp_path / "new"
    image = write(tmp_path / "disk.img", b"x")
    for _ in range(2):
        pack(root, image, create_store=True)
    names = set(os.listdir(root / ".chunks"))
    assert names == {f"{prefix:04x}" for prefix in range(1 << 16)}
    assert set(os.listdir(root)) == {".chunks", ".lock", "vm"}
    assert len(snapshots(root)) == 2
    subprocess.run(["rm", "-rf", root], check=True)  # in a tenth of the time that pytest takes


def test_create_store_goes_on_where_it_was_killed(tmp_path):
    (tmp_path / "new/.chunks.new/00ff").mkdir(parents=True)
    (tmp_path / "new/lost+found").mkdir()
    pack(tmp_path / "new", write(tmp_path / "disk.img", b"x"), create_store=True)
    assert len(os.listdir(tmp_path / "new/.chunks")) == 1 << 16
    subprocess.run(["rm", "-rf", tmp_path / "new"], check=True)


def test_now_is_the_next_second_that_is_free(tmp_path, store):
    image = write(tmp_path / "disk.img", b"x")
    names = {pack(store, image).snapshot for _ in range(4)}
    assert len(names) == 4
    assert snapshots(store) == sorted(names)
    for name in names:
        assert read_image(store, name, "disk.img") == b"x"


def test_collection_waits_for_pack_and_pack_refuses_collection(tmp_path, store):
    """The lock is the one that a server takes: fcntl's, on .lock."""
    image = write(tmp_path / "disk.img", b"x")
    seen = []
    child = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def collect(_progress: object) -> None:
        command = [sys.executable, "-c", child, str(store / ".lock")]
        seen.append(subprocess.run(command, capture_output=True).returncode)

    pack(store, image, report=collect)
    assert set(seen) == {1}
    with open(store / ".lock", "r+") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        with pytest.raises(loopdev.DeviceBusyError, match="garbage is being collected"):
            pack(store, image)
    assert len(snapshots(store)) == 1


def test_group_that_is_locked_for_a_moment(tmp_path, store):
    """A server that makes a snapshot holds the lock of its group; so it is waited for."""
    image = write(tmp_path / "disk.img", b"x")
    pack(store, image)
    directory = os.open(store / "vm/100", os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    reported = threading.Event()

    def unlock() -> None:
        reported.wait()
        os.close(directory)

    thread = threading.Thread(target=unlock)
    thread.start()
    pack(store, image, report=lambda _progress: reported.set())
    thread.join()
    assert len(snapshots(store)) == 2


def test_group_that_stays_locked(tmp_path, store, monkeypatch):
    monkeypatch.setattr("loopdev.images.pbs._publish._LOCK_TIMEOUT", 0.1)
    image = write(tmp_path / "disk.img", b"x")
    pack(store, image)
    directory = os.open(store / "vm/100", os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    with pytest.raises(loopdev.DeviceBusyError):
        pack(store, image)
    os.close(directory)
    assert len(snapshots(store)) == 1
    assert not list(store.glob(f"{PREFIX}*"))


@pytest.mark.parametrize(("namespace", "place"), [("", "main"), ("a/b", "main/a:b")])
def test_lock_of_a_group_is_the_servers(tmp_path, store, namespace, place):
    """From version 3.3.4 on it is a file below /run, named after the group."""
    group = parse_group("vm/100", namespace)
    (store / group.path).mkdir(parents=True)
    locks = tmp_path / "run/locks"
    locks.mkdir(parents=True)
    config = tmp_path / "datastore.cfg"
    config.write_text(f"datastore: main\n\tpath {store}\n")
    where = (str(store), group, str(locks), str(config))
    taken = lock_group(*where)
    with pytest.raises(loopdev.DeviceBusyError):
        lock_group(*where)
    for path in (store / group.path, locks / place / "vm-100"):
        fd = os.open(path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(fd)
    for lock in taken:
        lock.close()
    for lock in lock_group(*where):
        lock.close()


def test_image_of_a_snapshot_can_be_packed(tmp_path, store, monkeypatch):
    """From one datastore to another, and to another key: the source is any image."""
    monkeypatch.setenv("PBS_REPOSITORY", str(VECTORS / "datastore"))
    result = pack(store, f"pbs:vm/100/{STAMP}/drive-scsi0.img", keyfile=KEY_FILE)
    image = bytes(CHUNK) + repeated(CHUNK, 21) + repeated(540672, 22)
    archive = result.images[0].archive
    assert read_image(store, result.snapshot, archive, KEY) == image
    assert result.counts.holes == CHUNK


def test_progress_adds_up(tmp_path, store):
    data = random_bytes(CHUNK, 1) * 3 + bytes(CHUNK) + random_bytes(CHUNK, 2) + b"end"
    reports: list[loopdev.PackProgress] = []
    pack(store, write(tmp_path / "disk.img", data), report=reports.append)
    assert [progress.done for progress in reports] == sorted(progress.done for progress in reports)
    last = reports[-1]
    assert last.total == last.done == len(data)
    assert (last.new, last.reused, last.zeros) == (2 * CHUNK + 3, 2 * CHUNK, CHUNK)
    assert last.written == sum(path.stat().st_size for path in chunks(store))


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_any_number_of_jobs_gives_the_same(tmp_path, store, jobs):
    data = b"".join(random_bytes(CHUNK, seed % 5) for seed in range(12)) + b"x"
    result = pack(store, write(tmp_path / "disk.img", data), jobs=jobs)
    assert read_image(store, result.snapshot, "disk.img") == data
    assert len(chunks(store)) == 6


def test_image_that_is_written_to_meanwhile(tmp_path, store):
    path = tmp_path / "disk.img"
    write(path, random_bytes(CHUNK, 1))

    def touch(_progress: object) -> None:
        os.utime(path)

    assert pack(store, str(path), report=touch).images[0].changed
    assert not pack(store, str(path)).images[0].changed
