# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev attach``."""

from __future__ import annotations

import sys

from loopdev._attach import attach
from loopdev.cli._args import JSON, Args, Operand, Option, number, on_off, seconds, size

HELP = "attach a file or block device, and print the loop device"
OPERANDS = (Operand("FILE", "the disk image, or a block device", kind="file"),)
OPTIONS = (
    Option("-o", "--offset", convert=size, default=0, metavar="SIZE", help="start here in FILE"),
    Option(
        *("--sizelimit",),
        convert=size,
        default=0,
        metavar="SIZE",
        help="show no more than this much of FILE (default: to its end)",
    ),
    Option(
        *("-b", "--sector-size"),
        convert=size,
        metavar="SIZE",
        help="logical sector size (default: that of FILE's GPT, else the kernel's choice)",
    ),
    Option("-P", "--partscan", help="make a node for each partition"),
    Option("-r", "--read-only", help="take no writes"),
    Option(
        *("--direct-io",),
        convert=on_off,
        metavar="on|off",
        implied="on",
        help="read and write FILE past the page cache (default: where FILE can)",
    ),
    Option("--loop-ref", convert=str, metavar="TEXT", help="free text to know the device by"),
    Option(
        *("-n", "--number"),
        convert=number,
        metavar="N",
        help="this loop device, added if it does not exist (default: any that is free)",
    ),
    Option("--reuse", help="print the device that has FILE already, if one has"),
    Option("--force", help="take a FILE whose size is no multiple of the sector size"),
    Option("--no-lock", help="let udev probe the device while partitions are set up"),
    Option(
        *("--timeout",),
        convert=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to look for a free device (default: 30)",
    ),
    Option(
        *("--broker",),
        convert=str,
        metavar="SOCKET",
        help="have a broker do it; the device stays until this command ends",
    ),
    Option(
        *("--nodes",),
        convert=str,
        metavar="DIRECTORY",
        help="with --broker: where its nodes are made (default: /dev, or a new directory)",
    ),
    JSON,
)
EXAMPLES = """\
  loopdev attach disk.img                  print /dev/loop0
  loopdev attach -P disk.img               with /dev/loop0p1, /dev/loop0p2, ...
  loopdev attach -r -o 1MiB disk.img       read-only, from the second MiB on
  loopdev attach --broker SOCKET disk.img &    without privileges, until it is killed"""


def run(args: Args) -> int:
    """Attach, and print the device; it stays until it is detached."""
    if args.broker is not None or args.nodes is not None:
        from loopdev.cli._broker import attach_by_broker

        return attach_by_broker(args)
    device = attach(
        args.file,
        offset=args.offset,
        sizelimit=args.sizelimit,
        sector_size=args.sector_size,
        read_only=args.read_only,
        partscan=args.partscan,
        direct_io=args.direct_io,
        persist=True,
        loop_ref=args.loop_ref,
        number=args.number,
        reuse=args.reuse,
        timeout=args.timeout,
        lock=False if args.no_lock else None,
        force=args.force,
    )
    try:
        if args.json:
            from loopdev._devices import info
            from loopdev.cli._output import print_json

            print_json(info(device))
        else:
            print(device.path)
        sys.stdout.flush()
    except BaseException:
        # Nobody learnt its name: it would stay for ever. (One that was there before is known.)
        if device.created:
            device.detach()
        device.close()
        raise
    device.close()
    return 0
