# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev key``."""

from __future__ import annotations

from loopdev.cli._args import JSON, Args, Operand, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.images.pbs.keyfile import KeyInfo

_KDFS = ("none", "scrypt")


def kdf(text: str) -> str:
    """Return how a password becomes a key."""
    if text not in _KDFS:
        raise ValueError(text)
    return text


HELP = "make a key that encrypts snapshots, or show what a key file tells"
OPERANDS = (
    Operand(
        "ACTION", "create: make a key; show: print what the file tells", choices=("create", "show")
    ),
    Operand("FILE", "the key file", kind="file"),
)
OPTIONS = (
    Option(
        *("--kdf",),
        convert=kdf,
        default="scrypt",
        metavar="none|scrypt",
        help="scrypt, the default: the new key has a password; none: it has not",
    ),
    Option("--hint", convert=str, metavar="TEXT", help="what reminds of the password; not secret"),
    JSON,
)
EXAMPLES = """\
  loopdev key create key.json              ask for a password, twice
  loopdev key create --kdf none key.json   who has the file has the key
  loopdev key show key.json                fingerprint, hint, ...; nothing secret"""


def run(args: Args) -> int:
    """Make or show a key."""
    from loopdev.images.pbs.keyfile import check_new, create_key, show_key

    if args.action == "show":
        _print(show_key(args.file), args.json)
        return 0
    password = None
    if args.kdf != "none":
        from loopdev.images.pbs.passwords import new_password

        check_new(args.file)  # before somebody thinks of a password
        password = new_password()
    _print(create_key(args.file, password, args.hint), args.json)
    return 0


def _print(info: KeyInfo, as_json: bool) -> None:
    from loopdev.cli._output import print_json, printable, show

    if as_json:
        print_json(info)
        return
    for name, value in info.as_dict().items():
        if value is not None:
            show(f"{name}: {printable(str(value))}")
