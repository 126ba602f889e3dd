# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev completion``."""

from __future__ import annotations

from loopdev.cli._args import Args, Operand
from loopdev.errors import MissingExtraError

HELP = "print the script that completes loopdev's arguments in a shell"
OPERANDS = (Operand("SHELL", "bash, zsh or fish", choices=("bash", "zsh", "fish")),)
OPTIONS = ()
EXAMPLES = "  loopdev completion bash > /etc/bash_completion.d/loopdev"


def run(args: Args) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as exc:
        raise MissingExtraError("completion") from exc
    from loopdev.cli._completions import PREAMBLE
    from loopdev.cli._full import make_parser

    parser = make_parser(completion=True)
    print(shtab.complete(parser, shell=args.shell, preamble=PREAMBLE[args.shell]))
    return 0
