# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev gc``."""

from __future__ import annotations

from loopdev.cli._args import JSON, Args
from loopdev.cli._output import print_json, printable

HELP = "remove what is left of maps whose processes are gone: devices, mounts, files"
OPERANDS = ()
OPTIONS = (JSON,)
EXAMPLES = """\
  loopdev gc                               after a crash, or a kill -9 of everything"""


def run(args: Args) -> int:
    """Remove it, and print what it was."""
    from loopdev.mapping._maps import gc

    found = gc()
    if args.json:
        print_json(found)
    else:
        for item in found:
            what = "removed" if item.removed else "left as it is"
            print(printable(f"{item.name}: {item.found}, {what}"))
    return 0
