# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The locks that keep a snapshot from being removed while it is read.

Servers up to 3.3.3 lock the snapshot's directory itself, later ones a file below /run. Both are
taken, shared, and held as long as a descriptor of them is open in any process.

Source: pbs-datastore/src/backup_info.rs.
"""

from __future__ import annotations

import errno
import fcntl
import os

from loopdev.errors import DeviceBusyError
from loopdev.images.pbs.names import escape_path
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs.names import Group, Snapshot

LOCKS = "/run/proxmox-backup/locks"
CONFIG = "/etc/proxmox-backup/datastore.cfg"
_OLD = "old-locking"
_NAME_MAX = 255
_HASHED_PART = 80
_TRIES = 5


def lock_snapshot(
    root: str, snapshot: Snapshot, locks: str = LOCKS, config: str = CONFIG
) -> tuple[OwnedFd, ...]:
    """Take the shared locks of a snapshot, as far as there are any and we may.

    Args:
        root: The datastore.
        snapshot: It.
        locks: Where the server keeps its lock files.
        config: The server's list of datastores.

    Raises:
        DeviceBusyError: It is being written or removed (EAGAIN).
        OSError: There is no such snapshot.
    """
    return _lock(root, snapshot, fcntl.LOCK_SH, locks, config)


def lock_group(
    root: str, group: Group, locks: str = LOCKS, config: str = CONFIG
) -> tuple[OwnedFd, ...]:
    """Take the exclusive locks of a group, which who makes or removes a snapshot in it holds.

    The arguments and errors are those of :func:`lock_snapshot`.
    """
    return _lock(root, group, fcntl.LOCK_EX, locks, config)


def _lock(
    root: str, what: Snapshot | Group, operation: int, locks: str, config: str
) -> tuple[OwnedFd, ...]:
    path = os.path.join(root, what.path)
    taken = [OwnedFd.open(path, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        _flock(taken[0], path, operation)
        store = _store_name(root, config) if _is_used(locks) else None
        if store is not None:
            directory = os.path.join(locks, store, what.namespace.replace("/", ":"))
            file = _lock_file(os.path.join(directory, lock_name(what)), locks, path, operation)
            taken += [file] if file is not None else []
    except BaseException:
        for fd in taken:
            fd.close()
        raise
    return tuple(taken)


def lock_name(what: Snapshot | Group) -> str:
    """Return the name of the lock file of a snapshot or group."""
    name = escape_path(str(what))
    if len(name) < _NAME_MAX:
        return name
    from _hashlib import openssl_sha256

    digest = openssl_sha256(str(what).encode()).hexdigest()
    return f"hashed/{name[:_HASHED_PART]}...{name[-_HASHED_PART:]}-{digest}"


def _is_used(locks: str) -> bool:
    marker = os.path.join(os.path.dirname(locks), _OLD)
    return os.path.isdir(locks) and not os.path.exists(marker)


def _store_name(root: str, config: str) -> str | None:
    """Return what the server calls the datastore of a directory; None: it is not the server's."""
    try:
        with open(config, encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError):
        return None
    name, real = None, os.path.realpath(root)
    for line in lines:
        word, _, value = line.strip().partition(" ")
        if word == "datastore:":
            name = value.strip()
        elif word == "path" and os.path.realpath(value.strip()) == real:
            return name
    return None


def _flock(file: OwnedFd, what: str, operation: int) -> bool:
    """Take a lock; return whether the filesystem has locks."""
    try:
        fcntl.flock(file.fileno(), operation | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        reason = "is in use: it is being written or removed"
        raise DeviceBusyError(errno.EAGAIN, what, "flock", reason) from exc
    except OSError:
        return False  # some network filesystems
    return True


def _lock_file(path: str, locks: str, what: str, operation: int) -> OwnedFd | None:
    """Take the lock of a lock file, made if need be; None: we may not."""
    for _ in range(_TRIES):
        try:
            file = _open_lock(path, locks)
        except OSError:
            return None
        try:
            _flock(file, what, operation)
            # The server removes lock files after use; one that is gone locks nothing.
            if _is_at(file, path):
                return OwnedFd(file.take(), path)
        finally:
            file.close()
    return None


def _is_at(file: OwnedFd, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _open_lock(path: str, locks: str) -> OwnedFd:
    """Open a lock file.

    A new one gets its owner and mode before it gets its name: one that the server cannot open would
    be a snapshot that the server cannot lock.
    """
    try:
        return OwnedFd.open(path, os.O_RDWR)
    except FileNotFoundError:
        pass
    owner = os.stat(locks)
    directory = os.path.dirname(path)
    _make_directories(directory, locks, owner)
    with OwnedFd.open(directory, os.O_TMPFILE | os.O_RDWR) as file:
        os.fchmod(file.fileno(), 0o660)
        os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        name = f"/proc/self/fd/{file.fileno()}"
        try:
            # With a directory, needed or not, Python calls linkat(), which can follow the link.
            os.link(name, path, src_dir_fd=file.fileno(), follow_symlinks=True)
        except FileExistsError:
            return OwnedFd.open(path, os.O_RDWR)
        return OwnedFd(file.take(), path)


def _make_directories(directory: str, locks: str, owner: os.stat_result) -> None:
    if os.path.isdir(directory) or directory == locks:
        return
    _make_directories(os.path.dirname(directory), locks, owner)
    try:
        os.mkdir(directory)
    except FileExistsError:
        return
    os.chmod(directory, owner.st_mode & 0o777)
    os.chown(directory, owner.st_uid, owner.st_gid)
