# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev maps``."""

from __future__ import annotations

from loopdev.cli._args import JSON, Args
from loopdev.cli._output import human_size, print_json, print_table

HELP = "list what is mapped, and how it is used"
OPERANDS = ()
OPTIONS = (JSON,)
EXAMPLES = """\
  loopdev maps                             a table
  loopdev maps --json                      with all counters, for a program"""
_TITLES = (
    *("NAME", "DEVICE", ">SIZE", "STATUS", ">REQUESTS", ">READ", ">HITS"),
    *(">ERRORS", ">RESTARTS", ">UPTIME", "SOURCE"),
)


def run(args: Args) -> int:
    """Print a table, or JSON."""
    from loopdev.mapping._maps import maps

    found = maps()
    if args.json:
        print_json(found)
    elif found:
        rows = [
            (
                *(info.name, info.device or "-", human_size(info.size)),
                info.status if info.reason is None else f"{info.status}: {info.reason}",
                *(str(info.requests), human_size(info.bytes), _share(info.hits, info.misses)),
                *(str(info.errors), str(info.restarts), _duration(info.uptime), info.source),
            )
            for info in found
        ]
        print_table(_TITLES, rows)
    return 0


def _share(hits: int, misses: int) -> str:
    return f"{hits / (hits + misses):.0%}" if hits + misses else "-"


def _duration(uptime: float) -> str:
    hours, rest = divmod(int(uptime), 3600)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{rest // 60:02}:{rest % 60:02}"
