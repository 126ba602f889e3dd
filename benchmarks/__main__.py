# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Measure loopdev beside its peers, in one run, and print a table of ratios.

Usage: python benchmarks [--rounds N] [ROW...]
"""

from __future__ import annotations

import argparse
import compileall
import os
import sys
import tempfile
from pathlib import Path

import attach_cycle
import broker_cycle
import command_start
import list_many
import map_kill
import map_memory
import map_raw
import map_server
import map_start
import map_store
import pack
import read_cold
import storm
from measure import Row, print_rows

ROWS = {
    "attach": attach_cycle.measure,
    "storm": storm.measure,
    "command": command_start.measure,
    "read": read_cold.measure,
    "list": list_many.measure,
    "pack": pack.measure,
    "map-raw": map_raw.measure,
    "map-store": map_store.measure,
    "map-start": map_start.measure,
    "map-memory": map_memory.measure,
    "map-kill": map_kill.measure,
    "map-server": map_server.measure,
    "broker": broker_cycle.measure,
}


def main() -> int:
    """Run the rows asked for; exits with 1 where one falls short."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)} (all)")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of runs of each row (15)")
    args = parser.parse_args()
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if os.geteuid() != 0:
        parser.error("needs root, for loop devices")
    # An installed package has its bytecode; so shall the one that is measured.
    compileall.compile_dir(Path(__file__).parent.parent / "src", quiet=1)
    found: list[Row] = []
    # Not below /tmp, which may be in memory: images lie on disks.
    with tempfile.TemporaryDirectory(prefix="loopdev-bench-", dir="/var/tmp") as directory:
        for name in args.rows or ROWS:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found += ROWS[name](Path(directory), args.rounds)
    print_rows(found)
    return 0 if all(row.reached for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
