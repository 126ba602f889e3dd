# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev verify``."""

from __future__ import annotations

from loopdev.cli._args import JSON, Args, Operand, Option
from loopdev.cli._datastore import FINGERPRINT, KEYFILE, NAMESPACE, REPOSITORY, positive
from loopdev.errors import ImageReadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs.verify import Report

HELP = "read and check every chunk of an image in a datastore"
OPERANDS = (
    Operand(
        "IMAGE", "vm/100/2024-01-02T03:04:05Z/drive-scsi0.img, or vm/100/latest/...", kind="image"
    ),
)
OPTIONS = (
    REPOSITORY,
    FINGERPRINT,
    NAMESPACE,
    KEYFILE,
    Option(
        *("--jobs",),
        convert=positive,
        metavar="N",
        help="how many chunks to check at once (default: one for each processor)",
    ),
    JSON,
)
EXAMPLES = "  loopdev verify --repository /srv/store vm/100/latest/drive-scsi0.img"
_OFFSETS_SHOWN = 8


def run(args: Args) -> int:
    """Print what is damaged, or that nothing is."""
    from loopdev.cli._progress import Progress
    from loopdev.images.pbs.resolve import resolve_image
    from loopdev.images.pbs.verify import verify_image

    source = resolve_image(args.image, args.repository, args.ns, args.keyfile, args.fingerprint)
    try:
        image = source.open()
        try:
            with Progress(image.size, "verify") as progress:
                report = verify_image(image, args.jobs, progress.update)
        finally:
            image.close()
    finally:
        source.close()
    if args.json:
        from loopdev.cli._output import print_json

        print_json(report)
    else:
        _print(report)
    return ImageReadError.exit_code if report.damaged else 0


def _print(report: Report) -> None:
    from loopdev.cli._output import human_size, printable, show

    for damage in report.damaged:
        offsets = [str(offset) for offset in damage.offsets[:_OFFSETS_SHOWN]]
        more = len(damage.offsets) - len(offsets)
        rest = f" and {more} more places" if more else ""
        where = f"{damage.length} bytes at {', '.join(offsets)}{rest}"
        show(printable(f"{damage.reason}: {where}"))
    lost = sum(damage.length * len(damage.offsets) for damage in report.damaged)
    state = f"{human_size(lost)} damaged" if report.damaged else "good"
    counts = f"{report.distinct} chunks, {human_size(report.checked)} checked"
    show(printable(f"{report.name}: {human_size(report.size)}, {counts}: {state}"))
