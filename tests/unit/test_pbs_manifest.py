# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Manifests: canonical JSON, signatures, what is wrong with them, and the way back."""

from __future__ import annotations

import hashlib
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pbs import KEY, VALUES, plain_blob, vector

from loopdev._json import canonical, parse_object
from loopdev.errors import (
    EncryptionKeyError,
    ImageFormatError,
    ImageNotFoundError,
    InvalidValueError,
)
from loopdev.images.pbs import blob, manifest, names
from loopdev.images.pbs.keys import CryptKey
from loopdev.images.pbs.manifest import FileEntry, Manifest, find_image, key_of

ID_KEY = hashlib.pbkdf2_hmac("sha256", KEY, b"_id_key", 10, 32)
STORED = [
    ("datastore_none", ""),
    ("datastore_encrypt", "ns/test/"),
    ("datastore_sign-only", "ns/test/ns/deep/"),
]
SNAPSHOT = names.parse_snapshot("vm/100/2024-01-02T03:04:05Z")
ENTRY = {"filename": "d.img.fidx", "crypt-mode": "none", "size": 9, "csum": "ab" * 32}
GOOD = {"backup-type": "vm", "backup-id": "100", "backup-time": 1704164645, "files": [ENTRY]}


def stored(name: str) -> bytes:
    return vector(f"datastore/{VALUES[name]['path']}/index.json.blob")


def parsed(**changes: object) -> Manifest:
    raw = {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
    return Manifest.parse(plain_blob(json.dumps(raw).encode()), "/m")


def signature_of(raw: dict[str, object]) -> str:
    """Return a signature, made with the standard library alone."""
    signed = {name: raw[name] for name in raw if name not in ("unprotected", "signature")}
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hmac.new(ID_KEY, text.encode(), "sha256").hexdigest()


@pytest.mark.parametrize(("name", "_"), STORED)
def test_vectors(name, _):
    facts = VALUES[name]
    found = Manifest.parse(stored(name))
    assert f"{found.type}/{found.id}/{names.format_time(found.time)}" in facts["path"]
    assert found.time == facts["backup_time"]
    assert (found.signature and found.signature.hex()) == facts["signature"]
    entry = find_image(found, "drive-scsi0.img", SNAPSHOT)
    assert (entry.size, entry.csum.hex()) == (8929280, facts["index_csum"])
    assert entry.crypt_mode == name.removeprefix("datastore_")
    raw = parse_object(blob.decode(stored(name)))
    signed = {key: raw[key] for key in raw if key not in ("unprotected", "signature")}
    assert canonical(signed) == facts["canonical"]
    if facts["signature"]:
        assert manifest.sign(raw, CryptKey(KEY)).hex() == facts["signature"]


@pytest.mark.parametrize(("name", "_"), STORED)
def test_the_right_key(name, _):
    Manifest.parse(stored(name)).check_key(CryptKey(KEY))


@pytest.mark.parametrize(("name", "_"), STORED[1:])
def test_no_key(name, _):
    with pytest.raises(EncryptionKeyError) as caught:
        Manifest.parse(stored(name)).check_key(None)
    assert "missing key" in str(caught.value)
    assert "0e:ab:d4:46:0b:6e:b9:ca" in str(caught.value)


@pytest.mark.parametrize(("name", "_"), STORED[1:])
def test_another_key(name, _):
    with pytest.raises(EncryptionKeyError) as caught:
        Manifest.parse(stored(name)).check_key(CryptKey(bytes([1]) * 32))
    assert "wrong key" in str(caught.value)
    for key in ("0e:ab:d4:46:0b:6e:b9:ca", "4c:f7:c7:a9:31:86:6a:0d"):
        assert key in str(caught.value)


@pytest.mark.parametrize("name", ["backup-id", "backup-time", "files", "added"])
def test_what_is_signed_cannot_be_changed(name):
    raw = json.loads(blob.decode(stored("datastore_encrypt")))
    raw[name] = {"backup-id": "999", "backup-time": 1, "files": [], "added": True}[name]
    changed = Manifest.parse(plain_blob(json.dumps(raw).encode()))
    with pytest.raises(ImageFormatError) as caught:
        changed.check_key(CryptKey(KEY))
    assert "signature" in str(caught.value)


def test_what_is_not_signed_can_be_changed():
    """A server adds notes and the state of its verification."""
    raw = json.loads(blob.decode(stored("datastore_encrypt")))
    raw["unprotected"].update(notes="new", verify_state={"state": "failed"}, ratio=0.5, x=None)
    changed = Manifest.parse(plain_blob(json.dumps(raw, indent=4).encode()))
    changed.check_key(CryptKey(KEY))
    assert (changed.notes, changed.verification) == ("new", "failed")


def test_upstreams_signature():
    """The one of upstream's own test."""
    files = [
        {"filename": "test1.img.fidx", "crypt-mode": "encrypt", "size": 200, "csum": "01" * 32},
        {"filename": "abc.blob", "crypt-mode": "none", "size": 200, "csum": "02" * 32},
    ]
    raw = {
        "backup-type": "host",
        "backup-id": "elsa",
        "backup-time": 1593179765,
        "files": files,
        "unprotected": {"note": "x"},
    }
    key = CryptKey(hashlib.scrypt(b"test", salt=b"", n=65536, r=8, p=1, dklen=32, maxmem=1 << 27))
    assert manifest.sign(raw, key).hex() == (
        "d7b446fb7db081662081d4b40fedd858a1d6307a5aff4ecff7d5bf4fd35679e9"
    )


def test_canonical_vector():
    facts = VALUES["canonical_json"]
    key = CryptKey(KEY)
    signed = {k: v for k, v in facts["input"].items() if k not in ("signature", "unprotected")}
    assert canonical(signed).encode().hex() == facts["output_utf8_hex"]
    assert manifest.sign(facts["input"], key).hex() == facts["hmac_K_00_1f"]


json_values = st.recursive(
    st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), json_values))
def test_canonical_is_what_the_json_module_makes(value):
    expected = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert canonical(value) == expected


@given(st.dictionaries(st.text(), json_values), st.sampled_from([None, 2]))
def test_objects_are_parsed_as_by_the_json_module(value, indent):
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    assert parse_object(f" \n{text}\t ".encode()) == value


@pytest.mark.parametrize("value", [None, 1.5, {"a": [None]}, {"a": {"b": 0.5}}])
def test_what_cannot_be_signed(value):
    raw = {**GOOD, "extra": value}
    with pytest.raises(ImageFormatError):
        manifest.sign(raw, CryptKey(KEY))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{}x",
        b"[]",
        b"7",
        b"null",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": 1,}',
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'{"a": "\\ud800"}',
        b'{"a": [{"\\udfff": 1}]}',
        b'{"a": "\n"}',
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":' * 100000 + b"1" + b"}" * 100000,
        b"[" * 1000000,
    ],
    ids=lambda text: text[:12],
)
def test_what_is_no_json(text):
    with pytest.raises(ImageFormatError):
        parse_object(text)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(ImageFormatError):
        Manifest.parse(data)
    with pytest.raises(ImageFormatError):
        Manifest.parse(plain_blob(data))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
fields = st.sampled_from([*GOOD, "unprotected", "signature"])


@given(st.dictionaries(fields, anything))
def test_any_fields_give_a_manifest_or_our_error(changes):
    try:
        found = parsed(**changes)
        assert isinstance(found.notes, str)
        found.check_key(CryptKey(KEY))
    except (ImageFormatError, EncryptionKeyError):
        pass


@given(st.dictionaries(st.sampled_from([*ENTRY]), anything))
def test_any_file_gives_a_manifest_or_our_error(changes):
    try:
        (entry,) = parsed(files=[{**ENTRY, **changes}]).files
    except ImageFormatError:
        return
    assert entry.size >= 0
    assert len(entry.csum) == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"backup-type": ...},
        {"backup-id": 100},
        {"backup-time": "now"},
        {"backup-time": True},
        {"files": ...},
        {"files": {}},
        {"files": [1]},
        {"files": [{**ENTRY, "csum": "ab"}]},
        {"files": [{**ENTRY, "csum": ":".join(["ab"] * 32)}]},
        {"files": [{**ENTRY, "size": -1}]},
        {"files": [{**ENTRY, "size": 1.5}]},
        {"files": [{**ENTRY, "crypt-mode": "rot13"}]},
        {"unprotected": []},
        {"unprotected": {"key-fingerprint": "none"}},
        {"unprotected": {"key-fingerprint": 5}},
        {"signature": "ab"},
        {"signature": 5},
    ],
)
def test_wrong_fields(changes):
    with pytest.raises(ImageFormatError) as caught:
        parsed(**changes)
    assert caught.value.path == "/m"


def test_old_backups():
    """Without crypt-mode, unprotected and signature."""
    entry = {name: value for name, value in ENTRY.items() if name != "crypt-mode"}
    found = parsed(files=[entry])
    assert found.files[0].crypt_mode == "none"
    assert (found.notes, found.verification, found.signature) == ("", None, None)
    found.check_key(None)
    found.check_key(CryptKey(KEY))


def test_a_manifest_of_another_snapshot():
    found = parsed()
    found.check_snapshot(SNAPSHOT)
    for other in ("vm/101/2024-01-02T03:04:05Z", "ct/100/2024-01-02T03:04:05Z"):
        with pytest.raises(ImageFormatError):
            found.check_snapshot(names.parse_snapshot(other))
    with pytest.raises(ImageFormatError):
        found.check_snapshot(names.parse_snapshot("vm/100/2024-01-02T03:04:06Z"))


def entry_of(filename: str, mode: str = "none") -> dict[str, object]:
    return {"filename": filename, "crypt-mode": mode, "size": 9, "csum": "00" * 32}


FILES = [entry_of(name) for name in ("d.img.fidx", "e.img.fidx", "root.pxar.didx", "vm.conf.blob")]


@pytest.mark.parametrize("name", ["d.img", "d.img.fidx"])
def test_an_image_by_its_name(name):
    assert find_image(parsed(files=FILES), name, SNAPSHOT).filename == "d.img.fidx"


@pytest.mark.parametrize(
    ("files", "name", "there"),
    [(FILES, "x.img", "there is d.img, e.img"), ([], "d.img", "there is no image in it")],
)
def test_no_such_image(files, name, there):
    with pytest.raises(ImageNotFoundError) as caught:
        find_image(parsed(files=files), name, SNAPSHOT)
    assert f"vm/100/2024-01-02T03:04:05Z/{name}" in str(caught.value)
    assert there in str(caught.value)


@pytest.mark.parametrize("name", ["root.pxar", "root.pxar.didx", "vm.conf", "vm.conf.blob"])
def test_a_file_that_is_no_image(name):
    with pytest.raises(InvalidValueError) as caught:
        find_image(parsed(files=FILES), name, SNAPSHOT)
    assert "proxmox-backup-client" in str(caught.value)


@pytest.mark.parametrize("mode", ["none", "sign-only", "encrypt"])
def test_only_what_is_encrypted_needs_a_key(mode):
    found, key = Manifest.parse(stored(f"datastore_{mode}")), CryptKey(KEY)
    entry = find_image(found, "drive-scsi0.img", SNAPSHOT)
    assert key_of(entry, found, key) is (key if mode == "encrypt" else None)
    if mode != "encrypt":
        assert key_of(entry, found, None) is None
        return
    with pytest.raises(EncryptionKeyError) as caught:
        key_of(entry, found, None)
    assert "missing key" in str(caught.value)


@pytest.mark.parametrize("mode", ["sign-only", "encrypt"])
def test_a_signature_that_was_taken_away(mode):
    found = parsed(files=[entry_of("d.img.fidx", mode)], signature=None)
    with pytest.raises(ImageFormatError) as caught:
        key_of(found.files[0], found, CryptKey(KEY))
    assert "no signature" in str(caught.value)


@pytest.mark.parametrize("encrypted", [False, True])
def test_build_is_read_by_others(encrypted):
    key = CryptKey(KEY) if encrypted else None
    mode = "encrypt" if encrypted else "none"
    entry = FileEntry(filename="d.img.fidx", crypt_mode=mode, size=9, csum=bytes(32))
    data = manifest.build(SNAPSHOT, [entry], key, {"notes": "märz"})
    raw = json.loads(blob.decode(data))
    assert raw["backup-type"] == "vm"
    assert raw["backup-id"] == "100"
    assert raw["backup-time"] == 1704164645
    assert raw["files"] == [
        {"filename": "d.img.fidx", "crypt-mode": mode, "size": 9, "csum": "00" * 32}
    ]
    assert raw["unprotected"]["notes"] == "märz"
    if encrypted:
        assert raw["signature"] == signature_of(raw)
        fingerprint = VALUES["keys"]["K_00_1f"]["fingerprint"]
        assert raw["unprotected"]["key-fingerprint"] == fingerprint
    else:
        assert raw["signature"] is None
    found = Manifest.parse(data)
    found.check_snapshot(SNAPSHOT)
    found.check_key(key)
    assert found.files == (entry,)


def test_what_must_be_signed_needs_a_key():
    entry = FileEntry(filename="d.img.fidx", crypt_mode="sign-only", size=9, csum=bytes(32))
    with pytest.raises(InvalidValueError):
        manifest.build(SNAPSHOT, [entry])


def test_escaped_characters():
    """A pair of escapes is one character."""
    assert parse_object(rb'{"a": "\ud83d\ude00\u00e9"}') == {"a": "😀é"}
