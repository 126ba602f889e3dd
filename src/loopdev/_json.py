# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""JSON, without the module ``json``: that imports re, which costs most of an interpreter's start.

The parser is the same C code; only the Python around it is ours.
"""

from __future__ import annotations

from _json import encode_basestring, make_scanner

from loopdev.errors import ImageFormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPACE = " \t\n\r"


class _Context:
    """How the scanner is to read; see json.decoder.JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> None:
        """Refuse NaN and Infinity."""
        raise ValueError(name)


def parse_object(data: bytes, path: str | None = None) -> dict[str, Any]:
    """Return the JSON object in *data*.

    Raises:
        ImageFormatError: It is none.
    """
    try:
        text = data.decode()
        start = len(text) - len(text.lstrip(_SPACE))
        value, end = make_scanner(_Context)(  # type: ignore[arg-type]
            text, start
        )
        if "\\u" in text:
            _check_text(value)
        if text[end:].strip(_SPACE):
            raise ValueError("something follows")
    except (ValueError, StopIteration, RecursionError) as exc:
        raise ImageFormatError(path, 0, "is not JSON") from exc
    if not isinstance(value, dict):
        raise ImageFormatError(path, 0, "is no JSON object")
    return value


def _check_text(value: object) -> None:
    r"""Raise ValueError for half a character: JSON can escape one (``\ud800``), UTF-8 has none."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for name in value:
            name.encode()
            _check_text(value[name])
    elif isinstance(value, list):
        for inner in value:
            _check_text(inner)


def canonical(value: object) -> str:
    """Return the one text of a value: keys sorted, no white space; what a signature is made of.

    Raises:
        ValueError: It has a null or a fraction in it, which have no such text.
    """
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, dict):
        pairs = sorted(value.items())
        return "{" + ",".join(f"{encode_basestring(k)}:{canonical(v)}" for k, v in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    raise ValueError(value)
