# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Passwords, of keys and for servers: from the environment, or from who sits at the terminal."""

from __future__ import annotations

import os
import sys

from loopdev.errors import EncryptionKeyError
from loopdev.images.pbs.keys import load_key

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs.keys import CryptKey

VARIABLE = "PBS_ENCRYPTION_PASSWORD"
_CREDENTIAL = "encryption-password"
_CREDENTIALS = "CREDENTIALS_DIRECTORY"  # systemd.exec(5)
_SIZE_MAX = 64 << 10


def load_key_file(path: str) -> CryptKey:
    """Return the key in a file.

    Raises:
        EncryptionKeyError: The file is missing or damaged, or the password missing or wrong.
    """
    data = _read_file(path, path)
    return load_key(data, lambda: password(f"Password of {path}: "), path)


def password(prompt: str, variable: str = VARIABLE, credential: str = _CREDENTIAL) -> bytes:
    """Return a password.

    The first of these that is set has it: PBS_ENCRYPTION_PASSWORD itself, with _FD (an open
    descriptor), _FILE (a path), _CMD (a command, split into words as a shell would, but run
    without one). The password is the first line. Then a credential of systemd has it. Without any
    of them it is asked for.

    Args:
        prompt: What to ask.
        variable: The environment variable.
        credential: The name of the credential.

    Raises:
        EncryptionKeyError: None is set, and nobody can be asked; or what is set fails.
    """
    found = from_environment(variable, credential)
    return _ask(prompt, variable) if found is None else found


def new_password() -> bytes:
    """Return a password for a new key: as :func:`password`, but asked for twice.

    Raises:
        EncryptionKeyError: Also: what was typed differs.
    """
    found = from_environment()
    if found is None:
        found = _ask("Password of the new key: ", VARIABLE)
        if found != _ask("Once more: ", VARIABLE):
            raise EncryptionKeyError(None, "these two are not the same")
    return found


def from_environment(variable: str = VARIABLE, credential: str = _CREDENTIAL) -> bytes | None:
    """Return the password that the environment has; None: it has none."""
    ways = (("", _itself), ("_FD", _from_fd), ("_FILE", _from_file), ("_CMD", _from_command))
    for suffix, way in ways:
        value = os.environb.get((variable + suffix).encode())
        if value is not None:
            return way(value, variable + suffix)
    return _from_credential(credential)


def _from_credential(name: str) -> bytes | None:
    """Return what systemd has given us: all of it, but for the end of line that editors add."""
    directory = os.environ.get(_CREDENTIALS)
    path = os.path.join(directory or "/", f"proxmox-backup-client.{name}")
    if directory is None or not os.path.exists(path):
        return None
    return _read_file(path, path).removesuffix(b"\n")


def _first_line(data: bytes) -> bytes:
    return data.partition(b"\n")[0].removesuffix(b"\r")


def _itself(value: bytes, _name: str) -> bytes:
    return _first_line(value)


def _from_fd(value: bytes, name: str) -> bytes:
    if not value.isdigit():
        raise EncryptionKeyError(None, f"{name} is no number")
    try:
        return _first_line(_read_line(int(value)))
    except (OSError, OverflowError) as exc:
        raise EncryptionKeyError(None, f"{name}: {exc}") from exc


def _read_line(fd: int) -> bytes:
    """Return what comes, up to the end of a line: a pipe may stay open behind it."""
    data = b""
    while b"\n" not in data and len(data) < _SIZE_MAX:
        more = os.read(fd, 4096)
        if not more:
            break
        data += more
    return data


def _from_file(value: bytes, _name: str) -> bytes:
    path = os.fsdecode(value)
    return _first_line(_read_file(path, path))


def _read_file(path: str, name: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_SIZE_MAX + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise EncryptionKeyError(name, str(reason)) from exc
    if len(data) > _SIZE_MAX:
        raise EncryptionKeyError(name, f"has more than {_SIZE_MAX} bytes")
    return data


def _from_command(value: bytes, name: str) -> bytes:
    import shlex
    import subprocess

    try:
        words = shlex.split(os.fsdecode(value))
        if not words:
            raise EncryptionKeyError(None, f"{name} is empty")
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)  # noqa: S603
    except (OSError, ValueError) as exc:
        raise EncryptionKeyError(None, f"{name}: {exc}") from exc
    if done.returncode:
        raise EncryptionKeyError(None, f"{name}: ended with {done.returncode}")
    return _first_line(done.stdout)


def _ask(prompt: str, variable: str) -> bytes:
    if sys.stdin is None or not sys.stdin.isatty():
        reason = f"no password: {variable} is not set, and there is no terminal to ask on"
        raise EncryptionKeyError(None, reason)
    import getpass

    try:
        return getpass.getpass(prompt).encode("utf-8", "surrogateescape")
    except EOFError as exc:
        _end_line()
        raise EncryptionKeyError(None, "no password was given") from exc
    except BaseException:
        _end_line()
        raise


def _end_line() -> None:
    """Have what comes next on a line of its own; getpass does that only behind an answer."""
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write("\n")
    except OSError:
        pass  # it asked elsewhere
