# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev map``."""

from __future__ import annotations

import sys

from loopdev.cli._args import JSON, Args, Operand, Option, seconds, size
from loopdev.cli._datastore import FINGERPRINT, KEYFILE, NAMESPACE, REPOSITORY, positive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.mapping._map import Mapping

HELP = "make a read-only loop device of a disk in a backup, and print it"
OPERANDS = (
    Operand(
        "SOURCE",
        "what loopdev snapshots lists (vm/100/2026-10-05T08:57:58Z/drive-scsi0.img; latest may"
        " stand for the time), or a raw image, a file or block device",
        kind="source",
    ),
)
OPTIONS = (
    REPOSITORY,
    FINGERPRINT,
    NAMESPACE,
    KEYFILE,
    Option(
        "--name", convert=str, metavar="NAME", help="call the map so (default: after the image)"
    ),
    Option("-P", "--partscan", help="make a node for each partition of a GPT or MBR"),
    Option(
        *("-b", "--sector-size"),
        convert=size,
        metavar="SIZE",
        help="logical sector size (default: that of the image's GPT, else 512)",
    ),
    Option(
        *("--workers",),
        convert=positive,
        metavar="N",
        help="how many processes serve it (default: one for each core)",
    ),
    Option(
        *("--cache-limit",),
        convert=size,
        default=256 << 20,
        metavar="SIZE",
        help="how much of the image is kept unpacked in memory (default: 256MiB)",
    ),
    Option(
        *("--io-timeout",),
        convert=seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long a read may take before it fails (default: 60)",
    ),
    Option(
        *("--log",),
        convert=str,
        metavar="journal|FILE",
        help="where its processes report (default: the journal, else /var/log/loopdev/NAME.log)",
    ),
    Option("--once", help="if the image is mapped already, print that device"),
    Option(
        *("--foreground", "--verbose"),
        help="stay until the map ends, report here, and unmap on Ctrl-C",
    ),
    JSON,
)
EXAMPLES = """\
  loopdev map --repository /srv/store vm/100/latest/drive-scsi0.img     the newest backup
  loopdev map -P --keyfile key.json vm/100/latest/drive-scsi0.img       an encrypted one
  loopdev map pbs://backup@pbs@host:8007/store/vm/100/latest/drive-scsi0.img   from a server
  mount -o ro,noload /dev/loop0p1 /mnt                                  ext4 in it; see man loopdev
  umount /mnt; loopdev unmap /dev/loop0"""


def run(args: Args) -> int:
    """Map, and print the device; it stays until it is unmapped."""
    from loopdev.mapping._map import map_image

    mapping = map_image(
        args.source,
        repository=args.repository,
        namespace=args.ns or None,
        keyfile=args.keyfile,
        fingerprint=args.fingerprint,
        name=args.name,
        partscan=args.partscan,
        sector_size=args.sector_size,
        workers=args.workers,
        cache_limit=args.cache_limit,
        io_timeout=args.io_timeout,
        log="stderr" if args.foreground and args.log is None else args.log,
        persist=not args.foreground,
        once=args.once,
    )
    try:
        _print(mapping, args.json)
    except BaseException:
        # Nobody learnt its name: it would stay for ever. (One that was there before is known.)
        if mapping.created:
            mapping.unmap()
        raise
    if args.foreground and mapping.created:
        return _stay(mapping)
    mapping.close()
    return 0


def _print(mapping: Mapping, as_json: bool) -> None:
    if as_json:
        from loopdev.cli._output import print_json
        from loopdev.mapping._maps import map_info

        print_json(map_info(mapping.name))
    else:
        print(mapping.device.path)
    sys.stdout.flush()


def _stay(mapping: Mapping) -> int:
    """Wait until the map ends, or unmap it when a signal asks for that."""
    from loopdev.cli import Signalled, fail
    from loopdev.errors import DeviceBusyError, NotMappedError

    while True:
        mapping.device.close()  # who holds it open keeps others from unmapping it
        try:
            mapping.wait()
        except Signalled:
            try:
                mapping.unmap()
            except DeviceBusyError as exc:
                fail(exc)
                continue  # its users would lose it
            except NotMappedError:
                pass  # somebody else was quicker
        return 0
