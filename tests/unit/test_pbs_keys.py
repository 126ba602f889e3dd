# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Keys: every vector, key files of all kinds, wrong passwords, and no secret in any message."""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pbs import KEY, VALUES, payload, vector

from loopdev.errors import EncryptionKeyError, InvalidValueError
from loopdev.images.pbs import keys
from loopdev.images.pbs.keys import CryptKey, create_key_file, load_key

PASSWORD = b"correct horse"
KEYS = VALUES["keys"]


@pytest.mark.parametrize("name", KEYS)
def test_derived_values(name):
    facts = KEYS[name]
    key = CryptKey(bytes.fromhex(facts["key"]))
    assert keys.format_fingerprint(key.fingerprint) == facts["fingerprint"]
    assert keys.short_fingerprint(key.fingerprint) == facts["fingerprint_short"]
    tag = hmac.new(bytes.fromhex(facts["id_key"]), b"abc", "sha256").digest()
    assert key.sign(b"abc") == tag


def test_the_signature_of_the_vectors():
    assert CryptKey(KEY).sign(b"abc").hex() == VALUES["auth_tag"]["hmac_sha256"]


@pytest.mark.parametrize("size", VALUES["zero_chunk_digests"])
@pytest.mark.parametrize("name", ["K_00_1f", "K_01x32"])
def test_digests_of_zeros(size, name):
    facts = VALUES["zero_chunk_digests"][size]
    key = CryptKey(bytes.fromhex(KEYS[name]["key"]))
    assert keys.chunk_digest(bytes(int(size)), key).hex() == facts[name]
    assert keys.chunk_digest(bytes(int(size))).hex() == facts["plain"]


def test_digests():
    p2 = payload(65536, 0)
    assert CryptKey(KEY).digest(p2).hex() == VALUES["digests"]["P2"]["K_00_1f"]
    data = bytes(i % 255 for i in range(100000))  # upstream's own test
    assert keys.chunk_digest(data).hex() == (
        "539a60c3a7cc268ecce082c9184702bc829bb106a2643dee26db3ff0bf8457ee"
    )
    assert keys.chunk_digest(memoryview(data), CryptKey(bytes([1]) * 32)).hex() == (
        "32a2bf5dff84090e7f175c27f666f5cc8268046ab6efda0e501196bceffdc675"
    )


@pytest.mark.parametrize(
    "name",
    [
        "key-none",
        "key-scrypt",
        "key-scrypt-n1024",
        "key-pbkdf2",
        "key-none-no-fingerprint",
        "key-none-null-fingerprint",
    ],
)
def test_key_files(name):
    key = load_key(vector(f"keys/{name}.json"), lambda: PASSWORD)
    assert key.fingerprint == CryptKey(KEY).fingerprint


@pytest.mark.parametrize("name", ["key-none", "key-none-other"])
def test_no_password_is_asked_for_in_vain(name):
    load_key(vector(f"keys/{name}.json"), lambda: pytest.fail("asked"))


@pytest.mark.parametrize("name", ["bad-fingerprint", "bad-length"])
def test_damaged_key_files(name):
    with pytest.raises(EncryptionKeyError) as caught:
        load_key(vector(f"keys/{name}.json"), None, "/key")
    assert caught.value.path == "/key"
    assert caught.value.exit_code == 8


def test_wrong_password():
    with pytest.raises(EncryptionKeyError) as caught:
        load_key(vector("keys/key-scrypt-n1024.json"), lambda: b"wrong horse")
    assert str(caught.value) == "wrong password?"


def test_wrong_password_with_a_hint():
    with pytest.raises(EncryptionKeyError) as caught:
        load_key(vector("keys/key-scrypt.json"), lambda: b"wrong horse", "/key")
    assert str(caught.value) == "/key: wrong password? (password hint: see the battery)"


@pytest.mark.parametrize("password", [b"", b"1234"])
def test_a_short_password(password):
    with pytest.raises(EncryptionKeyError) as caught:
        load_key(vector("keys/key-pbkdf2.json"), lambda: password)
    assert "at least 5" in str(caught.value)


def test_nobody_to_ask():
    with pytest.raises(EncryptionKeyError):
        load_key(vector("keys/key-scrypt.json"))


NONE = json.loads(vector("keys/key-none.json"))
SCRYPT = json.loads(vector("keys/key-scrypt-n1024.json"))
PBKDF2 = json.loads(vector("keys/key-pbkdf2.json"))


def changed(config, path, value):
    found = copy.deepcopy(config)
    inner = found
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return json.dumps(found).encode()


@pytest.mark.parametrize(
    ("config", "path", "value"),
    [
        (NONE, ["data"], None),
        (NONE, ["data"], 5),
        (NONE, ["data"], "!!!"),
        (NONE, ["data"], "AAEC\n"),
        (NONE, ["data"], ""),
        (NONE, ["data"], "ä"),
        (NONE, ["data"], base64.b64encode(bytes(33)).decode()),
        (NONE, ["fingerprint"], "0e:ab"),
        (NONE, ["fingerprint"], 7),
        (NONE, ["kdf"], "Scrypt"),
        (NONE, ["kdf"], {}),
        (NONE, ["kdf"], {"Argon2": {}}),
        (SCRYPT, ["data"], base64.b64encode(bytes(32)).decode()),
        (SCRYPT, ["data"], base64.b64encode(bytes(65)).decode()),
        (SCRYPT, ["kdf", "Scrypt", "n"], 1000),
        (SCRYPT, ["kdf", "Scrypt", "n"], 1),
        (SCRYPT, ["kdf", "Scrypt", "n"], 0),
        (SCRYPT, ["kdf", "Scrypt", "n"], -2),
        (SCRYPT, ["kdf", "Scrypt", "n"], "1024"),
        (SCRYPT, ["kdf", "Scrypt", "n"], 1 << 40),
        (SCRYPT, ["kdf", "Scrypt", "r"], 0),
        (SCRYPT, ["kdf", "Scrypt", "r"], 1 << 30),
        (SCRYPT, ["kdf", "Scrypt", "p"], 1 << 30),
        (SCRYPT, ["kdf", "Scrypt", "salt"], "?"),
        (SCRYPT, ["kdf", "Scrypt", "salt"], None),
        (PBKDF2, ["kdf", "PBKDF2", "iter"], 0),
        (PBKDF2, ["kdf", "PBKDF2", "iter"], 1 << 40),
        (PBKDF2, ["kdf", "PBKDF2", "iter"], 1),
    ],
)
def test_wrong_fields(config, path, value):
    with pytest.raises(EncryptionKeyError):
        load_key(changed(config, path, value), lambda: PASSWORD)


@pytest.mark.parametrize("n", [2, 65536, 1 << 17])
def test_all_that_the_memory_limit_allows(n):
    """The library has a limit of its own, and counts more than the formula."""
    data = changed(SCRYPT, ["kdf", "Scrypt", "n"], n)
    with pytest.raises(EncryptionKeyError) as caught:
        load_key(data, lambda: PASSWORD)
    assert "wrong password?" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"null"])
def test_what_is_no_key_file(data):
    with pytest.raises(EncryptionKeyError) as caught:
        load_key(data, None, "/key")
    assert "is no key file" in str(caught.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(EncryptionKeyError):
        load_key(data, lambda: PASSWORD)


values = st.none() | st.booleans() | st.integers() | st.text() | st.just({}) | st.just([])


@given(
    st.sampled_from([NONE, SCRYPT]),
    st.sampled_from([["kdf"], ["data"], ["fingerprint"], ["hint"], ["created"]]),
    values,
)
def test_any_field_gives_a_key_or_our_error(config, path, value):
    try:
        key = load_key(changed(config, path, value), lambda: PASSWORD)
    except EncryptionKeyError:
        return
    assert key.fingerprint == CryptKey(KEY).fingerprint


@pytest.mark.parametrize("hint", [None, "where it is", "ü" * 64])
def test_create_with_scrypt(hint):
    data = create_key_file("scrypt", PASSWORD, hint, now=1704164645)
    assert b"\n" not in data
    config = json.loads(data)
    kdf = config["kdf"]["Scrypt"]
    assert (kdf["n"], kdf["r"], kdf["p"]) == (65536, 8, 1)
    assert len(base64.b64decode(kdf["salt"])) == 32
    assert config["created"] == config["modified"] == "2024-01-02T03:04:05Z"
    assert config.get("hint") == hint
    key = load_key(data, lambda: PASSWORD)
    assert keys.format_fingerprint(key.fingerprint) == config["fingerprint"]
    # The same, with the standard library and cryptography's other interface.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    salt, sealed = base64.b64decode(kdf["salt"]), base64.b64decode(config["data"])
    derived = hashlib.scrypt(PASSWORD, salt=salt, n=65536, r=8, p=1, dklen=32, maxmem=128 << 20)
    mode = modes.GCM(sealed[:16], sealed[16:32])
    cipher = Cipher(algorithms.AES(derived), mode).decryptor()
    raw = cipher.update(sealed[32:]) + cipher.finalize()
    assert CryptKey(raw).fingerprint == key.fingerprint


def test_create_without_a_password():
    one, two = create_key_file("none"), create_key_file("none")
    assert json.loads(one)["kdf"] is None
    assert load_key(one).fingerprint != load_key(two).fingerprint
    raw = base64.b64decode(json.loads(one)["data"])
    assert CryptKey(raw).fingerprint == load_key(one).fingerprint


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        (("none", PASSWORD), InvalidValueError),
        (("scrypt", None), InvalidValueError),
        (("argon2", PASSWORD), InvalidValueError),
        (("none", None, "hint"), InvalidValueError),
        (("scrypt", PASSWORD, ""), InvalidValueError),
        (("scrypt", PASSWORD, "x" * 65), InvalidValueError),
        (("scrypt", b"1234"), EncryptionKeyError),
    ],
)
def test_what_cannot_be_created(args, kind):
    with pytest.raises(kind) as caught:
        create_key_file(*args)
    assert PASSWORD.decode() not in str(caught.value)


def test_no_secret_is_shown():
    key = CryptKey(KEY)
    id_key = hashlib.pbkdf2_hmac("sha256", KEY, b"_id_key", 10, 32)
    for text in (repr(key), str(key), repr([key]), f"{key}"):
        assert text.strip("[]") == "CryptKey(0e:ab:d4:46:0b:6e:b9:ca)"
        assert KEY.hex() not in text
        assert id_key.hex() not in text


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_keys_of_another_length(length):
    with pytest.raises(EncryptionKeyError):
        CryptKey(bytes(length))


@given(st.binary(max_size=1000))
def test_encryption_round_trip(data):
    key = CryptKey(KEY)
    iv, tag, sealed = key.encrypt(data)
    assert (len(iv), len(tag), len(sealed)) == (16, 16, len(data))
    assert key.decrypt(iv, tag, sealed) == data
    assert key.decrypt(tag, iv, sealed) is None


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (":".join(["0e"] * 32), True),
        ("0E" * 32, True),
        ("0:e" * 32, True),
        ("0e" * 31, False),
        ("0g" * 32, False),
        (" e" * 32, False),
        ("", False),
        (None, False),
        (7, False),
    ],
)
def test_fingerprints(text, good):
    assert keys.parse_fingerprint(text) == (bytes([14]) * 32 if good else None)
