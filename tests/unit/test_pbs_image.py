# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Images in a datastore: their bytes, each check, and what happens when something is lost."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
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
    disk,
    make_snapshot,
    plain_blob,
    vector,
    write_manifest,
)

from loopdev.errors import (
    ClosedError,
    DeviceBusyError,
    EncryptionKeyError,
    ImageFormatError,
    ImageNotFoundError,
    ImageReadError,
    InvalidValueError,
)
from loopdev.images import open_image, resolve

STORE = str(VECTORS / "datastore")
SOURCES = [(SNAPSHOT, None), (ENCRYPTED, KEY_FILE), (SIGNED, KEY_FILE)]
CHUNK = 4 << 20
DIGESTS = VALUES["datastore_none"]["digests"]


@pytest.fixture(scope="module")
def expected():
    data = disk()
    assert hashlib.sha256(data).hexdigest() == VALUES["datastore_image"]["image_sha256"]
    return data


@pytest.fixture
def store(tmp_path):
    return copy_store(tmp_path)


@pytest.fixture
def small(tmp_path):
    """A store with an image of odd size in small chunks, and the image."""
    data = b"".join(i.to_bytes(2, "little") for i in range(10000)) + b"z"
    store = tmp_path / "small"
    make_snapshot(store, SNAPSHOT, data)
    return store, data


def chunk(store, digest):
    return store / ".chunks" / digest[:4] / digest


@pytest.mark.parametrize(("snapshot", "keyfile"), SOURCES)
def test_vectors(snapshot, keyfile, expected):
    image = open_image(f"{snapshot}/{DISK}", repository=STORE, keyfile=keyfile)
    assert (image.size, image.block_size, image.cached) == (8929280, CHUNK, True)
    assert image.fileno() is None
    assert image.read(0, 1 << 30) == expected
    buffer = bytearray(CHUNK)
    for number in (0, 1):
        image.read_into(number * CHUNK, memoryview(buffer))
        assert buffer == expected[number * CHUNK : (number + 1) * CHUNK]
    for offset, length in ((CHUNK - 7, 20), (8929279, 5), (8929280, 5), (3, 0), (CHUNK, CHUNK + 9)):
        assert image.read(offset, length) == expected[offset : offset + length]
    image.close()


@pytest.mark.parametrize(("snapshot", "keyfile"), SOURCES)
@pytest.mark.parametrize("prefix", ["", "pbs:"])
@pytest.mark.parametrize("suffix", ["", ".fidx"])
@pytest.mark.parametrize("when", [None, "latest"])
def test_names(snapshot, keyfile, prefix, suffix, when):
    name = snapshot if when is None else snapshot.rpartition("/")[0] + "/latest"
    source = resolve(f"{prefix}{name}/{DISK}{suffix}", repository=STORE, keyfile=keyfile)
    assert source.description == f"{STORE}: {snapshot}/{DISK}"
    namespace = snapshot.partition("vm/")[0].removeprefix("ns/").rstrip("/")
    inner = snapshot[snapshot.index("vm/") :]
    assert source.identity == f"pbs:{os.path.realpath(STORE)}:{namespace}:{inner}:{DISK}"
    assert set(source.name) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
    )
    assert source.name.endswith(inner.replace("/", "-").replace(":", "-") + "-drive-scsi0")
    source.close()


def test_the_default_name():
    source = resolve(f"{SNAPSHOT}/{DISK}", repository=STORE)
    assert source.name == "vm-100-2024-01-02T03-04-05Z-drive-scsi0"
    source.close()


def test_the_namespace_may_be_given_apart():
    name = ENCRYPTED.removeprefix("ns/test/")
    source = resolve(f"{name}/{DISK}", repository=STORE, namespace="test", keyfile=KEY_FILE)
    assert ENCRYPTED in source.description
    source.close()


def test_the_repository_may_be_in_the_environment(monkeypatch):
    monkeypatch.setenv("PBS_REPOSITORY", STORE)
    for name in (f"{SNAPSHOT}/{DISK}", f"pbs:{SNAPSHOT}/{DISK}"):
        open_image(name).close()


def test_zeros_are_known(expected):
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=STORE)
    assert image.is_zero(0, CHUNK)
    assert image.is_zero(5, 512)
    assert image.is_zero(CHUNK, 0)
    assert not image.is_zero(0, CHUNK + 1)
    assert not image.is_zero(CHUNK, 512)
    image.close()


def test_zeros_need_no_chunk(store, expected):
    """Neither the plain nor the encrypted one."""
    for digest in (DIGESTS[0], VALUES["datastore_encrypt"]["digests"][0]):
        chunk(store, digest).unlink()
    for snapshot, keyfile in SOURCES:
        image = open_image(f"{snapshot}/{DISK}", repository=str(store), keyfile=keyfile)
        assert image.read(0, 1 << 30) == expected
        image.close()


def test_the_zeros_of_the_other_mode_are_no_zeros(tmp_path):
    """In a plain archive, the digest of encrypted zeros is that of something else."""
    store = tmp_path / "store"
    digest = bytes.fromhex(VALUES["zero_chunk_digests"]["4194304"]["K_00_1f"])
    make_snapshot(store, SNAPSHOT, bytes(4096))
    header = bytearray((store / SNAPSHOT / f"{DISK}.fidx").read_bytes()[:4096])
    header[64:80] = CHUNK.to_bytes(8, "little") * 2
    (store / SNAPSHOT / f"{DISK}.fidx").write_bytes(header + digest)
    csum = hashlib.sha256(digest).hexdigest()
    write_manifest(store, SNAPSHOT, [{"filename": f"{DISK}.fidx", "size": CHUNK, "csum": csum}])
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert not image.is_zero(0, CHUNK)
    with pytest.raises(ImageReadError):
        image.read(0, 1)
    image.close()


def test_a_short_chunk_of_zeros_is_read(tmp_path):
    store = tmp_path / "store"
    make_snapshot(store, SNAPSHOT, bytes(4096) + bytes(100))
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert image.is_zero(0, 4096)
    assert not image.is_zero(4096, 100)
    assert image.read(4000, 500) == bytes(196)
    image.close()


@pytest.mark.parametrize("size", [1, 511, 4095, 4096, 4097, 8192, 12289])
def test_sizes(tmp_path, size):
    data = hashlib.shake_128(b"sizes").digest(size)
    make_snapshot(tmp_path / "store", SNAPSHOT, data)
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(tmp_path / "store"))
    assert image.size == size
    assert image.read(0, size + 1) == data
    image.close()


def test_every_offset_and_length(small):
    store, data = small
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))

    @given(st.integers(0, len(data) + 10), st.integers(0, len(data) + 10))
    def check(offset, length):
        assert image.read(offset, length) == data[offset : offset + length]
        buffer = bytearray(len(data[offset : offset + length]))
        if buffer:
            image.read_into(offset, memoryview(buffer))
            assert buffer == data[offset : offset + length]

    check()
    image.close()


def test_what_is_outside(small):
    store, data = small
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    for offset, length in ((-1, 5), (len(data), 1), (len(data) - 1, 2)):
        with pytest.raises(InvalidValueError):
            image.read_into(offset, memoryview(bytearray(length)))
    image.close()


def test_many_threads(small):
    store, data = small
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))

    def check(seed):
        offset = seed * 7919 % len(data)
        return image.read(offset, 6000) == data[offset : offset + 6000]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(check, range(2000)))
    image.close()


def zstd_of(data):
    import struct
    import zlib

    frame = subprocess.run(["zstd", "-q", "-c"], input=data, capture_output=True).stdout
    magic = bytes.fromhex(VALUES["magics"]["zstd"]["hex"])
    return struct.pack("<8sI", magic, zlib.crc32(frame)) + frame


DAMAGE = {
    "missing": (None, "is missing"),
    "empty": (lambda data: b"", "at least 12"),
    "cut off": (lambda data: data[:-1], "checksum"),
    "a bit": (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
    "another chunk": (lambda data: plain_blob(bytes([7]) * 4096), "another chunk"),
    "shorter": (lambda data: plain_blob(data[12:-1]), "4095 bytes, not 4096"),
    "longer": (lambda data: plain_blob(data[12:] + b"x"), "4097 bytes, not 4096"),
    "a bomb": (lambda data: zstd_of(bytes(1 << 24)), "another size"),
    "encrypted": (lambda data: vector("blobs/p1-encrypted.blob"), "encrypted"),
    "huge": (lambda data: bytes(17 << 20), "more than a chunk"),
    "garbage": (lambda data: b"x" * 100, "magic"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_chunk_costs_its_range_alone(small, kind):
    store, data = small
    digest = hashlib.sha256(data[4096:8192]).hexdigest()
    change, reason = DAMAGE[kind]
    path = chunk(store, digest)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    for offset, length in ((4096, 4096), (5000, 1), (0, len(data))):
        with pytest.raises(ImageReadError) as caught:
            image.read(offset, length)
        assert (caught.value.offset, caught.value.length) == (4096, 4096)
        assert digest in str(caught.value)
        assert reason in str(caught.value)
    assert image.read(0, 4096) == data[:4096]
    assert image.read(8192, len(data)) == data[8192:]
    image.close()


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink to itself", "unreadable"])
def test_chunks_that_are_no_files(small, kind):
    store, data = small
    path = chunk(store, hashlib.sha256(data[4096:8192]).hexdigest())
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind != "unreadable" else "/proc/self/mem")
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    with pytest.raises(ImageReadError):
        image.read(4096, 10)
    assert image.read(0, 4096) == data[:4096]
    image.close()


def test_a_wrong_chunk_of_an_encrypted_archive(store):
    """A plain chunk in its place, even of the right digest, is refused."""
    digest = VALUES["datastore_encrypt"]["digests"][1]
    chunk(store, digest).write_bytes(plain_blob(disk()[CHUNK : 2 * CHUNK]))
    image = open_image(f"{ENCRYPTED}/{DISK}", repository=str(store), keyfile=KEY_FILE)
    with pytest.raises(ImageReadError) as caught:
        image.read(CHUNK, 10)
    assert "is not encrypted" in str(caught.value)
    image.close()


def test_encrypted_chunks_cannot_be_exchanged(store):
    """Each is authentic, but not the one that was asked for."""
    one, two = VALUES["datastore_encrypt"]["digests"][:2]
    shutil.copy(chunk(store, one), chunk(store, two))
    image = open_image(f"{ENCRYPTED}/{DISK}", repository=str(store), keyfile=KEY_FILE)
    with pytest.raises(ImageReadError) as caught:
        image.read(CHUNK, 10)
    assert "another chunk" in str(caught.value)
    image.close()


def test_the_snapshot_may_vanish(store, expected):
    """What is in memory stays, and so do the chunks."""
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    shutil.rmtree(store / "vm")
    assert image.read(CHUNK, 1 << 30) == expected[CHUNK:]
    image.close()


def test_the_index_may_be_cut_off(store, expected):
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    (store / SNAPSHOT / f"{DISK}.fidx").write_bytes(b"")
    (store / SNAPSHOT / "index.json.blob").write_bytes(b"")
    assert image.read(CHUNK, 1 << 30) == expected[CHUNK:]
    image.close()


def test_the_store_may_move(store, expected, tmp_path):
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    store.rename(tmp_path / "elsewhere")
    assert image.read(CHUNK, 1 << 30) == expected[CHUNK:]
    image.close()


def test_the_store_may_vanish_and_return(store, expected):
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    paths = [chunk(store, digest) for digest in DIGESTS[1:]]
    saved = [path.read_bytes() for path in paths]
    shutil.rmtree(paths[0].parent)
    with pytest.raises(ImageReadError):
        image.read(CHUNK, 5)
    paths[0].parent.mkdir()
    paths[0].write_bytes(saved[0])
    assert image.read(CHUNK, 1 << 30) == expected[CHUNK:]
    image.close()


def test_it_is_opened_in_another_process(expected):
    """As the workers of a map do, with the source that was resolved before."""
    program = (
        "import os, sys, hashlib\n"
        "from loopdev.images import resolve\n"
        "source = resolve(sys.argv[1], repository=sys.argv[2], keyfile=sys.argv[3])\n"
        "os.chdir('/')\n"
        "children = []\n"
        "for _ in range(3):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        image = source.open()\n"
        "        digest = hashlib.sha256(image.read(0, 1 << 30)).hexdigest()\n"
        "        os.write(1, digest.encode() + b'\\n')\n"
        "        os._exit(0)\n"
        "    children.append(pid)\n"
        "for pid in children:\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
    )
    relative = os.path.relpath(STORE)
    done = subprocess.run(
        [sys.executable, "-c", program, f"{ENCRYPTED}/{DISK}", f"./{relative}", KEY_FILE],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [hashlib.sha256(expected).hexdigest()] * 3, done.stderr


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (f"vm/999/{SNAPSHOT[-20:]}/{DISK}", "snapshot"),
        (f"vm/999/latest/{DISK}", "group"),
        (f"vm/100/2023-01-01T00:00:00Z/{DISK}", "snapshot"),
        (f"ns/none/{SNAPSHOT}/{DISK}", "snapshot"),
        (f"{SNAPSHOT}/other.img", "archive"),
        (f"{SNAPSHOT}/drive", "archive"),
        (f"{SNAPSHOT}/{DISK}.fidx.fidx", "archive"),
    ],
)
def test_what_is_not_there(name, what):
    with pytest.raises(ImageNotFoundError) as caught:
        resolve(name, repository=STORE)
    assert caught.value.what == what
    assert caught.value.exit_code == 3


def test_the_images_that_are_there_are_named():
    with pytest.raises(ImageNotFoundError) as caught:
        resolve(f"{SNAPSHOT}/other.img", repository=STORE)
    assert f"there is {DISK}" in str(caught.value)


@pytest.mark.parametrize(
    ("filename", "use"),
    [
        ("qemu-server.conf", "proxmox-backup-client restore"),
        ("qemu-server.conf.blob", "proxmox-backup-client restore"),
        ("root.pxar.didx", "proxmox-backup-client mount"),
        ("catalog.pcat1.didx", "proxmox-backup-client mount"),
    ],
)
def test_files_of_other_kinds(filename, use):
    with pytest.raises(InvalidValueError) as caught:
        resolve(f"{SNAPSHOT}/{filename}", repository=STORE)
    assert use in str(caught.value)


def test_a_dynamic_archive_without_its_suffix(tmp_path):
    store = tmp_path / "store"
    make_snapshot(store, SNAPSHOT, b"x")
    entry = {"filename": "root.pxar.didx", "size": 1, "csum": "00" * 32}
    write_manifest(store, SNAPSHOT, [entry])
    with pytest.raises(InvalidValueError) as caught:
        resolve(f"{SNAPSHOT}/root.pxar", repository=str(store))
    assert "archive of files" in str(caught.value)
    with pytest.raises(ImageNotFoundError) as missing:
        resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert "there is no image in it" in str(missing.value)


def test_a_dynamic_index_under_the_name_of_a_fixed_one(store):
    (store / SNAPSHOT / f"{DISK}.fidx").write_bytes(vector("index/tiny.didx"))
    with pytest.raises(ImageFormatError) as caught:
        resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert "dynamic" in str(caught.value)


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (VECTORS / "index").glob("bad-*.fidx"))
)
def test_every_damaged_index(store, name):
    (store / SNAPSHOT / f"{DISK}.fidx").write_bytes(vector(f"index/{name}"))
    with pytest.raises(ImageFormatError):
        resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))


def test_an_index_that_the_manifest_does_not_vouch_for(store):
    """Somebody put the digest of another chunk into it, and made its own checksum right."""
    path = store / SNAPSHOT / f"{DISK}.fidx"
    data = bytearray(path.read_bytes())
    data[4096:4128] = data[4128:4160]
    data[32:64] = hashlib.sha256(data[4096:]).digest()
    path.write_bytes(data)
    with pytest.raises(ImageFormatError) as caught:
        resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert "vouches" in str(caught.value)


def test_an_index_of_another_size(store):
    path = store / SNAPSHOT / f"{DISK}.fidx"
    data = bytearray(path.read_bytes())
    data[64:72] = (8929279).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(ImageFormatError) as caught:
        resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert "8929280" in str(caught.value)


@pytest.mark.parametrize("size", [1 << 50, (8 << 50) + 1])
def test_a_huge_index_takes_no_memory(store, size):
    """A sparse file whose header fits its size, and a manifest that says the same."""
    import struct

    length = 4096 + -(-size // CHUNK) * 32
    path = store / SNAPSHOT / f"{DISK}.fidx"
    header = bytearray(path.read_bytes()[:4096])
    struct.pack_into("<QQ", header, 64, size, CHUNK)
    path.write_bytes(header)
    os.truncate(path, length)
    entry = {"filename": f"{DISK}.fidx", "size": size, "csum": "00" * 32}
    write_manifest(store, SNAPSHOT, [entry])
    with pytest.raises(ImageFormatError) as caught:
        resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert "more than" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"x" * 50, vector("blobs/p1-plain.blob")])
def test_a_damaged_manifest(store, data):
    (store / SNAPSHOT / "index.json.blob").write_bytes(data)
    with pytest.raises(ImageFormatError) as caught:
        resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert caught.value.path is not None
    assert "index.json.blob" in caught.value.path


def test_the_manifest_of_another_snapshot(store):
    other = store / "vm/100/2024-01-09T00:00:00Z"
    shutil.copytree(store / SNAPSHOT, other)
    with pytest.raises(ImageFormatError) as caught:
        resolve(f"vm/100/latest/{DISK}", repository=str(store))
    assert "another snapshot" in str(caught.value)


def test_a_snapshot_without_a_manifest_is_none(store):
    (store / SNAPSHOT / "index.json.blob").unlink()
    for name in (SNAPSHOT, "vm/100/latest"):
        with pytest.raises(ImageNotFoundError) as caught:
            resolve(f"{name}/{DISK}", repository=str(store))
        assert caught.value.what == "snapshot"


@pytest.mark.parametrize("snapshot", [ENCRYPTED, SIGNED])
def test_keys(snapshot):
    for keyfile in (None, OTHER_KEY_FILE, "/nowhere", str(VECTORS / "keys/bad-length.json")):
        with pytest.raises(EncryptionKeyError):
            resolve(f"{snapshot}/{DISK}", repository=STORE, keyfile=keyfile)


def test_a_key_is_not_needed_and_does_no_harm(expected):
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=STORE, keyfile=OTHER_KEY_FILE)
    assert image.read(CHUNK, 1 << 30) == expected[CHUNK:]
    image.close()


@pytest.mark.parametrize("snapshot", [ENCRYPTED, SIGNED])
def test_a_signature_that_was_taken_away(store, snapshot):
    """With the fingerprint gone, too, nothing but the mode says that there should be one."""
    from loopdev.images.pbs import blob

    path = store / snapshot.replace("deep/", "ns/deep/") / "index.json.blob"
    raw = json.loads(blob.decode(path.read_bytes()))
    del raw["signature"], raw["unprotected"]["key-fingerprint"]
    path.write_bytes(plain_blob(json.dumps(raw).encode()))
    with pytest.raises(ImageFormatError) as caught:
        resolve(f"{snapshot}/{DISK}", repository=str(store), keyfile=KEY_FILE)
    assert "has no signature" in str(caught.value)


def test_an_encrypted_archive_without_a_fingerprint_needs_a_key(store):
    from loopdev.images.pbs import blob

    path = store / "ns/test/vm/101/2024-01-03T03:04:05Z/index.json.blob"
    raw = json.loads(blob.decode(path.read_bytes()))
    del raw["unprotected"]["key-fingerprint"]
    path.write_bytes(plain_blob(json.dumps(raw).encode()))
    with pytest.raises(EncryptionKeyError) as caught:
        resolve(f"{ENCRYPTED}/{DISK}", repository=str(store))
    assert "is encrypted" in str(caught.value)


def test_the_snapshot_is_locked_while_it_is_open(store):
    path = os.open(store / SNAPSHOT, os.O_RDONLY)
    source = resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))
    image = source.open()
    source.close()
    with pytest.raises(BlockingIOError):
        fcntl.flock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(path, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(path, fcntl.LOCK_UN)
    image.close()
    fcntl.flock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(DeviceBusyError) as caught:
        resolve(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert "in use" in str(caught.value)
    assert caught.value.exit_code == 4
    os.close(path)


def test_closing(small):
    store, _ = small
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    image.close()
    image.close()
    with pytest.raises((ClosedError, ImageReadError)):
        image.read(0, 1)


def test_nothing_is_left_open_after_an_error(store):
    """The fixture of all tests looks at the descriptors; here are many errors at once."""
    (store / SNAPSHOT / f"{DISK}.fidx").write_bytes(b"")
    before = threading.active_count()
    for name in (f"{SNAPSHOT}/{DISK}", f"{SNAPSHOT}/x", f"{ENCRYPTED}/{DISK}"):
        with pytest.raises((ImageFormatError, ImageNotFoundError, EncryptionKeyError)):
            open_image(name, repository=str(store))
    assert threading.active_count() == before


def test_16_tib_are_opened_in_a_second(tmp_path):
    """An image of zeros, but for its last chunk."""
    import struct
    import time

    store, size = tmp_path / "store", 16 << 40
    last = b"end" + bytes(CHUNK - 3)
    make_snapshot(store, SNAPSHOT, last, CHUNK)
    zero = bytes.fromhex(VALUES["zero_chunk_digests"]["4194304"]["plain"])
    digests = zero * (size // CHUNK - 1) + hashlib.sha256(last).digest()
    csum = hashlib.sha256(digests)
    path = store / SNAPSHOT / f"{DISK}.fidx"
    header = bytearray(path.read_bytes()[:4096])
    struct.pack_into("<32sQQ", header, 32, csum.digest(), size, CHUNK)
    path.write_bytes(header + digests)
    entry = {"filename": f"{DISK}.fidx", "size": size, "csum": csum.hexdigest()}
    write_manifest(store, SNAPSHOT, [entry])
    begin = time.monotonic()
    image = open_image(f"{SNAPSHOT}/{DISK}", repository=str(store))
    assert image.read(size - CHUNK - 2, 5) == b"\0\0end"
    assert time.monotonic() - begin < 1
    image.close()


@pytest.mark.parametrize("snapshot", [SNAPSHOT, ENCRYPTED])
def test_opening_imports_little(snapshot):
    """The time to the first byte is mostly that of imports."""
    program = (
        "import sys\n"
        "from loopdev.images import open_image\n"
        "image = open_image(sys.argv[1], repository=sys.argv[2], keyfile=sys.argv[3] or None)\n"
        "image.read(4 << 20, 512)\n"
        "print(*sys.modules)\n"
    )
    keyfile = KEY_FILE if snapshot == ENCRYPTED else ""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, f"{snapshot}/{DISK}", STORE, keyfile],
        capture_output=True,
        text=True,
    )
    loaded = set(done.stdout.split())
    assert "loopdev.images.pbs.local" in loaded, done.stderr
    unwanted = {
        *("argparse", "contextlib", "ctypes", "dataclasses", "enum", "hashlib", "json"),
        *("logging", "re", "signal", "threading", "typing", "zstandard", "subprocess"),
    }
    assert loaded & unwanted == set()


@pytest.mark.parametrize("there", [[], ["zstandard"]])
def test_without_the_libraries(tmp_path, there):
    """The error names the extra to install, before any process is forked."""
    import importlib.util

    import loopdev

    for name in there:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (tmp_path / name).symlink_to(os.path.dirname(spec.origin))
    program = (
        "import sys\n"
        "sys.path[:0] = sys.argv[1:3]\n"
        "from loopdev.cli import main\n"
        "raise SystemExit(main(sys.argv[3:]))\n"
    )
    source = os.path.dirname(os.path.dirname(str(loopdev.__file__)))
    done = subprocess.run(
        [
            *(sys.executable, "-S", "-c", program, source, str(tmp_path), "verify"),
            *("--repository", STORE, "--keyfile", KEY_FILE, f"{ENCRYPTED}/{DISK}"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "loopdev: this needs the extra 'pbs': pip install 'loopdev[pbs]'\n"
