# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev info``."""

from __future__ import annotations

from loopdev._devices import DeviceInfo, info
from loopdev.cli._args import JSON, Args, Operand
from loopdev.cli._devices import DEVICE_HELP, opened
from loopdev.cli._output import human_size, print_json, print_table, printable, show

HELP = "show all that is known of a loop device, with its partitions"
OPERANDS = (Operand("DEVICE", DEVICE_HELP, many="+", kind="device"),)
OPTIONS = (JSON,)
EXAMPLES = "  loopdev info /dev/loop0"


def run(args: Args) -> int:
    """Print each device's properties, or JSON."""
    found = [info(device) for device in opened(args.device)]
    if args.json:
        print_json(found)
        return 0
    for index, device in enumerate(found):
        if index:
            print()
        _print(device)
    return 0


def _print(device: DeviceInfo) -> None:
    for name, value in device.as_dict().items():
        if name in ("offset", "sizelimit", "size", "sector_size") and isinstance(value, int):
            text = f"{value} ({human_size(value)})" if value >= 1024 else str(value)
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        elif name == "partitions":
            continue
        else:
            text = "-" if value is None else printable(str(value))
        show(f"{name.replace('_', ' ') + ':':14} {text}")
    if device.partitions:
        titles = (">NUMBER", "PATH", ">START", ">SIZE", "TYPE", "NAME", "UUID")
        rows = [
            (
                *(str(part.number), part.path, str(part.start), human_size(part.size)),
                *(part.type or "-", part.name or "-", part.uuid or "-"),
            )
            for part in device.partitions
        ]
        print()
        print_table(titles, rows)
