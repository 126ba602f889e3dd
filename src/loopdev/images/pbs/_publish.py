# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The moment in which a snapshot comes to be.

Its directory is made in the work directory, with everything in it on the disk, and renamed: nobody
ever sees half of a snapshot, not even after a power failure.
"""

from __future__ import annotations

import os
import time as clock
from contextlib import contextmanager

from loopdev._backoff import backoff
from loopdev.errors import DeviceBusyError, InvalidValueError
from loopdev.images.pbs._locks import lock_group
from loopdev.images.pbs._store import refused
from loopdev.images.pbs.names import MANIFEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loopdev.images.pbs._store import WritableStore
    from loopdev.images.pbs.names import Group, Snapshot
    from loopdev.kernel.fds import OwnedFd

_OWNER = "root@pam"  # of a new group; a server's administrator, whom every server has
_LOCK_TIMEOUT = 10.0  # seconds


def check_free(store: WritableStore, snapshot: Snapshot) -> None:
    """Check that there is no such snapshot.

    Raises:
        InvalidValueError: There is.
    """
    if os.path.lexists(os.path.join(store.root, snapshot.path)):
        raise InvalidValueError("time", snapshot.full_name, "this snapshot exists already")


def publish(
    store: WritableStore,
    staged: str,
    wanted: Snapshot,
    later: bool,
    make_manifest: Callable[[Snapshot], bytes],
) -> Snapshot:
    """Make a snapshot of a directory that has all its files but the manifest.

    Args:
        store: Where; all that was written there before is on the disk afterwards.
        staged: The directory, on the store's filesystem.
        wanted: The snapshot.
        later: Take the next second that is free instead.
        make_manifest: Makes the manifest of what it came to be.

    Returns:
        The snapshot as it came to be.

    Raises:
        InvalidValueError: It exists already.
        DeviceBusyError: Its group is locked.
        KernelError: The store cannot be written.
    """
    store.sync()
    parents = _make_group(store, wanted.group)
    with _locked(store, wanted.group):
        _make_owner(store, staged, parents[-1])
        snapshot = _first_free(store, wanted) if later else wanted
        check_free(store, snapshot)
        store.write_file(os.path.join(staged, MANIFEST), make_manifest(snapshot))
        _fsync(os.path.join(staged, MANIFEST))
        _fsync(staged)
        path = os.path.join(store.root, snapshot.path)
        with refused(path, "rename"):
            os.rename(staged, path)
        for parent in reversed(parents):
            _fsync(parent)
    return snapshot


def _make_group(store: WritableStore, group: Group) -> list[str]:
    """Make the directory of a group and those above it; return all from the root on."""
    paths = [store.root]
    for name in group.path.split("/"):
        paths.append(os.path.join(paths[-1], name))
        store.make_directory(paths[-1])
    return paths


@contextmanager
def _locked(store: WritableStore, group: Group) -> Iterator[None]:
    """Hold the lock of a group, which a server that backs up to it holds for as long as that takes.

    Ours is held for a moment only.
    """
    locks = _take(store, group)
    try:
        yield
    finally:
        for lock in locks:
            lock.close()


def _take(store: WritableStore, group: Group) -> tuple[OwnedFd, ...]:
    deadline = clock.monotonic() + _LOCK_TIMEOUT
    with refused(os.path.join(store.root, group.path), "open"):
        for _ in backoff(deadline):
            try:
                return lock_group(store.root, group)
            except DeviceBusyError as exc:
                busy = exc
        raise busy


def _make_owner(store: WritableStore, staged: str, group: str) -> None:
    owner = os.path.join(group, "owner")
    if not os.path.exists(owner):
        temporary = f"{staged}.owner"
        store.write_file(temporary, f"{_OWNER}\n".encode())
        _fsync(temporary)
        with refused(owner, "rename"):
            os.rename(temporary, owner)


def _first_free(store: WritableStore, snapshot: Snapshot) -> Snapshot:
    while os.path.lexists(os.path.join(store.root, snapshot.path)):
        snapshot = snapshot.group.snapshot(snapshot.time + 1)
    return snapshot


def _fsync(path: str) -> None:
    with refused(path, "fsync"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
