# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What commands that use a datastore have in common."""

from __future__ import annotations

from loopdev.cli._args import Option

REPOSITORY = Option(
    *("--repository",),
    convert=str,
    metavar="REPOSITORY",
    help="the datastore: a directory, or user@realm@host:store (default: that in PBS_REPOSITORY)",
)
DIRECTORY = Option(
    *("--repository",),
    convert=str,
    metavar="DIR",
    help="the datastore, a directory (default: that in PBS_REPOSITORY)",
)
NAMESPACE = Option(
    "--ns",
    convert=str,
    default="",
    metavar="NAME",
    help="the namespace in the datastore, such as a/b",
)
FINGERPRINT = Option(
    *("--fingerprint",),
    convert=str,
    metavar="HEX",
    help="that of the server's certificate, if that is not valid (default: PBS_FINGERPRINT)",
)
KEYFILE = Option(
    *("--keyfile",),
    convert=str,
    metavar="FILE",
    help="the encryption key; its password is that in PBS_ENCRYPTION_PASSWORD, or is asked for",
)


def positive(text: str) -> int:
    """Return a number above 0."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)
