# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The process that does for the broker what may hang, one thing at a time.

It ends when the broker's end of its socket is closed. Whatever it has open then goes with it.
"""

from __future__ import annotations

import errno
import os
import signal

# All that any job needs, and nothing later: within a client's mount namespace an import would run
# that client's files.
from loopdev import _holders, partitions  # noqa: F401
from loopdev._control import LoopControl
from loopdev._detach import sync
from loopdev._loop import Loop
from loopdev.broker import _recover
from loopdev.broker._attach_job import attach_job
from loopdev.broker._end_job import SWAPPED, detach_job, end_job
from loopdev.broker._jobs import Connection, Fds, Link, failed, send
from loopdev.broker._visit import Visit
from loopdev.errors import (
    BackingFileError,
    DeviceBusyError,
    LoopdevError,
    NoSuchDeviceError,
    NotBoundError,
    RefusedError,
    RemoteProtocolError,
)
from loopdev.kernel import abi, namespaces, udev  # noqa: F401
from loopdev.kernel.ioctl import diskseq_of, get_u64, ioctl, status_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import cast

    from loopdev.broker._jobs import Device, Payload, Result
else:

    def cast(_, value):
        return value


def _refuse(payload: Payload, _: Fds) -> Result:
    """Take a message off a connection, and close what came with it."""
    try:
        payload["connection"].receive_descriptors(2).close()
    except RemoteProtocolError:
        pass
    return {}, []


def _bury(_: Payload, __: Fds) -> Result:
    """Close a connection with all that was sent on it and not read: that is done after any job."""
    return {}, []


def _check_ours(payload: Payload, pin: int) -> str:
    """Return the device's path, after making sure that it is what it was.

    Raises:
        NotBoundError: Whoever has it open has given it another file.
    """
    record: Device = payload["device"]
    path = f"/dev/loop{record['number']}"
    found = [*status_of(pin, path)[:2]]
    if diskseq_of(pin, path) != record["diskseq"] or found != record["file"]:
        raise NotBoundError(errno.ENXIO, path, payload["job"], SWAPPED)
    return path


def _resize(payload: Payload, fds: Fds) -> Result:
    pin, number = fds[0], payload["device"]["number"]
    path = _check_ours(payload, pin)
    before = get_u64(pin, abi.BLKGETSIZE64, path)
    ioctl(pin, abi.LOOP_SET_CAPACITY, path)
    size = get_u64(pin, abi.BLKGETSIZE64, path)
    most = payload["most"]
    if most is not None and size > most:
        with Loop(number, read_only=True) as loop:
            loop.set_status(sizelimit=before)
        raise RefusedError(errno.EDQUOT, f"{size} bytes are more than the {most} that are left")
    return {"size": size}, []


def _sync(payload: Payload, fds: Fds) -> Result:
    path = _check_ours(payload, fds[0])
    sync(fds[0], path)
    return {}, []


def _remove(payload: Payload, _: Fds) -> Result:
    """Remove unbound devices; those that somebody has open stay."""
    left = []
    with LoopControl() as control:
        for number in payload["numbers"]:
            try:
                control.remove(number)
            except NoSuchDeviceError:
                pass
            except DeviceBusyError:
                left.append(number)
    return {"left": left}, []


def _recovery(payload: Payload, _: Fds) -> Result:
    found = _recover.recover(
        payload["number"], payload["device"], payload["client"], payload["private"]
    )
    return found, []


_JOBS: dict[str, Callable[[Payload, Fds], Result]] = {
    "attach": attach_job,
    "detach": detach_job,
    "end": end_job,
    "resize": _resize,
    "sync": _sync,
    "refuse": _refuse,
    "bury": _bury,
    "remove": _remove,
    "recover": _recovery,
}


# The jobs that come with a client's connection.
_TALKS = ("attach", "detach", "refuse")


def _run(payload: Payload, fds: Fds) -> Result:
    try:
        return _JOBS[payload["job"]](payload, fds)
    except LoopdevError as exc:
        return failed(exc), []
    except OSError as exc:
        # What the client's filesystem or namespace says of what we try to do for it.
        code = exc.errno or errno.EIO
        made = BackingFileError(code, str(exc.filename or payload["job"]), os.strerror(code))
        return failed(made), []


def main(fd: int) -> None:
    """Serve the broker at the other end of a socket until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at a terminal: the broker ends us
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    # Whatever it is that hangs, nothing is done any more for a broker that is gone.
    namespaces.die_with_parent()
    os.chdir("/")
    os.umask(0o077)
    link = Link(fd)
    with link.socket:
        while (received := link.next()) is not None:
            payload, fds = received
            if "cut" in payload:
                fds.close()
                return  # we have no room for what belongs to the job
            payload["link"] = link
            with fds:
                try:
                    _serve(link, payload, fds)
                except ConnectionError:
                    return  # there is nobody to tell of it


def _serve(link: Link, payload: Payload, fds: Fds) -> None:
    """Do one job.

    Raises:
        ConnectionError: The event loop has gone.
    """
    if payload["job"] not in _TALKS:
        _tell(link, *_run(payload, fds), fds)
        return
    with Connection(fds.take(fds[0])) as connection:
        payload["connection"] = connection
        result, out = _run(payload, fds)
        if "reply" in result and payload["job"] == "attach":
            result, out = Visit(link, _run, payload, fds).run(result, out)
        elif "reply" in result and payload["direct"]:
            fds.close()
            # Before the event loop is told: it takes the next request when it has heard of this
            # one, and answers must come in the order of the requests.
            connection.answer(cast("bytes", result.pop("reply")))
        _tell(link, result, out, fds)


def _tell(link: Link, result: dict[str, object], out: list[int], fds: Fds) -> None:
    """Have the event loop know what came of a job; of one that failed before it is cleaned up."""
    closing = "error" in result
    with Fds(out):
        if not closing:
            fds.close()
        send(link.socket, {**result, "closing": closing}, out)
    if closing:
        fds.close()
        send(link.socket, {})
