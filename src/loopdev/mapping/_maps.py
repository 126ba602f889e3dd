# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What is mapped now, how to find one map of it, and what dead ones leave behind."""

from __future__ import annotations

import fcntl
import os

from loopdev._value import Value
from loopdev.errors import DeviceBusyError, LoopdevError, NotMappedError, kernel_error
from loopdev.kernel import sysfs
from loopdev.kernel.fds import OwnedFd
from loopdev.mapping._counters import Counters
from loopdev.mapping._end import end
from loopdev.mapping._registry import ROOT, Entry, discard_begun, entries, entry_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.mapping._counters import Totals
    from loopdev.mapping._map import Mapping
    from loopdev.mapping._registry import State


class MapInfo(Value):
    """A map, as it was when it was looked at.

    Attributes:
        name: Its name.
        source: What is mapped, for people.
        device: "/dev/loop3"; None: it has none (yet, or any more).
        status: "serving"; "starting"; "unsupervised": it serves, but nobody replaces a worker
            that dies; "failed": reads fail; "dead": no process is left, ``loopdev gc`` removes it.
        reason: Why it failed, if it did.
        size: Of the device, in bytes.
        diskseq: The number of the attachment.
        connection: The FUSE connection's number.
        supervisor: The process that looks after the workers; None: there is none.
        workers: The processes that serve.
        requests: FUSE requests since the map began.
        bytes: Bytes that were read since then.
        hits: Reads that were answered from the cache.
        misses: Reads that were not.
        errors: Reads that failed.
        damaged: Places of the image that could not be read.
        restarts: Workers that were replaced.
        uptime: Since the map began, in seconds.
    """

    name: str
    source: str
    device: str | None
    status: str
    reason: str | None
    size: int
    diskseq: int | None
    connection: int
    supervisor: int | None
    workers: tuple[int, ...]
    requests: int
    bytes: int
    hits: int
    misses: int
    errors: int
    damaged: int
    restarts: int
    uptime: float


class Collected(Value):
    """What gc() found.

    Attributes:
        name: The map's name.
        found: What it was.
        removed: Whether it is gone.
    """

    name: str
    found: str
    removed: bool


def maps() -> list[MapInfo]:
    """Return all maps, by name; none of them, nor their servers, is asked."""
    return [info for entry in entries() for info in _look(entry)]


def map_info(name: str) -> MapInfo:
    """Return one map.

    Raises:
        NotMappedError: There is none of this name.
    """
    for info in _look(Entry(name)):
        return info
    raise NotMappedError(name)


def _look(entry: Entry) -> list[MapInfo]:
    state, totals = entry.state(), _totals(entry)
    if not entry.exists:
        return []  # it went while it was looked at
    devices, supervised = entry.devices(), entry.is_locked("supervisor")
    reason = entry.failure()
    status = _status(entry, state, reason, supervised)
    known: dict[str, object] = dict.fromkeys(
        ("requests", "bytes", "hits", "misses", "errors", "damaged", "restarts"), 0
    )
    known |= {"uptime": 0.0, "workers": ()}
    if totals is not None:
        known |= totals.as_dict()
    return [
        MapInfo(
            name=entry.name,
            source=state.source if state is not None else "",
            device=f"/dev/loop{devices[0]}" if devices else None,
            status=status,
            reason=reason,
            size=state.size if state is not None else 0,
            diskseq=state.diskseq if state is not None else None,
            connection=state.connection if state is not None else 0,
            supervisor=state.supervisor if state is not None and supervised else None,
            **known,  # type: ignore[arg-type]
        )
    ]


def _status(entry: Entry, state: State | None, reason: str | None, supervised: bool) -> str:
    if not entry.is_locked():
        return "dead"
    if reason is not None:
        return "failed"
    if state is None:
        return "starting"
    return "serving" if supervised else "unsupervised"


def _totals(entry: Entry) -> Totals | None:
    counters = Counters.look(entry.counters)
    if counters is None:
        return None
    try:
        return counters.totals()
    finally:
        counters.close()


def find_map(what: str) -> Entry:
    """Return the map of a name, a loop device ("/dev/loop3") or its number ("3").

    Raises:
        NotMappedError: There is none; if the device is somebody else's, it says whose.
    """
    if what.isdecimal() or what.startswith("/"):
        return _map_on(what if what.startswith("/") else f"/dev/loop{what}")
    entry = Entry(what)
    if not what or "/" in what or what.startswith(".") or not entry.exists:
        raise NotMappedError(what)
    return entry


def _map_on(path: str) -> Entry:
    from loopdev._device import number_of

    number = number_of(path)
    backing_file = sysfs.backing_file(number)
    if backing_file is None:
        raise NotMappedError(path, "nothing is mapped on it")
    entry = entry_of(backing_file)
    if entry is not None and entry.exists:
        return entry
    for entry in entries():
        if number in entry.devices():
            return entry
    raise NotMappedError(path, f"is no map of ours; it is attached to {backing_file}")


def unmap(what: str, *, timeout: float = 10.0, lazy: bool = False, force: bool = False) -> None:
    """Unmap an image, and wait until its device, its mount and its processes are gone.

    Args:
        what: The map's name, its loop device ("/dev/loop3"), or that one's number ("3").
        timeout: How long to wait for users of the device to leave, in seconds.
        lazy: If it is in use, let it go when its last user leaves; it is served till then.
        force: Fail all its reads instead of asking its users to leave.

    Raises:
        NotMappedError: There is no such map, or the device is somebody else's.
        DeviceBusyError: It is in use, and stays as it is. With its holders.
    """
    end(find_map(what), timeout=timeout, lazy=lazy, force=force)


def collect(entry: Entry) -> bool:
    """Remove what a dead map has left; False: it lives.

    A device that is still in use goes when its last user leaves: reads of it fail already.
    """
    if entry.is_locked():
        return False
    try:
        end(entry, timeout=0.5, lazy=True)
    except NotMappedError:
        pass
    return True


def gc() -> list[Collected]:
    """Remove what dead maps have left, and return what was found.

    A map whose supervisor is dead is told, and serves on.
    """
    found = []
    for entry in entries():
        try:
            if collect(entry):
                found.append(Collected(name=entry.name, found="dead", removed=not entry.exists))
            elif not entry.is_locked("supervisor"):
                gone = entry.state() is not None and not entry.devices()
                if gone:
                    end(entry, lazy=True)
                found.append(Collected(name=entry.name, found="unsupervised", removed=gone))
        except LoopdevError as exc:
            found.append(Collected(name=entry.name, found=str(exc), removed=False))
    begun = discard_begun()
    return [*found, *(Collected(name=name, found="never begun", removed=True) for name in begun)]


def only_one() -> OwnedFd:
    """Return a lock, for who wants to be the only one to map an image."""
    path = os.path.dirname(ROOT)  # not ROOT: that is held while a map is being made
    try:
        os.makedirs(ROOT, 0o700, exist_ok=True)
        lock = OwnedFd.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise kernel_error(exc, path, "open") from exc
    fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
    return lock


def find_same(identity: str) -> Mapping | None:
    """Return the first map of an image that serves."""
    from loopdev._device import LoopDevice
    from loopdev.mapping._map import Mapping

    for entry in entries():
        state = entry.state()
        if state is None or state.identity != identity or not entry.is_locked():
            continue
        if entry.failure() is None and state.number in entry.devices():
            try:
                return Mapping(entry, LoopDevice.open(state.device, state.diskseq), None, False)
            except (LoopdevError, DeviceBusyError):
                continue  # it ends just now
    return None
