# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What commands print: text that cannot harm a terminal, tables, JSON."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopdev._value import Value


def printable(text: str) -> str:
    r"""Return text for a terminal: control characters and bytes that are no UTF-8 as \xNN."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_printable, text))


def _printable(character: str) -> str:
    if character.isprintable() and not "\udc80" <= character <= "\udcff":
        return character
    raw = character.encode("utf-8", "surrogateescape")
    return "".join(f"\\x{byte:02x}" for byte in raw)


def human_size(count: int) -> str:
    """Return a size as people read it: 1.5G, 512K, 17B."""
    value = float(count)
    for suffix in ("B", "K", "M", "G", "T", "P"):
        if round(value, 1) < 1024 or suffix == "P":
            break
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + suffix


def show(line: str) -> None:
    """Print a line; what the terminal's encoding has no character for is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns; those of a title that begins with ">" are aligned to the right."""
    names = [title.lstrip(">") for title in titles]
    cells = [names, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    for row in cells:
        aligned = [
            cell.rjust(width) if title.startswith(">") else cell.ljust(width)
            for cell, width, title in zip(row, widths, titles, strict=True)
        ]
        show("  ".join(aligned).rstrip())


def print_json(value: object) -> None:
    r"""Print values as JSON; names that are no UTF-8 keep their bytes as \udcNN."""
    import json

    print(json.dumps(value, indent=2, default=_plain))


def _plain(value: Value) -> dict[str, object]:
    return value.as_dict()
