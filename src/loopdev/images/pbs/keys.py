# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Encryption keys, and the files that hold them.

Source: pbs-key-config/src/lib.rs, pbs-tools/src/crypt_config.rs.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64

from loopdev._json import parse_object
from loopdev.errors import EncryptionKeyError, ImageFormatError, MissingExtraError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from loopdev.images.pbs.blob import Readable

KEY_SIZE = 32
_IV_SIZE = _TAG_SIZE = 16
_PASSWORD_MIN = 5
_HINT_MAX = 64
_SALT_SIZE = 32
_SCRYPT = {"n": 65536, "r": 8, "p": 1}
_SCRYPT_MEMORY = 1025 << 20
_PBKDF2_ITERATIONS_MAX = 10_000_000  # some seconds; a file must not be able to ask for hours
# SHA-256 of "Proxmox Backup Encryption Key Fingerprint".
_FINGERPRINT_INPUT = bytes.fromhex(
    "6ed0ef77471fff4d55c7a8fe4a9db62161407f134c725ddf30992d25ec45ed26"
)


class CryptKey:
    """A key of 32 bytes, and what is derived of it.

    Attributes:
        fingerprint: 32 bytes that name it and tell nothing of it.
    """

    __slots__ = ("_cipher", "_id_key", "_key", "fingerprint")

    def __init__(self, key: bytes) -> None:
        from _hashlib import openssl_sha256, pbkdf2_hmac

        if len(key) != KEY_SIZE:
            raise EncryptionKeyError(None, f"a key has {KEY_SIZE} bytes, not {len(key)}")
        self._key = key
        self._cipher: Any = None
        self._id_key: bytes = pbkdf2_hmac("sha256", key, b"_id_key", 10, KEY_SIZE)
        self.fingerprint: bytes = openssl_sha256(_FINGERPRINT_INPUT + self._id_key).digest()

    def __repr__(self) -> str:
        return f"CryptKey({short_fingerprint(self.fingerprint)})"

    def digest(self, data: Readable) -> bytes:
        """Return the digest of a chunk: 32 bytes, other than those with another key."""
        from _hashlib import openssl_sha256

        state = openssl_sha256(data)
        state.update(self._id_key)
        return state.digest()

    def sign(self, data: bytes) -> bytes:
        """Return the HMAC-SHA256 of *data*."""
        from _hashlib import hmac_digest

        return hmac_digest(self._id_key, data, "sha256")

    def encrypt(self, data: Readable) -> tuple[bytes, bytes, memoryview]:
        """Return a random IV, the tag, and *data* encrypted."""
        from os import urandom

        iv = urandom(_IV_SIZE)
        sealed = memoryview(self._aes().encrypt(iv, data, None))
        return iv, bytes(sealed[-_TAG_SIZE:]), sealed[:-_TAG_SIZE]

    def decrypt(self, iv: bytes, tag: bytes, data: Readable) -> bytes | None:
        """Return *data* decrypted; None: the tag is not that of this key, IV and data."""
        try:
            plain: bytes = self._aes().decrypt(iv, b"".join((data, tag)), None)
        except Exception as exc:
            from cryptography.exceptions import InvalidTag

            if isinstance(exc, InvalidTag):
                return None
            raise
        return plain

    def prepare(self) -> None:
        """Load the cipher now: what is forked then has it, and what lacks it is known early.

        Raises:
            MissingExtraError: There is none.
        """
        self._aes()

    def _aes(self) -> Any:
        if self._cipher is None:
            self._cipher = _aes_gcm()(self._key)
        return self._cipher


def _aes_gcm() -> Any:
    """Return cryptography's AESGCM.

    Its public module imports typing and all other ciphers, which costs more than starting the
    interpreter; it is the same class.
    """
    try:
        from cryptography.hazmat.bindings._rust import openssl
    except ImportError as exc:
        raise MissingExtraError("pbs") from exc
    aead: Any = getattr(openssl, "aead", None)
    if aead is None:
        from cryptography.hazmat.primitives.ciphers import aead
    return aead.AESGCM


def chunk_digest(data: Readable, key: CryptKey | None = None) -> bytes:
    """Return what a chunk is known by: 32 bytes, those of the key if it is encrypted with one."""
    if key is not None:
        return key.digest(data)
    from _hashlib import openssl_sha256

    return openssl_sha256(data).digest()


def load_key(
    data: bytes, password: Callable[[], bytes] | None = None, path: str | None = None
) -> CryptKey:
    """Return the key in a key file.

    Args:
        data: The file.
        password: Asked for the password if the file has one.
        path: Its name, for messages.

    Raises:
        EncryptionKeyError: The file is damaged, or the password missing or wrong.
    """
    try:
        config = parse_object(data)
    except ImageFormatError as exc:
        raise EncryptionKeyError(path, f"is no key file: {exc.reason}") from exc
    try:
        secret = _from_base64(config.get("data"), "data")
        if config.get("kdf") is not None:
            secret = _unseal(secret, config, password)
        key = CryptKey(secret)
    except EncryptionKeyError as exc:
        raise EncryptionKeyError(path, exc.reason) from exc.__cause__
    stored = config.get("fingerprint")
    if stored is not None and parse_fingerprint(stored) != key.fingerprint:
        raise EncryptionKeyError(path, "is not the key whose fingerprint the file has")
    return key


def _from_base64(text: object, what: str) -> bytes:
    try:
        return a2b_base64(text, strict_mode=True)  # type: ignore[arg-type]
    except (ValueError, TypeError) as exc:  # binascii.Error is a ValueError
        raise EncryptionKeyError(None, f"{what} is not base64") from exc


def _unseal(sealed: bytes, config: dict[str, Any], password: Callable[[], bytes] | None) -> bytes:
    size = _IV_SIZE + _TAG_SIZE + KEY_SIZE
    if len(sealed) != size:
        raise EncryptionKeyError(None, f"data must have {size} bytes, it has {len(sealed)}")
    derive = _derivation(config["kdf"])
    if password is None:
        raise EncryptionKeyError(None, "has a password, and none was given")
    secret = _checked_password(password())
    iv, tag = sealed[:_IV_SIZE], sealed[_IV_SIZE : _IV_SIZE + _TAG_SIZE]
    key = CryptKey(derive(secret)).decrypt(iv, tag, sealed[_IV_SIZE + _TAG_SIZE :])
    if key is None:
        hint = config.get("hint")
        told = f" (password hint: {hint})" if isinstance(hint, str) and hint else ""
        raise EncryptionKeyError(None, f"wrong password?{told}")
    return key


def _checked_password(password: bytes) -> bytes:
    if len(password) < _PASSWORD_MIN:
        raise EncryptionKeyError(None, f"a password has at least {_PASSWORD_MIN} bytes")
    return password


def _derivation(kdf: object) -> Callable[[bytes], bytes]:
    """Return what makes a key of a password."""
    from _hashlib import pbkdf2_hmac, scrypt

    match kdf:
        case {"Scrypt": {"n": int(n), "r": int(r), "p": int(p), "salt": salt}}:
            if min(n - 1, r, p) < 1 or n & (n - 1) or 128 * n * r * p > _SCRYPT_MEMORY:
                raise EncryptionKeyError(None, f"scrypt cannot have n={n}, r={r}, p={p}")
            salt = _from_base64(salt, "salt")
            # The library counts a little more than the formula.
            memory = _SCRYPT_MEMORY + (1 << 20)
            return lambda password: scrypt(
                password, salt=salt, n=n, r=r, p=p, maxmem=memory, dklen=KEY_SIZE
            )
        case {"PBKDF2": {"iter": int(count), "salt": salt}}:
            if not 1 <= count <= _PBKDF2_ITERATIONS_MAX:
                raise EncryptionKeyError(None, f"PBKDF2 cannot have {count} iterations")
            salt = _from_base64(salt, "salt")
            return lambda password: pbkdf2_hmac("sha256", password, salt, count, KEY_SIZE)
    raise EncryptionKeyError(None, "its key derivation is unknown")


def create_key_file(
    kdf: str, password: bytes | None = None, hint: str | None = None, now: int | None = None
) -> bytes:
    """Return a key file with a new random key: one line of JSON.

    Args:
        kdf: "none": the key is not encrypted; or "scrypt": with a password.
        password: At least 5 bytes, for scrypt.
        hint: What reminds of the password, 1 to 64 characters.
        now: Unix seconds; None: ask the clock.

    Raises:
        EncryptionKeyError: The password is too short.
        InvalidValueError: The hint is too long, or there is no password to hint at.
    """
    import json
    import time
    from os import urandom

    from loopdev.errors import InvalidValueError
    from loopdev.images.pbs.names import format_time

    if kdf not in ("none", "scrypt") or (kdf == "scrypt") != (password is not None):
        raise InvalidValueError("kdf", kdf, "must be none without a password, or scrypt with one")
    if hint is not None and (password is None or not 1 <= len(hint) <= _HINT_MAX):
        reason = f"must have 1 to {_HINT_MAX} characters, and there must be a password"
        raise InvalidValueError("hint", hint, reason)
    secret = urandom(KEY_SIZE)
    fingerprint = CryptKey(secret).fingerprint
    derivation = None
    if password is not None:
        derivation = {"Scrypt": {**_SCRYPT, "salt": _to_base64(urandom(_SALT_SIZE))}}
        derived = _derivation(derivation)(_checked_password(password))
        iv, tag, sealed = CryptKey(derived).encrypt(secret)
        secret = iv + tag + sealed
    moment = format_time(int(time.time()) if now is None else now)
    config = {
        "kdf": derivation,
        "created": moment,
        "modified": moment,
        "data": _to_base64(secret),
        "fingerprint": format_fingerprint(fingerprint),
        **({} if hint is None else {"hint": hint}),
    }
    return json.dumps(config, separators=(",", ":"), ensure_ascii=False).encode()


def _to_base64(data: bytes) -> str:
    return b2a_base64(data, newline=False).decode()


def format_fingerprint(fingerprint: bytes) -> str:
    """Return a fingerprint as people and files have it: pairs of digits with colons."""
    return fingerprint.hex(":")


def short_fingerprint(fingerprint: bytes) -> str:
    """Return the first 8 bytes of a fingerprint, as messages have it."""
    return format_fingerprint(fingerprint[:8])


def parse_fingerprint(text: object) -> bytes | None:
    """Return the 32 bytes of a fingerprint, with colons or without; None: it is none."""
    digits = text.replace(":", "") if isinstance(text, str) else ""
    if len(digits) != 2 * KEY_SIZE or not set(digits) <= set("0123456789abcdefABCDEF"):
        return None
    return bytes.fromhex(digits)
