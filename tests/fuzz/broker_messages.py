# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The broker's parsers under atheris, which is no dependency: ``pip install atheris``.

Usage: python tests/fuzz/broker_messages.py [-max_total_time=60] [CORPUS]
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports():
    from loopdev.broker import messages
    from loopdev.errors import LoopdevError, RemoteProtocolError


def one(data: bytes) -> None:
    """Parse bytes as a request and as a reply: a value, or the error that is documented."""
    try:
        request = messages.parse_request(data)
    except RemoteProtocolError:
        pass
    else:
        assert messages.parse_request(messages.encode_request(request)) == request
    try:
        messages.parse_reply(data)
    except LoopdevError:
        pass


atheris.Setup(sys.argv, one)
atheris.Fuzz()
