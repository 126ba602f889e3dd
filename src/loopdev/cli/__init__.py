# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The command ``loopdev``: this module finds the subcommand, and loads nothing else.

Each subcommand is a module of its name, with HELP, OPERANDS, OPTIONS, EXAMPLES and run(args).
Starting the interpreter is most of what a command costs, so argparse is loaded only for help,
errors and completion; see ``_args``.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not signal: that imports enum, for a quarter of the interpreter's start-up
import errno
import os
import sys

from loopdev.errors import LoopdevError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType
    from typing import NoReturn

COMMANDS = (
    "attach",
    "detach",
    "list",
    "info",
    "holders",
    "resize",
    "rescan",
    "remove",
    "map",
    "unmap",
    "maps",
    "gc",
    "snapshots",
    "verify",
    "pack",
    "key",
    "serve",
    "completion",
)


class Signalled(BaseException):
    """A signal asked the command to end; what was begun is undone on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def entry() -> NoReturn:
    """Run the command as a process of its own.

    The interpreter's tear-down costs as much as all our imports, and there is nothing to tear
    down: what was printed is flushed, and descriptors are the kernel's to close.
    """
    os._exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: The arguments without the program's name; None: those of the process.
    """
    try:
        for number in (_signal.SIGTERM, _signal.SIGHUP, _signal.SIGINT):
            if _signal.getsignal(number) != _signal.SIG_IGN:
                _signal.signal(number, _end)
        with_descriptors()
        code = _run([*(sys.argv[1:] if argv is None else argv)])
        sys.stdout.flush()
    except Signalled as signal:
        return 128 + signal.number
    except LoopdevError as exc:
        return fail(exc)
    except OSError as exc:
        return _output_failed(exc)
    return code


def fail(exc: LoopdevError) -> int:
    """Print an error for people and return its exit code."""
    from loopdev.cli._output import printable

    complain(f"loopdev: {printable(str(exc))}")
    return exc.exit_code


def complain(line: str) -> None:
    """Print a message to standard error, if there is one."""
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)


class Closed:
    """Standard output for who was started without one: to print to it is an error."""

    def write(self, text: str) -> int:
        """Refuse."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), text)

    def flush(self) -> None:
        """Do nothing: nothing was written."""


def with_descriptors() -> None:
    """Have something behind descriptors 0 to 2, so that no device or image gets one of them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = Closed()


def _run(argv: list[str]) -> int:
    from loopdev.cli._args import load, quick_parse

    if argv and argv[0] in COMMANDS:
        command = load(argv[0])
        args = quick_parse(command, argv[1:])
        if args is not None:
            return command.run(args)
    from loopdev.cli._full import full_parse

    command, args = full_parse(argv)
    return command.run(args)


def _end(number: int, _frame: FrameType | None) -> None:
    raise Signalled(number)


def _output_failed(exc: OSError) -> int:
    """Say that standard output could not be written; a reader that left is no failure of ours."""
    # What is still in the buffer would fail again when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if exc.errno == errno.EPIPE:
        return 128 + int(_signal.SIGPIPE)
    complain(f"loopdev: standard output: {exc.strerror}")
    return LoopdevError.exit_code
