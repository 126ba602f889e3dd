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
    print(_corrected(script, args.shell))
    return 0


def _corrected(script: str, shell: str) -> str:
    """Return a script of shtab's with what it leaves out."""
    import re

    if shell == "bash":
        return re.sub("(?m)^(complete .*-F )_shtab_loopdev ", r"\1_loopdev ", script)
    if shell == "zsh":
        # Of operands that may be many, zsh would complete the first one alone.
        script = script.replace('"(*)::', '"*:').replace('"(*):', '"*:')
        # A value may stand behind the option, or in the same word.
        script = re.sub(r'(?m)^  "(--[a-z-]+)(\[.*\]:)', r'  "\1=\2', script)
        return re.sub(r'(?m)^  {(-\w),(--[a-z-]+)}("\[.*\]:)', r"  {\1+,\2=}\3", script)
    return script
