# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev unmap``."""

from __future__ import annotations

from loopdev.cli._args import Args, Operand, Option, seconds
from loopdev.errors import InvalidValueError, LoopdevError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.mapping._maps import MapInfo

HELP = "unmap images, and wait until their devices are gone; without one, list what is mapped"
OPERANDS = (
    Operand(
        "MAP",
        "a map's name, its device (/dev/loop3), or the number of that (3)",
        many="*",
        kind="map",
    ),
)
OPTIONS = (
    Option("--all", help="unmap all that is mapped"),
    Option("--lazy", help="if it is in use, serve it until its last user leaves"),
    Option("--force", help="fail its reads, now and later, instead of waiting for its users"),
    Option(
        *("--timeout",),
        convert=seconds,
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for its users to leave (default: 10)",
    ),
)
EXAMPLES = """\
  loopdev unmap                            list what is mapped
  loopdev unmap /dev/loop3                 wait for its users, or say who they are
  loopdev unmap --lazy my-backup           it goes when they do
  loopdev unmap --all --force              end it all, whatever hangs"""


def run(args: Args) -> int:
    """Unmap; one that fails does not keep the others. Without a name, list what is mapped."""
    from loopdev.cli import fail
    from loopdev.mapping._maps import maps, unmap

    if args.all and args.map:
        raise InvalidValueError("MAP", args.map[0], "--all is every map; say one or the other")
    if not args.all and not args.map:
        _list(maps())
        return 0
    code = 0
    # The newest first: it may be a map of one that is older.
    newest = sorted(maps(), key=lambda info: info.uptime) if args.all else ()
    for name in [info.name for info in newest] or args.map:
        try:
            unmap(name, timeout=args.timeout, lazy=args.lazy, force=args.force)
        except LoopdevError as exc:
            code = fail(exc)
    return code


def _list(found: list[MapInfo]) -> None:
    """Print what is mapped, as the official client does; but to standard output."""
    from loopdev.cli._output import printable, show

    for info in found:
        source = f"\t{printable(info.source)}" if info.source else ""
        show(f"{info.device or '(unmapped)'}:\t{info.name}{source}")
    if not found:
        show("Nothing mapped.")
