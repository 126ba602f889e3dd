# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Key files on disk: making one, and what can be told of one without its password."""

from __future__ import annotations

import os

from loopdev._json import parse_object
from loopdev._value import Value
from loopdev.errors import EncryptionKeyError, ImageFormatError, InvalidValueError, kernel_error
from loopdev.images.pbs.keys import create_key_file, format_fingerprint, load_key, parse_fingerprint
from loopdev.kernel.fds import OwnedFd

_SIZE_MAX = 64 << 10


class KeyInfo(Value):
    """What a key file says of its key.

    Attributes:
        path: The file.
        fingerprint: 32 pairs of digits with colons; None: the file does not have it, and only its
            password would tell.
        kdf: What makes a key of the password: "scrypt", "pbkdf2", or "none".
        hint: What reminds of the password, or None.
        created: When, as the file has it, or None.
    """

    path: str
    fingerprint: str | None
    kdf: str
    hint: str | None
    created: str | None


def create_key(path: str, password: bytes | None = None, hint: str | None = None) -> KeyInfo:
    """Make a new key, and write it to a new file that only its owner can read (0600).

    Args:
        path: The file; it must not be there.
        password: At least 5 bytes; None: who has the file has the key.
        hint: What reminds of the password, 1 to 64 characters.

    Raises:
        InvalidValueError: The file is there, or the hint is too long or without a password.
        EncryptionKeyError: The password is too short.
        KernelError: The file cannot be written.
    """
    check_new(path)
    data = create_key_file("none" if password is None else "scrypt", password, hint)
    try:
        _write_new(path, data)
    except FileExistsError:
        check_new(path)
        raise
    except OSError as exc:
        raise kernel_error(exc, path, "write") from exc
    return show_key(path)


def check_new(path: str) -> None:
    """Check that a file is not there.

    Raises:
        InvalidValueError: It is.
    """
    if os.path.lexists(path):
        reason = "exists: a key that is overwritten is lost, with all that it encrypts"
        raise InvalidValueError("file", path, reason)


def _write_new(path: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with OwnedFd(os.open(path, flags, 0o600), path) as file:
        try:
            os.write(file.fileno(), data)
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(path)
            raise
    with OwnedFd.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.fsync(directory.fileno())


def show_key(path: str) -> KeyInfo:
    """Return what a key file tells without its password.

    Raises:
        EncryptionKeyError: It cannot be read, or is no key file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_SIZE_MAX)
        config = parse_object(data)
    except OSError as exc:
        raise EncryptionKeyError(path, str(exc.strerror)) from exc
    except ImageFormatError as exc:
        raise EncryptionKeyError(path, f"is no key file: {exc.reason}") from exc
    if "data" not in config:
        raise EncryptionKeyError(path, "is no key file: it has no key")
    fingerprint = parse_fingerprint(config.get("fingerprint"))
    if config.get("kdf") is None:
        fingerprint = load_key(data, path=path).fingerprint
    return KeyInfo(
        path=path,
        fingerprint=None if fingerprint is None else format_fingerprint(fingerprint),
        kdf=_kdf(config.get("kdf")),
        hint=_text(config.get("hint")),
        created=_text(config.get("created")),
    )


def _kdf(kdf: object) -> str:
    return "none" if kdf is None else "/".join(kdf).lower() if isinstance(kdf, dict) else "unknown"


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
