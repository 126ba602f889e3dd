# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev rescan``."""

from __future__ import annotations

from loopdev.cli._args import JSON, Args, Operand
from loopdev.cli._devices import DEVICE_HELP, opened

HELP = "read the partition table again, and make the nodes agree with it"
OPERANDS = (Operand("DEVICE", DEVICE_HELP, many="+", kind="device"),)
OPTIONS = (JSON,)
EXAMPLES = "  sfdisk /dev/loop0 < table && loopdev rescan /dev/loop0"


def run(args: Args) -> int:
    """Print the partitions' nodes, or JSON."""
    found = [part for device in opened(args.device) for part in device.rescan()]
    if args.json:
        from loopdev.cli._output import print_json

        print_json(found)
        return 0
    for part in found:
        print(part.path)
    return 0
