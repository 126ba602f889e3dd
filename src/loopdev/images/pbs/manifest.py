# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The manifest of a snapshot, ``index.json.blob``: what is in it, and who vouches for it.

Source: pbs-datastore/src/manifest.rs, pbs-tools/src/json.rs.
"""

from __future__ import annotations

from loopdev._json import canonical, parse_object
from loopdev._value import Value
from loopdev.errors import (
    EncryptionKeyError,
    ImageFormatError,
    ImageNotFoundError,
    InvalidValueError,
)
from loopdev.images.pbs import blob, names
from loopdev.images.pbs.keys import format_fingerprint, parse_fingerprint, short_fingerprint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, NoReturn

    from loopdev.images.pbs.keys import CryptKey
    from loopdev.images.pbs.names import Snapshot

ENCRYPT, SIGN_ONLY, NONE = "encrypt", "sign-only", "none"
_MODES = (ENCRYPT, SIGN_ONLY, NONE)
_UNSIGNED = ("unprotected", "signature")
_SIZE_MAX = 16 << 20


class FileEntry(Value):
    """A file of a snapshot.

    *size* is that of the image for an index, else that of the file; *csum* is 32 bytes: the
    checksum of the digests for an index, else that of the file.
    """

    filename: str
    crypt_mode: str
    size: int
    csum: bytes


class Manifest:
    """What is in a snapshot.

    Made by :meth:`parse`.

    Attributes:
        type, id, time: The snapshot, as it knows itself.
        files: In order.
        fingerprint: That of the key it was made with, or None.
        signature: 32 bytes, or None.
        unprotected: What no signature covers: notes, the last verification, ...
    """

    __slots__ = (
        *("_path", "_signed", "files", "fingerprint", "id", "signature", "time", "type"),
        "unprotected",
    )

    def __init__(self, raw: dict[str, Any], path: str | None) -> None:
        self._path = path
        self._signed = {name: raw[name] for name in raw if name not in _UNSIGNED}
        self.type: str = self._field(raw, "backup-type", str)
        self.id: str = self._field(raw, "backup-id", str)
        self.time: int = self._field(raw, "backup-time", int)
        self.files = tuple(map(self._entry, self._field(raw, "files", list)))
        self.unprotected: dict[str, Any] = self._field(
            {"unprotected": {}, **raw}, "unprotected", dict
        )
        self.signature = self._hash(raw, "signature") if raw.get("signature") is not None else None
        told = self.unprotected.get("key-fingerprint")
        self.fingerprint = parse_fingerprint(told)
        if told is not None and self.fingerprint is None:
            self._bad("key-fingerprint is no fingerprint")

    @classmethod
    def parse(cls, data: bytes, path: str | None = None) -> Manifest:
        """Return the manifest in the bytes of an ``index.json.blob``.

        Raises:
            ImageFormatError: It is damaged.
        """
        return cls(parse_object(blob.decode(data, None, _SIZE_MAX, path), path), path)

    @property
    def notes(self) -> str:
        """What somebody wrote about the snapshot; several lines, or ""."""
        text = self.unprotected.get("notes")
        return text if isinstance(text, str) else ""

    @property
    def verification(self) -> str | None:
        """What the server's last verification found: "ok", "failed"; None: there was none."""
        state = self.unprotected.get("verify_state")
        found = state.get("state") if isinstance(state, dict) else None
        return found if isinstance(found, str) else None

    def _bad(self, reason: str) -> NoReturn:
        raise ImageFormatError(self._path, 0, f"the manifest is wrong: {reason}")

    def _field(self, raw: Mapping[str, Any], name: str, kind: type) -> Any:
        value = raw.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            self._bad(f"{name} is missing or of the wrong type")
        return value

    def _hash(self, raw: Mapping[str, Any], name: str) -> bytes:
        digest = parse_fingerprint(raw.get(name))
        if digest is None or ":" in raw[name]:
            self._bad(f"{name} is not 64 hexadecimal digits")
        return digest

    def _entry(self, raw: object) -> FileEntry:
        if not isinstance(raw, dict):
            self._bad("a file is no object")
        mode = raw.get("crypt-mode", NONE)
        size = self._field(raw, "size", int)
        if mode not in _MODES or size < 0:
            self._bad("a file has an unknown crypt-mode, or a negative size")
        filename = self._field(raw, "filename", str)
        csum = self._hash(raw, "csum")
        return FileEntry(filename=filename, crypt_mode=mode, size=size, csum=csum)

    def check_snapshot(self, snapshot: Snapshot) -> None:
        """Check that this is the manifest of *snapshot*.

        Raises:
            ImageFormatError: It is that of another one.
        """
        if (self.type, self.id, self.time) != (snapshot.type, snapshot.id, snapshot.time):
            self._bad("it is that of another snapshot")

    def check_key(self, key: CryptKey | None) -> None:
        """Check the signature, and that the snapshot was made with *key*, or with none.

        Raises:
            EncryptionKeyError: It was made with another key, or there is none.
            ImageFormatError: The signature is wrong.
        """
        made_with = self.fingerprint and short_fingerprint(self.fingerprint)
        if key is None:
            if made_with is not None:
                reason = f"missing key: the snapshot was made with {made_with}; --keyfile names it"
                raise EncryptionKeyError(None, reason)
            return
        if self.fingerprint not in (None, key.fingerprint):
            given = short_fingerprint(key.fingerprint)
            reason = f"wrong key: the snapshot was made with {made_with}, this one is {given}"
            raise EncryptionKeyError(None, reason)
        if self.signature is not None and self.signature != sign(self._signed, key, self._path):
            raise ImageFormatError(self._path, 0, "the signature of the manifest is wrong")


def find_image(manifest: Manifest, name: str, snapshot: Snapshot) -> FileEntry:
    """Return the index that a name, with its ".fidx" or without, means.

    Raises:
        ImageNotFoundError: There is none.
        InvalidValueError: It is a file of another kind.
    """
    files = {entry.filename: entry for entry in manifest.files}
    for candidate in (f"{name}.fidx", name):
        if candidate in files and candidate.endswith(names.INDEX_SUFFIX):
            return files[candidate]
    if name.endswith(".didx") or f"{name}.didx" in files:
        use = "is an archive of files, not a disk; use proxmox-backup-client mount or restore"
        raise InvalidValueError("source", name, use)
    if name.endswith(".blob") or f"{name}.blob" in files:
        use = "is a small file, not a disk; use proxmox-backup-client restore"
        raise InvalidValueError("source", name, use)
    images = [file.removesuffix(names.INDEX_SUFFIX) for file in files if file.endswith(".fidx")]
    there = f" (there is {', '.join(images)})" if images else " (there is no image in it)"
    raise ImageNotFoundError("archive", f"{snapshot.full_name}/{name}{there}")


def key_of(entry: FileEntry, manifest: Manifest, key: CryptKey | None) -> CryptKey | None:
    """Return what the chunks of a file are encrypted with.

    Raises:
        EncryptionKeyError: The file is encrypted, and there is no key.
        ImageFormatError: The file should be signed, and is not: somebody took the signature away.
    """
    if entry.crypt_mode == NONE:
        return None
    if key is not None and manifest.signature is None:
        reason = f"{entry.filename} is {entry.crypt_mode}, but the manifest has no signature"
        raise ImageFormatError(None, 0, reason)
    if entry.crypt_mode != ENCRYPT:
        return None
    if key is None:
        raise EncryptionKeyError(
            None, f"missing key: {entry.filename} is encrypted; --keyfile names it"
        )
    return key


def sign(raw: Mapping[str, Any], key: CryptKey, path: str | None = None) -> bytes:
    """Return the signature of a manifest: of all but its signature and what is unprotected.

    Raises:
        ImageFormatError: It has a null or a fraction in it.
    """
    try:
        text = canonical({name: raw[name] for name in raw if name not in _UNSIGNED})
    except (ValueError, RecursionError) as exc:
        raise ImageFormatError(path, 0, "the manifest cannot be signed") from exc
    return key.sign(text.encode())


def build(
    snapshot: Snapshot,
    files: Sequence[FileEntry],
    key: CryptKey | None = None,
    unprotected: Mapping[str, object] | None = None,
) -> bytes:
    """Return the bytes of an ``index.json.blob``.

    Args:
        snapshot: What it is of.
        files: What is in it.
        key: Sign with this; needed if a file is encrypted or signed.
        unprotected: What the signature does not cover; the key's fingerprint is added.
    """
    import json

    if key is None and any(entry.crypt_mode != NONE for entry in files):
        raise InvalidValueError("key", key, "is needed to sign the manifest")
    raw: dict[str, Any] = {
        "backup-type": snapshot.type,
        "backup-id": snapshot.id,
        "backup-time": snapshot.time,
        "files": [_raw_entry(entry) for entry in files],
        "unprotected": dict(unprotected or {}),
        "signature": None,
    }
    if key is not None:
        raw["unprotected"]["key-fingerprint"] = format_fingerprint(key.fingerprint)
        raw["signature"] = sign(raw, key).hex()
    return blob.encode(json.dumps(raw, indent=2, ensure_ascii=False).encode())


def _raw_entry(entry: FileEntry) -> dict[str, object]:
    return {
        "filename": entry.filename,
        "crypt-mode": entry.crypt_mode,
        "size": entry.size,
        "csum": entry.csum.hex(),
    }
