# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev completion``."""

from __future__ import annotations

from loopdev.cli._args import Args, Operand
from loopdev.errors import LoopdevError

HELP = "print the script that completes loopdev's arguments in a shell"
OPERANDS = (Operand("SHELL", "bash, zsh or fish", choices=("bash", "zsh", "fish")),)
OPTIONS = ()
EXAMPLES = "  loopdev completion bash > /etc/bash_completion.d/loopdev"


class MissingExtraError(LoopdevError):
    """A feature needs a library that is an extra of this package.

    Attributes:
        extra: Its name.
    """

    def __init__(self, extra: str) -> None:
        super().__init__(extra)
        self._call = (extra,)
        self.extra = extra

    def __str__(self) -> str:
        return f"this needs the extra {self.extra!r}: pip install 'loopdev[{self.extra}]'"


def run(args: Args) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as exc:
        raise MissingExtraError("completion") from exc
    from loopdev.cli._full import make_parser

    print(shtab.complete(make_parser(completion=True), shell=args.shell))
    return 0
