# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Blobs: every vector, what is damaged, and the way back, read by other programs."""

from __future__ import annotations

import hashlib
import resource
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pbs import KEY, PLAIN_MAGIC, VALUES, payload, plain_blob, vector

from loopdev.errors import ImageFormatError
from loopdev.images.pbs import blob
from loopdev.images.pbs.keys import CryptKey

P1 = b"hello, backup world\n"
P2 = payload(65536, 0)
CHUNK = 4 << 20
ZSTD_MAGIC = bytes.fromhex(VALUES["magics"]["zstd"]["hex"])
ENC_MAGIC = bytes.fromhex(VALUES["magics"]["enc"]["hex"])
ENC_ZSTD_MAGIC = bytes.fromhex(VALUES["magics"]["enczstd"]["hex"])

GOOD = [
    ("p1-plain", P1, False),
    ("p2-zstd-nosize", P2, False),
    ("p2-zstd-size", P2, False),
    ("p2-zstd-size-checksum", P2, False),
    ("p1-encrypted", P1, True),
    ("p2-zstd-encrypted", P2, True),
    ("empty-plain", b"", False),
    ("empty-encrypted", b"", True),
]
BAD = [
    ("bad-crc", False, 8, "checksum"),
    ("bad-magic", False, 0, "magic"),
    ("bad-tag", True, 28, "tag"),
    ("bad-ciphertext-good-crc", True, 28, "tag"),
    ("short-header", False, 0, "at least 12"),
    ("short-encrypted-header", True, 0, "at least 44"),
    ("bad-zstd-truncated", False, 12, "cut off"),
    ("bad-zstd-trailing", False, 12, "after"),
    ("bomb-64mib-zeros", False, 12, "more than 4194304"),
]


def key_for(encrypted: bool) -> CryptKey | None:
    return CryptKey(KEY) if encrypted else None


def wrapped(frame: bytes) -> bytes:
    return struct.pack("<8sI", ZSTD_MAGIC, zlib.crc32(frame)) + frame


def zstd(data: bytes, *options: str) -> bytes:
    """Return a frame made by the zstd command."""
    done = subprocess.run(["zstd", "-q", "-c", *options], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_vectors_are_what_they_say():
    assert hashlib.sha256(P1).hexdigest() == VALUES["payloads"]["P1"]["sha256"]
    assert hashlib.sha256(P2).hexdigest() == VALUES["payloads"]["P2"]["sha256"]
    for name, facts in VALUES["files"].items():
        data = vector(name)
        assert len(data) == facts["size"]
        assert hashlib.sha256(data).hexdigest() == facts["sha256"]


@pytest.mark.parametrize("kind", ["plain", "zstd", "enc", "enczstd"])
def test_magics(kind):
    names = {
        "plain": blob.PLAIN,
        "zstd": blob.ZSTD,
        "enc": blob.ENCRYPTED,
        "enczstd": blob.ENCRYPTED_ZSTD,
    }
    text = VALUES["magics"][kind]["ascii"].encode()
    assert names[kind] == hashlib.sha256(text).digest()[:8]


@pytest.mark.parametrize(("name", "expected", "encrypted"), GOOD)
def test_decode(name, expected, encrypted):
    assert blob.decode(vector(f"blobs/{name}.blob"), key_for(encrypted), CHUNK) == expected


@pytest.mark.parametrize(("name", "expected", "encrypted"), GOOD)
def test_decode_into(name, expected, encrypted):
    buffer = bytearray(b"x" * (len(expected) + 2))
    target = memoryview(buffer)[1:-1]
    blob.decode_into(vector(f"blobs/{name}.blob"), target, key_for(encrypted))
    assert bytes(buffer) == b"x" + expected + b"x"


@pytest.mark.parametrize(("name", "expected", "encrypted"), GOOD)
@pytest.mark.parametrize("difference", [-1, 1, 70000])
def test_decode_into_a_buffer_of_another_size(name, expected, encrypted, difference):
    buffer = memoryview(bytearray(abs(len(expected) + difference)))
    with pytest.raises(ImageFormatError):
        blob.decode_into(vector(f"blobs/{name}.blob"), buffer, key_for(encrypted))


@pytest.mark.parametrize(("name", "expected", "encrypted"), GOOD)
def test_limit(name, expected, encrypted):
    data, key = vector(f"blobs/{name}.blob"), key_for(encrypted)
    assert blob.decode(data, key, len(expected)) == expected
    if expected:
        with pytest.raises(ImageFormatError):
            blob.decode(data, key, len(expected) - 1)


@pytest.mark.parametrize(("name", "encrypted", "offset", "reason"), BAD)
def test_damaged(name, encrypted, offset, reason):
    data, key = vector(f"blobs/{name}.blob"), key_for(encrypted)
    with pytest.raises(ImageFormatError) as caught:
        blob.decode(data, key, CHUNK, "/chunk")
    assert caught.value.offset == offset
    assert caught.value.path == "/chunk"
    assert reason in caught.value.reason


@pytest.mark.parametrize(("name", "encrypted", "offset", "reason"), BAD)
@pytest.mark.parametrize("size", [20, 65536, CHUNK])
def test_damaged_into(name, encrypted, offset, reason, size):
    with pytest.raises(ImageFormatError):
        blob.decode_into(
            vector(f"blobs/{name}.blob"), memoryview(bytearray(size)), key_for(encrypted)
        )


@pytest.mark.parametrize(("name", "_", "encrypted"), GOOD)
def test_the_mode_must_fit(name, _, encrypted):
    """An attacker who replaces an encrypted chunk by a plain one gets no further."""
    with pytest.raises(ImageFormatError) as caught:
        blob.decode(vector(f"blobs/{name}.blob"), key_for(not encrypted))
    assert "encrypted" in caught.value.reason


def test_another_key():
    with pytest.raises(ImageFormatError):
        blob.decode(vector("blobs/p1-encrypted.blob"), CryptKey(bytes([1]) * 32))


def test_the_checksum_is_checked_before_the_mode():
    data = bytearray(vector("blobs/p1-encrypted.blob"))
    data[-1] ^= 1
    with pytest.raises(ImageFormatError) as caught:
        blob.decode(data)
    assert caught.value.offset == 8


@pytest.mark.parametrize("options", [["-1"], ["-19"], ["--ultra", "-22"], ["-1", "--no-check"]])
@pytest.mark.parametrize("size", [1, 1000, 131072, 131073, CHUNK])
def test_frames_of_the_zstd_command(options, size):
    data = (P2 * (size // len(P2) + 1))[:size]
    found = wrapped(zstd(data, *options, f"--stream-size={size}"))
    assert blob.decode(found, None, size) == data
    buffer = bytearray(size)
    blob.decode_into(found, memoryview(buffer))
    assert buffer == data


@pytest.mark.parametrize(
    "frames",
    [
        pytest.param(lambda f: f + f, id="two frames"),
        pytest.param(lambda f: f + b"\x50\x2a\x4d\x18\0\0\0\0", id="a skippable frame behind"),
        pytest.param(lambda f: b"\x50\x2a\x4d\x18\0\0\0\0" + f, id="a skippable frame in front"),
        pytest.param(lambda f: f[:-1], id="a byte less"),
        pytest.param(lambda f: f[:5], id="the header alone"),
        pytest.param(lambda f: b"", id="nothing"),
        pytest.param(lambda f: b"hello", id="no frame"),
    ],
)
def test_exactly_one_frame(frames):
    data = wrapped(frames(zstd(P2, "-1")))
    with pytest.raises(ImageFormatError):
        blob.decode(data, None, CHUNK)
    with pytest.raises(ImageFormatError):
        blob.decode_into(data, memoryview(bytearray(len(P2))))


def test_a_told_size_is_not_believed():
    """A frame that tells a terabyte gets no memory."""
    frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + b"\x01\0\0"
    for told in (frame, frame.replace(struct.pack("<Q", 1 << 40), struct.pack("<Q", 1 << 20))):
        with pytest.raises(ImageFormatError):
            blob.decode(wrapped(told), None, CHUNK)
        with pytest.raises(ImageFormatError):
            blob.decode_into(wrapped(told), memoryview(bytearray(CHUNK)))


def test_a_huge_window_is_refused():
    """A frame may ask its decoder for memory."""
    frame = b"\x28\xb5\x2f\xfd\x00\xb8" + b"\x01\0\0"  # a window of 8 GiB, and an empty block
    with pytest.raises(ImageFormatError):
        blob.decode(wrapped(frame), None, CHUNK)


def test_bombs_take_no_memory():
    """In a process that could not hold what the bomb expands to."""
    limit = 256 << 20
    program = (
        "import sys\n"
        "from loopdev.images.pbs import blob\n"
        "from loopdev.errors import ImageFormatError\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "buffer = memoryview(bytearray(4 << 20))\n"
        "for call in (lambda: blob.decode(data, None, 4 << 20),"
        " lambda: blob.decode_into(data, buffer)):\n"
        "    try:\n        call()\n    except ImageFormatError as exc:\n        print('refused')\n"
    )
    # 1 GiB of zeros in 32 KiB, without a told size.
    bomb = subprocess.run(
        "head -c 1G /dev/zero | zstd -q -c -1", shell=True, capture_output=True, check=True
    ).stdout
    path = f"/proc/self/fd/{0}"
    done = subprocess.run(
        [sys.executable, "-c", program, path],
        input=wrapped(bomb),
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.stdout.decode().split() == ["refused", "refused"], done.stderr.decode()


def by_hand(data: bytes) -> bytes:
    """Return the payload of a blob: with zlib, cryptography and the zstd command."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    magic, crc = struct.unpack_from("<8sI", data)
    body = data[12:]
    if magic in (ENC_MAGIC, ENC_ZSTD_MAGIC):
        iv, tag, body = data[12:28], data[28:44], data[44:]
        assert zlib.crc32(body) == crc
        cipher = Cipher(algorithms.AES(KEY), modes.GCM(iv, tag)).decryptor()
        body = cipher.update(body) + cipher.finalize()
    else:
        assert zlib.crc32(body) == crc
    if magic in (ZSTD_MAGIC, ENC_ZSTD_MAGIC):
        body = subprocess.run(["zstd", "-d", "-q", "-c"], input=body, capture_output=True).stdout
    return body


@pytest.mark.parametrize("data", [b"", b"x", P1, P2, bytes(CHUNK)], ids=len)
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("level", [0, 1, 9])
def test_encode_is_read_by_others(data, encrypted, level):
    found = blob.encode(data, key_for(encrypted), level)
    assert by_hand(found) == data
    small = len(data) > 1000 and level > 0
    assert (len(found) < len(data)) == small
    kind = (ENC_ZSTD_MAGIC if small else ENC_MAGIC) if encrypted else None
    assert found[:8] == (kind or (ZSTD_MAGIC if small else PLAIN_MAGIC))


def test_what_does_not_shrink_is_not_compressed():
    noise = hashlib.shake_128(b"noise").digest(100000)
    assert blob.encode(noise) == plain_blob(noise)


def test_no_iv_is_used_twice():
    key = CryptKey(KEY)
    ivs = {blob.encode(P1, key)[12:28] for _ in range(100)}
    assert len(ivs) == 100


def test_parts_are_the_whole():
    header, body = blob.encode_parts(P2)
    assert header + body == blob.encode(P2)


@given(st.binary(max_size=3000), st.booleans(), st.integers(0, 5))
def test_round_trip(data, encrypted, level):
    key = key_for(encrypted)
    found = blob.encode(data, key, level)
    assert blob.decode(found, key, len(data)) == data
    buffer = bytearray(len(data))
    blob.decode_into(found, memoryview(buffer), key)
    assert buffer == data


@given(st.data())
def test_any_change_is_noticed(data):
    """One bit anywhere in an encrypted blob; in a plain one the checksum's own bits count, too."""
    encrypted = data.draw(st.booleans())
    key = key_for(encrypted)
    found = bytearray(vector(f"blobs/{'p2-zstd-encrypted' if encrypted else 'p1-plain'}.blob"))
    place = data.draw(st.integers(0, len(found) - 1))
    found[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ImageFormatError):
        blob.decode(found, key, CHUNK)


frames = st.sampled_from(
    [vector("blobs/p2-zstd-nosize.blob")[12:], vector("blobs/p2-zstd-size-checksum.blob")[12:]]
)


@given(
    st.one_of(
        st.binary(max_size=100),
        st.binary(max_size=50).map(plain_blob),
        st.binary(max_size=50).map(lambda tail: wrapped(b"\x28\xb5\x2f\xfd" + tail)),
        st.tuples(frames, st.integers(0, 1200), st.binary(max_size=5)).map(
            lambda parts: wrapped(parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 3 :])
        ),
    ),
    st.integers(0, 70000),
)
def test_any_bytes_give_a_payload_or_our_error(data, limit):
    try:
        found = blob.decode(data, None, limit)
    except ImageFormatError:
        pass
    else:
        assert len(found) <= limit
    buffer = bytearray(limit)
    try:
        blob.decode_into(data, memoryview(buffer))
    except ImageFormatError:
        pass
    else:
        assert bytes(buffer) == blob.decode(data, None, limit)


def test_from_any_kind_of_buffer():
    data = vector("blobs/p2-zstd-size.blob")
    for kind in (bytes, bytearray, memoryview):
        assert blob.decode(kind(data)) == P2
