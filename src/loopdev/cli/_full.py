# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The argparse parser of all subcommands: for help, mistakes and completion."""

from __future__ import annotations

import argparse

import loopdev
from loopdev.cli import COMMANDS
from loopdev.cli._args import Args, load
from loopdev.cli._output import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from loopdev.cli._args import Command, Operand, Option

_EPILOG = """\
exit codes:
  0  done                              5  permission denied
  1  failed for another reason         6  the file, its partition table or the image
  2  wrong arguments                      is damaged or cannot be used
  3  no such device, file, snapshot    7  no free device, or it took too long
     or map, or it is not bound        8  no key, the wrong key or password
  4  the device is in use (by whom is  9  a server cannot be reached, or fails
     said), or a map's name is taken   128+N  ended by signal N

SIZE takes K, M, G, ... or KiB, MiB, ... (powers of 1024) and KB, MB, ... (powers of 1000)."""


# What shtab completes the values of options by.
_VALUES = {"DIR": "DIRECTORY", "REPOSITORY": "DIRECTORY", "FILE": "FILE", "journal|FILE": "FILE"}


def full_parse(argv: Sequence[str]) -> tuple[Command, Args]:
    """Return the subcommand and its arguments; exits with 2 on a mistake, with 0 after help."""
    words = [*argv]
    if words and words[0] in COMMANDS:
        words[1:] = _options_first(load(words[0]), words[1:])
    values = vars(make_parser().parse_args(words))
    return load(values.pop("command")), Args(values)


def _options_first(command: Command, argv: Sequence[str]) -> list[str]:
    """Return the arguments as argparse wants them.

    It does not take operands on both sides of an option, and takes the word behind an option for
    its value even if that may be left out.
    """
    options = {name: option for option in command.OPTIONS for name in option.names}
    first: list[str] = []
    operands: list[str] = []
    rest = iter(argv)
    for word in rest:
        option = options.get(word)
        if word == "--":
            operands += ["--", *rest]
        elif option is not None and option.implied is not None:
            first.append(f"{word}={option.implied}")
        elif option is not None and option.convert is not None:
            first += [word, *([value] if (value := next(rest, None)) is not None else [])]
        elif word.startswith("-") and word != "-":
            first.append(word)
        else:
            operands.append(word)
    return first + operands


class _Parser(argparse.ArgumentParser):
    """argparse's, with messages that cannot harm a terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def make_parser(completion: bool = False) -> argparse.ArgumentParser:
    """Return the parser.

    Args:
        completion: Mark the operands for shtab.
    """
    parser = _Parser(
        prog="loopdev",
        description="Any disk image as a Linux block device: without a race, and without a leak.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"loopdev {loopdev.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = load(name)
        sub = commands.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=f"examples:\n{command.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for operand in command.OPERANDS:
            _add_operand(sub, operand, completion)
        for option in command.OPTIONS:
            _add_option(sub, option, completion)
    return parser


def _add_operand(parser: argparse.ArgumentParser, operand: Operand, completion: bool) -> None:
    action = parser.add_argument(
        operand.dest,
        metavar=operand.name,
        help=operand.help,
        nargs=operand.many or None,
        choices=operand.choices or None,
    )
    if completion and operand.kind:
        import shtab

        from loopdev.cli._completions import ACTIONS

        action.complete = ACTIONS.get(operand.kind, shtab.FILE)  # type: ignore[attr-defined]


def _add_option(parser: argparse.ArgumentParser, option: Option, completion: bool) -> None:
    if option.convert is None:
        parser.add_argument(*option.names, dest=option.dest, action="store_true", help=option.help)
        return
    action = parser.add_argument(
        *option.names,
        dest=option.dest,
        type=_typed(option.convert, option.metavar),
        default=option.default,
        metavar=option.metavar,
        nargs="?" if option.implied is not None else None,
        help=option.help,
    )
    if completion and (kind := _VALUES.get(option.metavar)) is not None:
        import shtab

        action.complete = getattr(shtab, kind)  # type: ignore[attr-defined]


def _typed(convert: Callable[[str], object], metavar: str) -> Callable[[str], object]:
    def typed(text: str) -> object:
        try:
            return convert(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"not a valid {metavar}: {text!r}") from exc

    return typed
