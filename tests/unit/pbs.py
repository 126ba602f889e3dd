# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Proxmox Backup formats share: the vectors, and a store of their own.

The vectors were computed by other code. What is built here uses hashlib, zlib and struct alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import zlib
from pathlib import Path

VECTORS = Path(__file__).resolve().parent.parent / "vectors"
VALUES = json.loads((VECTORS / "vectors.json").read_text())
KEY = bytes(range(32))
PLAIN_MAGIC = hashlib.sha256(b"Proxmox Backup uncompressed blob v1.0").digest()[:8]
FIXED_MAGIC = hashlib.sha256(b"Proxmox Backup fixed sized chunk index v1.0").digest()[:8]
SNAPSHOT = "vm/100/2024-01-02T03:04:05Z"
ENCRYPTED = "ns/test/vm/101/2024-01-03T03:04:05Z"
SIGNED = "ns/test/deep/vm/102/2024-01-04T03:04:05Z"
DISK = "drive-scsi0.img"
KEY_FILE = str(VECTORS / "keys/key-none.json")
OTHER_KEY_FILE = str(VECTORS / "keys/key-none-other.json")


def vector(name: str) -> bytes:
    return (VECTORS / name).read_bytes()


def payload(length: int, seed: int) -> bytes:
    """Return bytes by the rule of the vectors."""
    lines = (
        b"sector %08d of vector image, seed %02d\n" % (i, seed) for i in range(length // 41 + 1)
    )
    return b"".join(lines)[:length]


def repeated(length: int, seed: int) -> bytes:
    unit = payload(41984, seed)
    return (unit * (length // len(unit) + 1))[:length]


def disk() -> bytes:
    """Return the image that is in each snapshot of the vectors' datastore."""
    return bytes(4 << 20) + repeated(4 << 20, 21) + repeated(540672, 22)


def copy_store(directory: Path) -> Path:
    """Return a copy of the vectors' datastore that can be damaged."""
    store = directory / "store"
    shutil.copytree(VECTORS / "datastore", store)
    return store


def plain_blob(data: bytes) -> bytes:
    return struct.pack("<8sI", PLAIN_MAGIC, zlib.crc32(data)) + data


def make_snapshot(
    store: Path, name: str, image: bytes, chunk_size: int = 4096, archive: str = DISK
) -> list[str]:
    """Write an image as a snapshot, and return the digests of its chunks."""
    kind, group, when = name.split("/")
    digests = []
    for start in range(0, len(image), chunk_size):
        chunk = image[start : start + chunk_size]
        digest = hashlib.sha256(chunk).hexdigest()
        digests.append(digest)
        path = store / ".chunks" / digest[:4] / digest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain_blob(chunk))
    (store / ".chunks").mkdir(parents=True, exist_ok=True)
    raw = bytes.fromhex("".join(digests))
    csum = hashlib.sha256(raw)
    header = struct.pack(
        "<8s16sq32sQQ4016x", FIXED_MAGIC, b"u" * 16, 1, csum.digest(), len(image), chunk_size
    )
    directory = store / kind / group / when
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{archive}.fidx").write_bytes(header + raw)
    entry = {"filename": f"{archive}.fidx", "size": len(image), "csum": csum.hexdigest()}
    write_manifest(store, name, [entry])
    return digests


def write_manifest(store: Path, name: str, files: list[dict[str, object]], **more: object) -> None:
    import calendar
    import time

    kind, group, when = name.rsplit("/", 3)[-3:]
    seconds = calendar.timegm(time.strptime(when, "%Y-%m-%dT%H:%M:%SZ"))
    raw = {"backup-type": kind, "backup-id": group, "backup-time": seconds, "files": files, **more}
    directory = store / kind / group / when
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "index.json.blob").write_bytes(plain_blob(json.dumps(raw).encode()))
