# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A reader of datastores that shares nothing with ours: hashlib, struct, zstd(1) and OpenSSL.

It checks all that the specification says of what it reads, and takes nothing that is unusual.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
import subprocess
import zlib
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

CHUNK = 4 << 20


def magic(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


PLAIN = magic("Proxmox Backup uncompressed blob v1.0")
ZSTD = magic("Proxmox Backup zstd compressed blob v1.0")
ENCRYPTED = magic("Proxmox Backup encrypted blob v1.0")
ENCRYPTED_ZSTD = magic("Proxmox Backup zstd compressed encrypted blob v1.0")
FIXED = magic("Proxmox Backup fixed sized chunk index v1.0")


def id_key(key: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", key, b"_id_key", 10, 32)


def fingerprint(key: bytes) -> str:
    seed = hashlib.sha256(b"Proxmox Backup Encryption Key Fingerprint").digest()
    return hashlib.sha256(seed + id_key(key)).digest().hex(":")


def decode(data: bytes, key: bytes | None) -> bytes:
    kind, crc = struct.unpack_from("<8sI", data)
    encrypted = kind in (ENCRYPTED, ENCRYPTED_ZSTD)
    assert kind in (PLAIN, ZSTD, ENCRYPTED, ENCRYPTED_ZSTD)
    assert encrypted == (key is not None)
    body = data[44 if encrypted else 12 :]
    assert zlib.crc32(body) == crc
    if key is not None:
        mode = modes.GCM(data[12:28], data[28:44])
        decryptor = Cipher(algorithms.AES(key), mode).decryptor()
        body = decryptor.update(body) + decryptor.finalize()
    if kind in (PLAIN, ENCRYPTED):
        return body
    command = ["zstd", "-q", "-d", "-c"]
    plain = subprocess.run(command, input=body, capture_output=True, check=True).stdout
    assert len(body) < len(plain), "kept a compression that makes nothing smaller"
    return plain


def read_manifest(store: Path, name: str, key: bytes | None) -> dict:
    """Return a manifest, after its signature was checked."""
    data = json.loads(decode((store / name / "index.json.blob").read_bytes(), None))
    told = data["unprotected"].get("key-fingerprint")
    assert told == (None if key is None else fingerprint(key))
    if key is None:
        assert data.get("signature") is None
    else:
        covered = {k: v for k, v in data.items() if k not in ("unprotected", "signature")}
        text = json.dumps(covered, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        signature = hmac.new(id_key(key), text.encode(), "sha256").hexdigest()
        assert data["signature"] == signature
    return data


def read_index(path: Path) -> tuple[int, list[bytes], bytes]:
    """Return size, digests and checksum of a fixed index, every field of which is checked."""
    data = path.read_bytes()
    kind, uuid, ctime, csum, size, chunk_size = struct.unpack_from("<8s16sq32sQQ", data)
    assert (kind, chunk_size) == (FIXED, CHUNK)
    assert len(set(uuid)) > 1
    # The clock of a filesystem is behind the other by up to a tick.
    assert -0.1 < path.stat().st_mtime - ctime < 100
    assert data[80:4096] == bytes(4016)
    assert len(data) == 4096 + 32 * -(-size // CHUNK)
    assert hashlib.sha256(data[4096:]).digest() == csum
    return size, [data[at : at + 32] for at in range(4096, len(data), 32)], csum


def chunk_path(store: Path, digest: bytes) -> Path:
    return store / ".chunks" / digest.hex()[:4] / digest.hex()


def read_image(store: Path, name: str, archive: str, key: bytes | None = None) -> bytes:
    """Return an image, with all of the chain of trust checked."""
    manifest = read_manifest(store, name, key)
    [entry] = [file for file in manifest["files"] if file["filename"] == f"{archive}.fidx"]
    size, digests, csum = read_index(store / name / f"{archive}.fidx")
    assert (entry["size"], entry["csum"]) == (size, csum.hex())
    mode = entry["crypt-mode"]
    assert (key is None) == (mode == "none")
    chunk_key = key if mode == "encrypt" else None
    known: dict[bytes, bytes] = {}
    for digest in digests:
        if digest not in known:
            chunk = decode(chunk_path(store, digest).read_bytes(), chunk_key)
            salt = b"" if chunk_key is None else id_key(chunk_key)
            assert hashlib.sha256(chunk + salt).digest() == digest
            known[digest] = chunk
    image = b"".join(known[digest] for digest in digests)
    assert len(image) == size
    assert all(len(known[digest]) == CHUNK for digest in digests[:-1])
    return image


def snapshots(store: Path) -> list[str]:
    """Return all complete snapshots: what a server, which passes over hidden names, would list."""
    found = [path.parent.relative_to(store) for path in store.glob("**/index.json.blob")]
    return sorted(str(path) for path in found if not str(path).startswith("."))
