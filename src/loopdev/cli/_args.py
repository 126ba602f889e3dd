# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The arguments of a subcommand, as a table, and the quick way to read them.

The table is read twice: by quick_parse() below, which understands what is written correctly and
imports nothing, and by ``_full``, which makes an argparse parser of it. Whatever the quick one
does not understand, a mistake, ``--help``, it leaves to the other.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    class Command(Protocol):
        """A subcommand's module."""

        HELP: str
        OPERANDS: tuple[Operand, ...]
        OPTIONS: tuple[Option, ...]
        EXAMPLES: str

        def run(self, args: Args) -> int: ...


class Args:
    """Values by name, with dashes as underscores."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Args) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Args({self.__dict__!r})"


class Operand:
    """A positional argument.

    Args:
        name: As in the usage line.
        text: What it is.
        many: One or more ("+"), any number ("*"), or exactly one ("").
        kind: "file", "device", "image", "group", "source" or "map": how it is completed.
        choices: The only values allowed.
    """

    def __init__(
        self, name: str, text: str, many: str = "", kind: str = "", choices: Sequence[str] = ()
    ) -> None:
        self.name, self.help, self.many = name, text, many
        self.kind, self.choices = kind, tuple(choices)

    @property
    def dest(self) -> str:
        """The attribute that holds it."""
        return self.name.lower()


class Option:
    """An option.

    Args:
        names: "-o", "--offset"; the first long one names the attribute.
        help: What it does.
        convert: Makes the value from text, or raises ValueError; None: a flag.
        metavar: How the value is called in help.
        default: What it is when absent.
        implied: What a value that may be left out (``--direct-io[=on]``) then is.
    """

    def __init__(
        self,
        *names: str,
        help: str,
        convert: Callable[[str], object] | None = None,
        metavar: str = "",
        default: object = None,
        implied: str | None = None,
    ) -> None:
        self.names, self.help, self.convert, self.metavar = names, help, convert, metavar
        self.default = False if convert is None else default
        self.implied = implied

    @property
    def dest(self) -> str:
        """The attribute that holds it."""
        return next(name for name in self.names if name.startswith("--"))[2:].replace("-", "_")


def load(name: str) -> Command:
    """Return the module of a subcommand."""
    module = f"loopdev.cli.{name}"
    __import__(module)
    command: Any = sys.modules[module]
    return command  # type: ignore[no-any-return]


def quick_parse(command: Command, argv: Sequence[str]) -> Args | None:
    """Return the arguments if they are beyond doubt; None: ask argparse."""
    options = {name: option for option in command.OPTIONS for name in option.names}
    values: dict[str, object] = {option.dest: option.default for option in command.OPTIONS}
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        name, equals, text = word.partition("=")
        option = options.get(name)
        if option is None or (equals and not name.startswith("--")):
            return None
        if option.convert is None:
            if equals:
                return None
            values[option.dest] = True
            continue
        if not equals:
            text = option.implied if option.implied is not None else next(rest, "-")
            if text.startswith("-"):
                return None
        try:
            values[option.dest] = option.convert(text)
        except ValueError:
            return None
    return _with_operands(command.OPERANDS, words, values)


def _with_operands(
    operands: tuple[Operand, ...], words: list[str], values: dict[str, object]
) -> Args | None:
    for operand in operands:
        if operand.many:
            if operand.many == "+" and not words:
                return None
            values[operand.dest], words = words, []
        elif not words:
            return None
        else:
            values[operand.dest], words = words[0], words[1:]
        if operand.choices and values[operand.dest] not in operand.choices:
            return None
    return None if words else Args(values)


_UNITS = "KMGTPEZY"


def size(text: str) -> int:
    """Return bytes: a number with a suffix as losetup(8) takes them.

    K, M, G, T, P, E, Z, Y (or KiB, MiB, ...) are powers of 1024; KB, MB, ... are powers of 1000.
    The number may be hexadecimal (0x200), or with a suffix have a fraction (1.5K).

    Raises:
        ValueError: It is nothing of that kind.
    """
    if text[:2] in ("0x", "0X"):
        # B and E are digits here, so of the suffixes only K, KiB and their kin can be told.
        digits = text.removesuffix("iB").rstrip("KMGTPZYkmgtpzy")
        point, fraction = "", ""
        value = int(digits, 16) if "_" not in digits else -1
    else:
        digits = text.rstrip("KMGTPEZYkmgtpezyiB")
        whole, point, fraction = digits.partition(".")
        value = int(whole + fraction) if _is_number(whole, point, fraction) else -1
    multiplier = _multiplier(text[len(digits) :])
    if value < 0 or multiplier is None or (point and multiplier == 1):
        raise ValueError(text)
    scale: int = 10 ** len(fraction)
    return value * multiplier // scale


def _is_number(whole: str, point: str, fraction: str) -> bool:
    parts = (whole, fraction) if point else (whole,)
    return all(part.isascii() and part.isdecimal() for part in parts)


def _multiplier(suffix: str) -> int | None:
    if not suffix:
        return 1
    power = _UNITS.find(suffix[0].upper()) + 1
    base = {"": 1024, "iB": 1024, "B": 1000}.get(suffix[1:])
    if power == 0 or base is None:
        return None
    multiplier: int = base**power
    return multiplier


def number(text: str) -> int:
    """Return the number of a loop device: "3", "loop3" or "/dev/loop3"."""
    digits = text.removeprefix("/dev/").removeprefix("loop")
    if not digits.isascii() or not digits.isdecimal():
        raise ValueError(text)
    return int(digits)


def seconds(text: str) -> float:
    """Return a time in seconds, 0 or more."""
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError(text)
    return value


def on_off(text: str) -> bool:
    """Return whether it is on or off."""
    return {"on": True, "off": False}[text] if text in ("on", "off") else _reject(text)


def _reject(text: str) -> bool:
    raise ValueError(text)


JSON = Option("-J", "--json", help="print JSON, for programs")
TIMEOUT_HELP = "seconds to wait"
