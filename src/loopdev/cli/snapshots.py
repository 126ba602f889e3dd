# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev snapshots``."""

from __future__ import annotations

from loopdev.cli._args import JSON, Args, Operand
from loopdev.cli._datastore import FINGERPRINT, NAMESPACE, REPOSITORY
from loopdev.errors import ImageFormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from loopdev.images.pbs.listing import SnapshotInfo

HELP = "list the snapshots in a datastore, and the images in them"
OPERANDS = (
    Operand("GROUP", "only the snapshots of these, such as vm/100", many="*", kind="group"),
)
OPTIONS = (REPOSITORY, FINGERPRINT, NAMESPACE, JSON)
EXAMPLES = """\
  loopdev snapshots --repository /srv/store          all, in all namespaces
  loopdev snapshots --repository backup@pbs@host:store     on a server
  loopdev snapshots --ns a/b vm/100                  of one machine; PBS_REPOSITORY says where"""
_TITLES = ("IMAGE", ">SIZE", "MODE", "SIGNED", "PROTECTED", "NOTES")


def run(args: Args) -> int:
    """Print a table, or JSON."""
    from loopdev.images.pbs.listing import list_snapshots

    found = list_snapshots(args.repository, args.ns, args.group, args.fingerprint)
    if args.json:
        from loopdev.cli._output import print_json

        print_json(found)
    elif found:
        from loopdev.cli._output import print_table

        print_table(_TITLES, [row for info in found for row in _rows(info)])
    damaged = [info.error for info in found if info.error is not None]
    for error in damaged:
        _complain(error)
    return ImageFormatError.exit_code if damaged else 0


def _rows(info: SnapshotInfo) -> Iterator[tuple[str, ...]]:
    from loopdev.cli._output import human_size

    state = (_yes(info.signed), _yes(info.protected), info.notes.strip().partition("\n")[0])
    for image in info.images:
        yield (image.source, human_size(image.size), image.crypt_mode, *state)
    if not info.images:
        yield (info.snapshot, "-", "-" if info.error is None else "damaged", *state)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _complain(error: str) -> None:
    from loopdev.cli import complain
    from loopdev.cli._output import printable

    complain(f"loopdev: {printable(error)}")
