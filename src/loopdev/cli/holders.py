# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev holders``."""

from __future__ import annotations

from loopdev._devices import holders
from loopdev.cli._args import JSON, Args, Operand
from loopdev.cli._devices import DEVICE_HELP, paths_of
from loopdev.cli._output import print_json, print_table

HELP = "show who uses a loop device: mounts, processes, swap, devices on top"
OPERANDS = (Operand("DEVICE", DEVICE_HELP, many="+", kind="device"),)
OPTIONS = (JSON,)
EXAMPLES = "  loopdev holders /dev/loop0"


def run(args: Args) -> int:
    """Print a table, or JSON; nothing where nobody uses it."""
    found = [holder for name in args.device for path in paths_of(name) for holder in holders(path)]
    if args.json:
        print_json(found)
    elif found:
        rows = [
            (
                holder.device,
                holder.kind,
                "-" if holder.pid is None else str(holder.pid),
                holder.name,
            )
            for holder in found
        ]
        print_table(("DEVICE", "KIND", ">PID", "NAME"), rows)
    return 0
