# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev detach``."""

from __future__ import annotations

from loopdev.cli._args import Args, Operand, Option, seconds
from loopdev.cli._devices import DEVICE_HELP, for_each

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev._device import LoopDevice

HELP = "detach loop devices, and wait until their files are free"
OPERANDS = (Operand("DEVICE", DEVICE_HELP, many="+", kind="device"),)
OPTIONS = (
    Option("--lazy", help="do not wait: detach when the last user leaves"),
    Option(
        *("--timeout",),
        convert=seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long to wait for others to close the device (default: 5)",
    ),
    Option("-J", "--json", help="print the devices that were detached as JSON"),
)
EXAMPLES = """\
  loopdev detach /dev/loop0                wait until disk.img is free, or say who holds it
  loopdev detach disk.img                  every device that has this file
  loopdev detach --lazy 3                  when its last user is gone"""


def run(args: Args) -> int:
    """Detach each; one that fails does not keep the others."""
    done: list[str] = []

    def detach(device: LoopDevice) -> None:
        device.detach(timeout=args.timeout, lazy=args.lazy)
        done.append(device.path)

    code = for_each(args.device, detach)
    if args.json:
        from loopdev.cli._output import print_json

        print_json([{"path": path, "detached": True, "lazy": args.lazy} for path in done])
    return code
