# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev completion``."""

from __future__ import annotations

from loopdev.cli._args import Args, Operand
from loopdev.errors import MissingExtraError

HELP = "print the script that completes loopdev's arguments in a shell"
OPERANDS = (Operand("SHELL", "bash, zsh or fish", choices=("bash", "zsh", "fish")),)
OPTIONS = ()
EXAMPLES = """\
  loopdev completion bash > /etc/bash_completion.d/loopdev
  loopdev completion zsh > /usr/local/share/zsh/site-functions/_loopdev
  loopdev completion fish > /etc/fish/completions/loopdev.fish"""


def run(args: Args) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError as exc:
        raise MissingExtraError("completion") from exc
    from loopdev.cli._completions import PREAMBLE
    from loopdev.cli._full import make_parser

    parser = make_parser(completion=True)
    script = shtab.complete(parser, shell=args.shell, preamble=PREAMBLE[args.shell])
    if args.shell == "zsh":
        # Of operands that may be many, shtab lets zsh complete the first one alone.
        script = script.replace('"(*)::', '"*:').replace('"(*):', '"*:')
    print(script)
    return 0
