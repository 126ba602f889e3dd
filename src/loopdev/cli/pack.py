# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev pack``."""

from __future__ import annotations

from loopdev.cli._args import JSON, Args, Operand, Option
from loopdev.cli._datastore import DIRECTORY, KEYFILE, NAMESPACE, positive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev import PackProgress, PackResult


def moment(text: str) -> int:
    """Return Unix seconds: a number, or a time as snapshots have it in their names."""
    from loopdev.images.pbs.names import parse_time

    seconds = int(text) if text.isascii() and text.isdecimal() else parse_time(text)
    if seconds is None:
        raise ValueError(text)
    return seconds


def level(text: str) -> int:
    """Return a compression level."""
    if not text.isascii() or not text.isdecimal():
        raise ValueError(text)
    return int(text)


HELP = "pack images into a new snapshot in a datastore"
OPERANDS = (Operand("IMAGE", "a file or block device; NAME=IMAGE names it", many="+", kind="file"),)
OPTIONS = (
    DIRECTORY,
    Option("--id", convert=str, metavar="GROUP", help="whose snapshot it is, such as vm/100"),
    NAMESPACE,
    Option(
        *("--time",),
        convert=moment,
        metavar="TIME",
        help="the snapshot's time: 2024-01-02T03:04:05Z, or Unix seconds (default: now)",
    ),
    KEYFILE,
    Option(
        *("--crypt-mode",),
        convert=str,
        metavar="MODE",
        help="encrypt, sign-only or none (default: encrypt if there is a key)",
    ),
    Option("--level", convert=level, default=1, metavar="N", help="of zstd, 0 to 22 (default: 1)"),
    Option(
        *("--jobs",),
        convert=positive,
        metavar="N",
        help="how many chunks to pack at once (default: one for each processor)",
    ),
    Option("--create-store", help="make the datastore, if DIR is empty or does not exist"),
    JSON,
)
EXAMPLES = """\
  loopdev pack --repository /srv/store --id vm/100 disk.img
  loopdev pack --id vm/100 --keyfile key.json drive-scsi0=/dev/vg/vm-100"""


def run(args: Args) -> int:
    """Pack, and print the images' names for ``loopdev map``."""
    from loopdev.cli._progress import Progress
    from loopdev.errors import InvalidValueError
    from loopdev.images.pbs.pack import pack

    if args.id is None:
        raise InvalidValueError(
            "--id", None, "is missing: say whose snapshot it is, as --id vm/100"
        )
    bar = Progress(0, "pack")

    def report(progress: PackProgress) -> None:
        bar.total = progress.total
        bar.update(progress.done, _share(progress))

    with bar:
        result = pack(
            args.image,
            args.repository,
            args.id,
            namespace=args.ns,
            time=args.time,
            keyfile=args.keyfile,
            crypt_mode=args.crypt_mode,
            level=args.level,
            jobs=args.jobs,
            create_store=args.create_store,
            report=report,
        )
    _print(result, args.json)
    return 0


def _print(result: PackResult, as_json: bool) -> None:
    from loopdev.cli import complain
    from loopdev.cli._output import human_size, print_json, printable, show

    for image in result.images:
        if image.changed:
            complain(f"loopdev: {printable(image.source)} was written to while it was packed")
    if as_json:
        print_json(result)
        return
    for image in result.images:
        show(f"{result.snapshot}/{image.archive}")
    counts = result.counts
    sizes = f"{human_size(counts.total)}, {human_size(counts.read)} of it read"
    written = f"{human_size(counts.written)} written"
    complain(f"loopdev: {sizes}, {_share(counts)}, {written}, {result.seconds:.1f} s")


def _share(counts: PackProgress) -> str:
    """Return how much of the data was there already; zeros say nothing about that."""
    data = counts.reused + counts.new
    return f"{counts.reused / data if data else 1:.0%} there already"
