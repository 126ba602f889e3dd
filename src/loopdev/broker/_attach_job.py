# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A worker's job: to make a device of what a client has sent, and hand it to the event loop."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from loopdev._attach import attach
from loopdev._backoff import backoff
from loopdev._control import LoopControl
from loopdev.broker import _checks, _nodes
from loopdev.broker._jobs import MAX_FDS, Fds, reply_of
from loopdev.errors import KernelError, RefusedError, kernel_error
from loopdev.kernel import abi, sysfs
from loopdev.kernel.fds import OwnedFd, open_device
from loopdev.kernel.ioctl import FLAGS, status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev._device import LoopDevice
    from loopdev.broker._jobs import Client, Device, Link, Partition, Payload, Result

_TIMEOUT = 10.0
# Beside the nodes: the device, its copy for the client, the directory and its namespace.
_MAX_HELD = MAX_FDS - 4


def attach_job(payload: Payload, fds: Fds) -> Result:
    request, rule, number = payload["request"], payload["rule"], payload["number"]
    if payload["fresh"]:
        with LoopControl() as control:
            try:
                control.add(number)
            except KernelError as exc:
                if exc.errno != errno.EEXIST:
                    raise
                return {"taken": True}, []
    elif not sysfs.is_bare(number) and (sysfs.is_bound(number) or not sysfs.exists(number)):
        return {"taken": True}, []  # LOOP_CTL_GET_FREE has given it to somebody, or it was removed
    count = 2 if request["directory"] else 1
    received = payload["connection"].receive_descriptors(count)
    with _Passed(received, fds) as sent:
        backing, name = sent[0], _checks.name_of(sent[0])
        read_only, status = _check_backing(backing, name, payload)
        with _device_of(payload, backing, read_only) as device:
            if rule["bytes"] is not None and device.size > rule["bytes"]:
                reason = f"{device.size} bytes are more than the {rule['bytes']} that are left"
                raise RefusedError(errno.EDQUOT, reason)
            record = _describe(device, name, status)
            return _hand_out(payload, device, sent, record)


class _Passed:
    """What a client has sent: closed before it is answered, so that its file is free by then.

    But if it is refused it is left to be closed later: that alone may hang.
    """

    def __init__(self, received: Fds, later: Fds) -> None:
        self._received, self._later = received, later

    def __enter__(self) -> Fds:
        return self._received

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            for fd in self._received:
                self._later.add(self._received.take(fd))
        self._received.close()


def _check_backing(fd: int, name: str, payload: Payload) -> tuple[bool, os.stat_result]:
    """Return whether the device is to be read-only, and what the file is."""
    rule = payload["rule"]
    read_only = _checks.check_mode(fd, name, payload["request"]["read_only"])
    if rule["read_only"] and not read_only:
        raise RefusedError(errno.EPERM, "only read-only devices are allowed")
    _checks.check_filesystem(fd, name, payload["client"]["uid"])
    ours = {(device, inode) for device, inode in payload["ours"]}
    return read_only, _checks.check_kind(fd, name, rule["block_devices"], ours)


class _device_of:  # noqa: N801 - reads as a statement
    """Attach; close the device at the end, unless its descriptor was taken."""

    def __init__(self, payload: Payload, backing: int, read_only: bool) -> None:
        self._payload, self._backing, self._read_only = payload, backing, read_only

    def __enter__(self) -> LoopDevice:
        request, client = self._payload["request"], self._payload["client"]
        number = self._payload["number"]
        locked = request["lock"] or self._payload["rule"]["lock"]
        # Locked before there is anything in it that udev could look at.
        guard = open_device(f"/dev/loop{number}", os.O_RDONLY) if locked else None
        try:
            if guard is not None:
                _lock(guard)
            self._device = attach(
                self._backing,
                read_only=self._read_only,
                number=number,
                loop_ref=f"loopdev broker: uid {client['uid']}, pid {client['pid']}",
                timeout=_TIMEOUT,
                lock=False if locked else None,
                **{
                    key: request[key]
                    for key in (
                        *("offset", "sizelimit", "sector_size"),
                        *("partscan", "direct_io", "force"),
                    )
                },
            )
            if guard is not None:
                self._device.exchange_pin(guard)
        except BlockingIOError as exc:
            raise kernel_error(exc, f"/dev/loop{number}", "flock") from exc
        except BaseException:
            if guard is not None:
                guard.close()
            raise
        return self._device

    def __exit__(self, *_: object) -> None:
        self._device.close()


def _lock(guard: OwnedFd) -> None:
    """Lock a device; udev may still be looking at what was in it before.

    Raises:
        BlockingIOError: Somebody has had it locked for all of the time.
    """
    for _ in backoff(time.monotonic() + _TIMEOUT):
        try:
            fcntl.flock(guard.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            held = exc
        else:
            return
    raise held


def _hand_out(payload: Payload, device: LoopDevice, sent: Fds, record: Device) -> Result:
    """Return what the event loop is to know and hold of a device."""
    request, rule, client = payload["request"], payload["rule"], payload["client"]
    owner = rule["node_owner"] or (client["uid"], client["gid"])
    record["owner"], record["mode"] = list(owner), rule["node_mode"]
    record["locked"] = request["lock"] or rule["lock"]
    with Fds() as out, _Revoked(payload["private"], record):
        if request["want_fd"]:
            out.add(_open_for_client(payload["private"], device, owner, rule["node_mode"]))
            record["reopens"] = True
        place = _place(payload, sent[1], out) if request["directory"] else None
        if place is not None:
            _offer(payload["link"], place, record)
        result: dict[str, object] = {"device": record}
        if payload["stay"] is not None:
            result["reply"] = reply_of(record)
        fds = [device.take_pin(), *(out.take(fd) for fd in out)]
        if place is not None:
            fds += place.take_held()
    return result, fds


class _Revoked:
    """Have nothing left that can be opened again when an exception passes."""

    def __init__(self, private: str, record: Device) -> None:
        self._private, self._record = private, record

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._record["reopens"]:
            _nodes.revoke(_nodes.reopenable(self._private, self._record["number"]))


def _open_for_client(private: str, device: LoopDevice, owner: tuple[int, int], mode: int) -> int:
    """Return a descriptor that its client can open again, as /dev/fd/5, for programs to use."""
    path = _nodes.reopenable(private, device.number)
    _nodes.make_private(path, device.rdev, owner, mode)
    try:
        return open_device(path, os.O_RDONLY if device.read_only else os.O_RDWR).take()
    except BaseException:
        _nodes.revoke(path)
        raise


def _place(payload: Payload, directory: int, out: Fds) -> _nodes.Place:
    client: Client = payload["client"]
    try:
        # Not the client's own descriptor, but one that does nothing when it is closed.
        held = out.add(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory))
    except OSError as exc:
        raise kernel_error(exc, "the directory for nodes", "open") from exc
    namespace = _nodes.namespace_of(client["pid"])
    if namespace is not None:
        out.add(namespace)
    return _nodes.Place(held, namespace, client, payload["private"])


def _offer(link: Link, place: _nodes.Place, record: Device) -> None:
    """Make the nodes of a device, or none; what is to be made is written down before."""
    uid, gid = record["owner"]
    found = os.fstat(place.fd)
    path = _checks.name_of(place.fd)
    inode = os.fstat(place.namespace).st_ino if place.namespace is not None else 0
    record["directory"] = [inode, found.st_dev, found.st_ino, path]
    wanted = dict(_nodes.nodes_of(record["number"]))
    record["nodes"] = [
        {"name": name, "rdev": rdev, "how": _nodes.PLANNED, "inode": 0}
        for name, rdev in wanted.items()
    ]
    link.note({"device": record})
    record["nodes"] = []
    try:
        for name, rdev in wanted.items():
            record["nodes"].append(place.offer(name, rdev, (uid, gid), record["mode"]))
            if len(place.held) > _MAX_HELD:
                raise RefusedError(errno.E2BIG, "too many partitions for nodes made by mknod")
    except BaseException:
        for node in record["nodes"]:
            place.remove(node)
        place.let_go()
        raise


def _describe(device: LoopDevice, name: str, status: os.stat_result) -> Device:
    flags = status_of(device.fileno(), device.path)[FLAGS]
    return {
        "number": device.number,
        "diskseq": device.diskseq,
        "rdev": device.rdev,
        "size": device.size,
        "sector_size": device.sector_size,
        "read_only": bool(flags & abi.LO_FLAGS_READ_ONLY),
        "direct_io": bool(flags & abi.LO_FLAGS_DIRECT_IO),
        "partitions": _partitions(device) if device.partitioned else [],
        "backing_file": name,
        "file": [status.st_dev, status.st_ino],
        "made": [[path, rdev] for path, rdev in device.made_nodes],
        "nodes": [],
        "owner": [0, 0],
        "mode": 0,
        "locked": False,
        "reopens": False,
    }


def _partitions(device: LoopDevice) -> list[Partition]:
    rdevs = dict(_nodes.nodes_of(device.number))
    return [
        {
            "number": part.number,
            "name": os.path.basename(part.path),
            "rdev": _pair(rdevs[os.path.basename(part.path)]),
            "start": part.start,
            "size": part.size,
            "type": part.type,
            "label": part.name,
            "uuid": part.uuid,
        }
        for part in device.partitions
    ]


def _pair(rdev: int) -> list[int]:
    return [os.major(rdev), os.minor(rdev)]
