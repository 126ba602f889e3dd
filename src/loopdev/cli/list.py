# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev list``."""

from __future__ import annotations

from loopdev._devices import devices
from loopdev.cli._args import JSON, Args, Operand, Option
from loopdev.cli._devices import DEVICE_HELP, paths_of
from loopdev.errors import NotBoundError

HELP = "list the loop devices that are bound"
OPERANDS = (Operand("DEVICE", f"only these: {DEVICE_HELP}", many="*", kind="device"),)
OPTIONS = (
    Option(
        *("--broker",),
        convert=str,
        metavar="SOCKET",
        help="those that a broker has given to this user, or as root to anybody",
    ),
    JSON,
)
EXAMPLES = """\
  loopdev list                             a table
  loopdev list --json disk.img             the devices of one file, for a program"""
_TITLES = (
    *("NAME", ">SIZE", ">OFFSET", ">SIZELIMIT", ">SECTOR", "RO", "AUTO", "DIO"),
    *("PARTITIONS", "BACKING FILE"),
)


def run(args: Args) -> int:
    """Print a table, or JSON."""
    if args.broker is not None:
        from loopdev.cli._broker import list_of_broker

        return list_of_broker(args)
    found = devices()
    if args.device:
        wanted = {path for name in args.device for path in _paths(name)}
        found = [device for device in found if device.path in wanted]
    if args.json:
        from loopdev.cli._output import print_json

        print_json(found)
    elif found:
        from loopdev.cli._output import human_size, print_table

        rows = [
            (
                *(device.path, human_size(device.size), str(device.offset)),
                *(str(device.sizelimit), str(device.sector_size), _yes(device.read_only)),
                *(_yes(device.autoclear), _yes(device.direct_io)),
                " ".join(str(part.number) for part in device.partitions) or "-",
                device.backing_file,
            )
            for device in found
        ]
        print_table(_TITLES, rows)
    return 0


def _paths(name: str) -> list[str]:
    try:
        return paths_of(name)
    except NotBoundError:
        return []  # a file that no device has: the list is empty, and that is an answer


def _yes(value: bool) -> str:
    return "yes" if value else "no"
