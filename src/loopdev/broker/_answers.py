# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the event loop does with a request by itself: look at it, take it off, find its device."""

from __future__ import annotations

import errno
import socket

from loopdev.broker import messages
from loopdev.errors import NotBoundError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.broker._jobs import Device
    from loopdev.broker._lease import Held, Lease

# Plain numbers: socket's are an enum, whose "|" costs more than the system call.
_FLAGS = int(socket.MSG_DONTWAIT)
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_CTRUNC = int(socket.MSG_CTRUNC)


def peek(connection: socket.socket, size: int) -> tuple[bytes, bool]:
    """Return the next message, and whether descriptors came with it; all stays where it is.

    Raises:
        BlockingIOError: There is none.
    """
    try:
        # Without room for descriptors, that there are some is all that the kernel tells.
        data, _, flags, _ = connection.recvmsg(size, 0, _PEEK)
    except BlockingIOError:
        raise
    except OSError:
        return b"", False  # ECONNRESET
    return data, bool(int(flags) & _CTRUNC)


def drop(lease: Lease) -> None:
    """Take a message off a connection that brought no descriptor."""
    try:
        lease.connection.recv(1, _FLAGS)
    except OSError:
        lease.ended = True  # ECONNRESET: it went just now, without reading all of its answers


def find(lease: Lease, request: messages.Request) -> Held:
    """Return the device that a request is about; one connection knows no other's."""
    assert isinstance(request, (messages.Detach, messages.Resize, messages.Sync))
    held = (lease.devices or {}).get(request.number)
    if held is None or held.record["diskseq"] != request.diskseq:
        path = f"/dev/loop{request.number}"
        raise NotBoundError(errno.ENXIO, path, request.op, "is no device of this connection")
    return held


def summary(record: Device, owner: Lease, mine: bool) -> dict[str, object]:
    """Return what a list says of a device."""
    return {
        "number": record["number"],
        "name": f"loop{record['number']}",
        "diskseq": record["diskseq"],
        "size": record["size"],
        "sector_size": record["sector_size"],
        "read_only": record["read_only"],
        "partitions": [part["number"] for part in record["partitions"]],
        "backing_file": record["backing_file"],
        "uid": owner.client["uid"],
        "pid": owner.client["pid"],
        "mine": mine,
    }
