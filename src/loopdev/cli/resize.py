# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev resize``."""

from __future__ import annotations

from loopdev.cli._args import JSON, Args, Operand
from loopdev.cli._devices import DEVICE_HELP, opened

HELP = "take over the size of a backing file that grew or shrank"
OPERANDS = (Operand("DEVICE", DEVICE_HELP, many="+", kind="device"),)
OPTIONS = (JSON,)
EXAMPLES = "  truncate -s 2G disk.img && loopdev resize disk.img"


def run(args: Args) -> int:
    """Print each device and its new size in bytes."""
    sizes = {device.path: device.refresh_size() for device in opened(args.device)}
    if args.json:
        from loopdev.cli._output import print_json

        print_json([{"path": path, "size": size} for path, size in sizes.items()])
        return 0
    for path, size in sizes.items():
        print(path, size)
    return 0
