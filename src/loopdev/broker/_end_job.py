# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A worker's jobs at the end of a device: asked for by its client, or because that has gone."""

from __future__ import annotations

import errno
import fcntl
import os

from loopdev import _partnodes
from loopdev._detach import Detachment
from loopdev.broker import _nodes
from loopdev.broker._jobs import failed
from loopdev.broker.messages import DONE
from loopdev.errors import DeviceBusyError, LoopdevError, kernel_error
from loopdev.kernel import abi, sysfs
from loopdev.kernel.fds import OwnedFd
from loopdev.kernel.ioctl import FLAGS, diskseq_of, status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from loopdev._holders import Holder
    from loopdev.broker._jobs import Client, Device, Fds, Node, Payload, Result

# Seconds to wait for others, when there is nobody whom they could be named to.
_END_TIMEOUT = 0.5
SWAPPED = "its backing file was exchanged by somebody who has it open"


def _unpack(payload: Payload, fds: Fds) -> tuple[Device, OwnedFd, _nodes.Place | None]:
    """Return a device as _hand_out() had it; the descriptors of its place stay in *fds*."""
    record: Device = payload["device"]
    pin = OwnedFd(fds.take(fds[0]), f"/dev/loop{record['number']}")
    if "directory" not in record:
        return record, pin, None
    rest = iter(fds)
    directory = next(rest)
    namespace = next(rest) if record["directory"][0] else None
    place = _nodes.Place(directory, namespace, payload["client"], payload["private"])
    for node in record["nodes"]:
        if node["how"] == _nodes.MKNOD:
            place.held[node["name"]] = fds.take(next(rest))
    return record, pin, place


class _Held:
    """Close in the end what _unpack() took over, unless it was handed on."""

    def __init__(self, pin: OwnedFd, place: _nodes.Place | None) -> None:
        self.pin, self._place = pin, place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.pin.closed:
            self.pin.close()
        if self._place is not None:
            self._place.let_go()


def _detachment(record: Device, pin: OwnedFd) -> Detachment:
    # The client may have cleared autoclear, and have exchanged the file: while we hold the device
    # it is all the same the one that we attached.
    persistent = not status_of(pin.fileno(), pin.name)[FLAGS] & abi.LO_FLAGS_AUTOCLEAR
    seq = diskseq_of(pin.fileno(), pin.name)
    partitioned = sysfs.has_partitions(record["number"])
    return Detachment(pin, record["number"], seq, persistent, partitioned)


def detach_job(payload: Payload, fds: Fds) -> Result:
    record, pin, place = _unpack(payload, fds)
    nodes: list[Node] = record["nodes"] if place is not None else []
    with _Held(pin, place) as ours:
        work = _detachment(record, pin)
        try:
            if place is not None:
                place.suspend(nodes)
            work.run(payload["timeout"], keep=True)
        except (LoopdevError, OSError) as exc:
            ours.pin = work.pin  # it was closed and opened again
            if work.pin.closed:  # gone all the same
                return _answered(_gone(payload, place, nodes))
            return _kept(payload, fds, ours.pin, place, exc)
        return _answered(_gone(payload, place, nodes))


def _kept(
    payload: Payload, fds: Fds, pin: OwnedFd, place: _nodes.Place | None, exc: Exception
) -> Result:
    """Give everything back as it was, and say why."""
    record: Device = payload["device"]
    if place is not None:
        uid, gid = record["owner"]
        try:
            place.resume(record["nodes"], (uid, gid), record["mode"])
        except OSError:
            pass  # what cannot be changed has not been
    if record["locked"]:
        _lock_again(pin)
    held = [] if place is None else place.take_held()
    kept = [fds.take(fd) for fd in fds]
    if not isinstance(exc, LoopdevError):
        assert isinstance(exc, OSError)
        exc = kernel_error(exc, "a node", "chown")
    return failed(_censored(exc, payload["client"])), [pin.take(), *kept, *held]


def _answered(result: Result) -> Result:
    result[0]["reply"] = DONE
    return result


def _lock_again(pin: OwnedFd) -> None:
    """Lock a device whose descriptor was closed and opened again."""
    try:
        fcntl.flock(pin.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # somebody has looked for just that moment


def _gone(payload: Payload, place: _nodes.Place | None, nodes: list[Node]) -> Result:
    record: Device = payload["device"]
    if record["reopens"]:
        _nodes.revoke(_nodes.reopenable(payload["private"], record["number"]))
    problems = _remove_nodes(record, place, nodes)
    # A node that still opens the device must not be there when that is another client's.
    opens = place is not None and place.unrevoked
    return {"bound": sysfs.is_bound(record["number"]), "problems": problems, "open": opens}, []


def _remove_nodes(record: Device, place: _nodes.Place | None, nodes: list[Node]) -> list[str]:
    problems = []
    for node in nodes if place is not None else ():
        try:
            assert place is not None
            place.remove(node)
        except OSError as exc:
            problems.append(f"{node['name']} stays in the client's directory: {exc}")
    _partnodes.discard_nodes((str(path), int(str(rdev))) for path, rdev in record["made"])
    return problems


def _censored(exc: LoopdevError, client: Client) -> LoopdevError:
    """Return an error without those holders of which the client is not to know."""
    if not isinstance(exc, DeviceBusyError) or client["uid"] == 0:
        return exc
    holders = [holder for holder in exc.holders if _is_of(holder, client["uid"])]
    reason = "is in use"
    return DeviceBusyError(exc.errno or errno.EBUSY, exc.filename, exc.request, reason, holders)


def _is_of(holder: Holder, uid: int) -> bool:
    try:
        return holder.kind == "process" and os.stat(f"/proc/{holder.pid}").st_uid == uid
    except OSError:
        return False


def end_job(payload: Payload, fds: Fds) -> Result:
    """End a device whose client has gone: whoever still has it open keeps it for that long."""
    record, pin, place = _unpack(payload, fds)
    nodes: list[Node] = record["nodes"] if place is not None else []
    problems: list[str] = []
    with _Held(pin, place) as ours:
        try:
            _end(ours, record, place, problems)
        except (LoopdevError, OSError) as exc:
            problems.append(str(exc))
        finally:
            ours.pin.close()
        result, _ = _gone(payload, place, nodes)
    result["problems"] = problems + result["problems"]  # type: ignore[operator]
    return result, []


def _end(ours: _Held, record: Device, place: _nodes.Place | None, problems: list[str]) -> None:
    if diskseq_of(ours.pin.fileno(), ours.pin.name) != record["diskseq"]:
        problems.append(SWAPPED)
    if place is not None:
        try:
            place.suspend(record["nodes"])
        except OSError as exc:
            problems.append(str(exc))
    work = _detachment(record, ours.pin)
    try:
        work.run(_END_TIMEOUT, keep=True)
    except DeviceBusyError:
        work.run_lazily()
    finally:
        ours.pin = work.pin
