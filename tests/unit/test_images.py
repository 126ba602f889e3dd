# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Choosing an image, and raw ones."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pbs import DISK, SNAPSHOT, VECTORS

from loopdev.errors import BackingFileError, ClosedError, ImageReadError, InvalidValueError
from loopdev.images import map_name, open_image, resolve

STORE = str(VECTORS / "datastore")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(hashlib.shake_128(b"raw").digest(100001))
    return path


def test_a_file(path):
    data = path.read_bytes()
    image = open_image(path)
    assert (image.size, image.cached) == (100001, False)
    assert image.block_size & (image.block_size - 1) == 0
    assert os.pread(image.fileno(), 10, 5) == data[5:15]
    assert image.read(0, 1 << 30) == data
    assert not image.is_zero(0, 512)
    image.close()
    image.close()
    with pytest.raises(ClosedError):
        image.read(0, 1)


def test_every_offset_and_length(path):
    data = path.read_bytes()
    image = open_image(str(path))

    @given(st.integers(0, 100010), st.integers(0, 100010))
    def check(offset, length):
        expected = data[offset : offset + length]
        assert image.read(offset, length) == expected
        buffer = bytearray(len(expected))
        image.read_into(offset, memoryview(buffer))
        assert buffer == expected

    check()
    image.close()


def test_source(path):
    status = path.stat()
    source = resolve(path)
    assert source.description == str(path)
    assert source.identity == f"raw:{status.st_dev}:{status.st_ino}"
    assert source.name == "disk.img"
    source.close()


def test_one_file_has_one_identity(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    found = [resolve(name) for name in (path, tmp_path / "link", tmp_path / "hard", f"raw:{path}")]
    assert len({source.identity for source in found}) == 1
    for source in found:
        source.close()


def test_it_is_the_file_that_was_there(path, tmp_path, monkeypatch):
    """Whatever becomes of its name before it is opened."""
    data = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    source = resolve("disk.img")
    path.rename(tmp_path / "other")
    path.write_bytes(b"x" * 100001)
    monkeypatch.chdir("/")
    image = source.open()
    source.close()
    assert image.read(0, 1 << 30) == data
    image.close()


def test_a_file_that_becomes_shorter(path):
    image = open_image(path)
    os.truncate(path, 1000)
    assert len(image.read(0, 1000)) == 1000
    with pytest.raises(ImageReadError) as caught:
        image.read(0, 2000)
    assert (caught.value.offset, caught.value.length) == (1000, 1000)
    assert "shorter" in str(caught.value)
    assert caught.value.errno == errno.EIO
    image.close()


def test_a_file_that_becomes_longer(path):
    image = open_image(path)
    os.truncate(path, 200000)
    assert len(image.read(0, 1 << 20)) == 100001
    image.close()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, errno.ENOENT),
        (lambda path: path.mkdir(), errno.EISDIR),
        (os.mkfifo, errno.EINVAL),
        (lambda path: path.write_bytes(b""), errno.EINVAL),
    ],
)
@pytest.mark.parametrize("prefix", ["", "raw:"])
def test_what_is_no_image(tmp_path, make, code, prefix):
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(BackingFileError) as caught:
        open_image(f"{prefix}{path}")
    assert caught.value.errno == code


@pytest.mark.parametrize("source", ["", "raw:", "/dev/null", "a\0b"])
def test_bad_names(source):
    with pytest.raises((BackingFileError, InvalidValueError)):
        open_image(source)


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"QFI\xfb\0\0\0\x03", "qcow2"),
        (b"KDMV", "VMDK"),
        (b"# Disk DescriptorFile\nversion=1", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
        (b"<<< Oracle VM VirtualBox Disk Image >>>\n" + bytes(24) + b"\x7f\x10\xda\xbe", "VDI"),
        (gzip.compress(b"x"), "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh9", "bzip2"),
        (b"PK\x03\x04", "ZIP"),
        ((VECTORS / "index/tiny.didx").read_bytes(), "datastore"),
        ((VECTORS / "index/tiny-plain.img.fidx").read_bytes(), "--repository"),
    ],
)
def test_other_formats_are_refused(tmp_path, head, what):
    path = tmp_path / "disk"
    path.write_bytes(head + bytes(1000))
    with pytest.raises(BackingFileError) as caught:
        open_image(path)
    assert what in str(caught.value)
    assert f"raw:{path}" in str(caught.value)
    image = open_image(f"raw:{path}")
    assert image.read(0, len(head)) == head
    image.close()


def test_what_is_chosen(path, monkeypatch):
    """A file that is there is a file; what looks like a snapshot is one."""
    monkeypatch.setenv("PBS_REPOSITORY", STORE)
    monkeypatch.chdir(path.parent)
    for source, kind in (
        ("disk.img", "raw:"),
        (f"{SNAPSHOT}/{DISK}", "pbs:"),
        (f"pbs:{SNAPSHOT}/{DISK}", "pbs:"),
    ):
        found = resolve(source)
        assert found.identity.startswith(kind)
        found.close()
    directory = path.parent / SNAPSHOT
    directory.mkdir(parents=True)
    (directory / DISK).write_bytes(b"a file of that name")
    found = resolve(f"{SNAPSHOT}/{DISK}")
    assert found.identity.startswith("raw:")
    found.close()
    found = resolve(f"{SNAPSHOT}/{DISK}", repository=STORE)
    assert found.identity.startswith("pbs:")
    found.close()


def test_no_repository_at_all(monkeypatch):
    monkeypatch.delenv("PBS_REPOSITORY", raising=False)
    with pytest.raises(InvalidValueError) as caught:
        resolve(f"{SNAPSHOT}/{DISK}")
    assert "--repository" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("disk.img", "disk.img"),
        ("my disk.img", "my-disk.img"),
        ("größe", "gr--e"),
        (".hidden", "hidden"),
        ("-x", "x"),
        ("...", "image"),
        ("", "image"),
        ("x" * 100, "x" * 64),
    ],
)
def test_names_of_maps(text, name):
    assert map_name(text) == name


@given(st.text())
def test_any_name_gives_one_of_a_map(text):
    name = map_name(text)
    assert 1 <= len(name) <= 64
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert name[0] not in ".-"
