# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What ``attach`` and ``list`` do with ``--broker``."""

from __future__ import annotations

import errno
import os
import select
import sys

from loopdev.broker._leased import NodeDirectory, OpenFile
from loopdev.broker.client import LoopClient
from loopdev.cli._output import human_size, print_json, print_table, show
from loopdev.errors import BrokerError, InvalidValueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.broker.client import BrokerDevice
    from loopdev.cli._args import Args

# What is the host's to decide, with the values that say nothing.
_FOREIGN = {"number": None, "loop_ref": None, "reuse": False, "no_lock": False}
_TITLES = ("NAME", ">SIZE", ">SECTOR", "RO", ">UID", ">PID", "PARTITIONS", "BACKING FILE")


def attach_by_broker(args: Args) -> int:
    """Attach, print the node, and keep the device until a signal comes or the broker goes."""
    if args.broker is None:
        raise InvalidValueError("nodes", args.nodes, "is for use with --broker")
    for name, nothing in _FOREIGN.items():
        value = getattr(args, name)
        if value != nothing:
            raise InvalidValueError(name, value, "cannot be had from a broker")
    with (
        LoopClient(args.broker) as client,
        NodeDirectory(args.nodes) as place,
        OpenFile(args.file, args.read_only) as fd,
    ):
        made = client.attach(
            fd,
            offset=args.offset,
            sizelimit=args.sizelimit,
            sector_size=args.sector_size,
            read_only=args.read_only,
            partscan=args.partscan,
            direct_io=args.direct_io,
            force=args.force,
            directory=place.fd,
        )
        with made:
            _print(args, place.path, made)
            _wait(client)
    return 0


def _print(args: Args, directory: str, made: BrokerDevice) -> None:
    path = os.path.join(directory, made.name)
    if args.json:
        print_json({"path": path, **made.lease.as_dict()})
    else:
        show(path)
    sys.stdout.flush()


def _wait(client: LoopClient) -> None:
    """Return never: a signal ends it, or the broker does."""
    poll = select.poll()
    poll.register(client.fileno(), select.POLLIN)
    poll.poll()
    raise BrokerError(errno.ECONNRESET, client.path, "the broker has gone, and the device with it")


def list_of_broker(args: Args) -> int:
    """Print the devices that a broker has given."""
    with LoopClient(args.broker) as client:
        found = client.devices()
    if args.device:
        # Names of ours mean nothing to it.
        found = [device for device in found if device["name"] in map(_name, args.device)]
    if args.json:
        print_json(found)
    elif found:
        rows = [
            (
                *(device["name"], human_size(device["size"]), str(device["sector_size"])),
                "yes" if device["read_only"] else "no",
                *(str(device["uid"]), str(device["pid"])),
                " ".join(map(str, device["partitions"])) or "-",
                device["backing_file"],
            )
            for device in found
        ]
        print_table(_TITLES, rows)
    return 0


def _name(text: str) -> str:
    name = os.path.basename(text)
    return f"loop{name}" if name.isdecimal() else name
