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
from loopdev.errors import DeviceBusyError, LoopdevError
from loopdev.kernel import abi, sysfs
from loopdev.kernel.fds import OwnedFd
from loopdev.kernel.ioctl import FLAGS, diskseq_of, status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
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


def _detachment(record: Device, pin: OwnedFd) -> Detachment:
    # The client may have cleared autoclear, and have exchanged the file: while we hold the device
    # it is all the same the one that we attached.
    persistent = not status_of(pin.fileno(), pin.name)[FLAGS] & abi.LO_FLAGS_AUTOCLEAR
    seq = diskseq_of(pin.fileno(), pin.name)
    partitioned = sysfs.has_partitions(record["number"])
    return Detachment(pin, record["number"], seq, persistent, partitioned)


def detach_job(payload: Payload, fds: Fds) -> Result:
    record, pin, place = _unpack(payload, fds)
    work = _detachment(record, pin)
    nodes: list[Node] = record["nodes"] if place is not None else []
    if place is not None:
        place.suspend(nodes)
    try:
        work.run(payload["timeout"], keep=True)
    except LoopdevError as exc:
        if work.pin.closed:  # gone all the same
            return _answered(_gone(payload, place, nodes))
        if place is not None:
            uid, gid = record["owner"]
            place.resume(nodes, (uid, gid), record["mode"])
        if record["locked"]:
            _lock_again(work.pin)
        held = [] if place is None else [*place.held.values()]
        kept = [fds.take(fd) for fd in fds]
        return failed(_censored(exc, payload["client"])), [work.pin.take(), *kept, *held]
    return _answered(_gone(payload, place, nodes))


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
    return {"bound": sysfs.is_bound(record["number"]), "problems": problems}, []


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
    if diskseq_of(pin.fileno(), pin.name) != record["diskseq"]:
        problems.append(SWAPPED)
    if place is not None:
        place.suspend(nodes)
    work = _detachment(record, pin)
    try:
        try:
            work.run(_END_TIMEOUT, keep=True)
        except DeviceBusyError:
            work.run_lazily()
    except (LoopdevError, OSError) as exc:
        problems.append(str(exc))
    finally:
        work.pin.close()
    result, _ = _gone(payload, place, nodes)
    result["problems"] = problems + result["problems"]  # type: ignore[operator]
    return result, []
