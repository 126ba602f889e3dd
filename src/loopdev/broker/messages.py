# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the broker and its clients say to each other: bytes in, values out.

docs/broker-protocol.md is the specification. Nothing here opens or sends anything; descriptors
travel beside a message. A request is checked to the last field before anybody acts on it: what is
not in the tables below is refused, since a sender who means something by it would be misled.
"""

from __future__ import annotations

import json

from loopdev import errors
from loopdev._value import Value
from loopdev.errors import LoopdevError, RemoteProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from loopdev._holders import Holder

    Json = dict[str, object]
    Check = Callable[[object], bool]

VERSION = 1
# Bytes. Every request fits many times; a reply may describe 255 partitions.
MAX_REQUEST = 16384
MAX_REPLY = 192 << 10
# The kernel's limit of descriptors in one message is 253; no request needs more than these.
MAX_DESCRIPTORS = 2
# Devices in one reply to "list", and bytes of them: a path may have 4095, escaped six times that.
PAGE = 100
_PAGE_BYTES = 96 << 10

_SPACE = " \t\r\n"
_MAX_SIZE = (1 << 63) - 1
_MAX_U64 = (1 << 64) - 1
# More seconds than anybody waits for a device that is in use.
_MAX_TIMEOUT = 60


class Hello(Value):
    """Asks for the version, the features and the sender's limits."""

    op = "hello"


class Attach(Value):
    """Asks for a device of the first descriptor sent along.

    Attributes:
        offset: As for :func:`loopdev.attach`; so are those up to force.
        directory: A second descriptor is the directory that gets the nodes.
        want_fd: The reply brings a descriptor of the device.
        lock: Hold an exclusive flock on the device for as long as it lives.
    """

    op = "attach"

    offset: int = 0
    sizelimit: int = 0
    sector_size: int | None = None
    read_only: bool = False
    partscan: bool = False
    direct_io: bool | None = None
    force: bool = False
    directory: bool = False
    want_fd: bool = False
    lock: bool = False


class _OfDevice(Value):
    number: int
    diskseq: int | None


class Detach(_OfDevice):
    """Asks to detach a device of this connection.

    Attributes:
        number: The device.
        diskseq: The attachment; null on a kernel that has none.
        timeout: Seconds to wait for others to close it.
    """

    op = "detach"

    number: int
    diskseq: int | None
    timeout: float = 5.0


class Resize(_OfDevice):
    """Asks to take over the size of a backing file that grew or shrank."""

    op = "resize"

    number: int
    diskseq: int | None


class Sync(_OfDevice):
    """Asks to write everything to the backing file, and that to its disk."""

    op = "sync"

    number: int
    diskseq: int | None


class List(Value):
    """Asks for the devices of the sender's user; root is told of all.

    Attributes:
        after: Only numbers above this one: a reply holds 100 devices.
    """

    op = "list"

    after: int = -1


# What an attach asks for when it says nothing.
BY_DEFAULT = Attach().as_dict()


def is_plain(request: Attach) -> bool:
    """Return whether nothing is asked for but a device that the host alone can open."""
    return not (request.directory or request.partscan or request.want_fd)


Request = Hello | Attach | Detach | Resize | Sync | List
_KINDS: dict[str, type[Request]] = {
    "hello": Hello,
    "attach": Attach,
    "detach": Detach,
    "resize": Resize,
    "sync": Sync,
    "list": List,
}


def _integer(least: int, most: int) -> Check:
    # type(), since True is an int to isinstance().
    return lambda value: type(value) is int and least <= value <= most


def _flag(value: object) -> bool:
    return value is True or value is False


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _seconds(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MAX_TIMEOUT  # type: ignore[operator]


_CHECKS: dict[str, tuple[Check, str]] = {
    "offset": (_integer(0, _MAX_SIZE), "must be bytes, from 0 to 2^63 - 1"),
    "sizelimit": (_integer(0, _MAX_SIZE), "must be bytes, from 0 to 2^63 - 1"),
    "sector_size": (_optional(_integer(1, 1 << 20)), "must be bytes, or null"),
    "direct_io": (_optional(_flag), "must be true, false or null"),
    "number": (_integer(0, (1 << 20) - 1), "must be from 0 to 2^20 - 1"),
    "after": (_integer(-1, (1 << 20) - 1), "must be from -1 to 2^20 - 1"),
    "diskseq": (_optional(_integer(0, _MAX_U64)), "must be from 0 to 2^64 - 1, or null"),
    "timeout": (_seconds, f"must be seconds, from 0 to {_MAX_TIMEOUT}"),
}
for _name in ("read_only", "partscan", "force", "directory", "want_fd", "lock"):
    _CHECKS[_name] = (_flag, "must be true or false")


def _decode(data: bytes | memoryview, limit: int) -> Json:
    """Return the object in a message.

    Raises:
        RemoteProtocolError: It is none.
    """
    if len(data) > limit:
        raise RemoteProtocolError(f"more than {limit} bytes")
    try:
        text = str(data, "utf-8").strip(_SPACE)
        # What decode() does, without its regular expressions.
        message, end = _DECODER.scan_once(text, 0)  # type: ignore[attr-defined]
    except (ValueError, StopIteration, RecursionError) as exc:
        raise RemoteProtocolError("not a JSON object in UTF-8") from exc
    if end != len(text):
        raise RemoteProtocolError("more than one JSON object")
    if not isinstance(message, dict):
        raise RemoteProtocolError("not a JSON object")
    if type(message.get("v")) is not int or message["v"] != VERSION:
        raise RemoteProtocolError(f'"v" must be {VERSION}')
    return message


def _pairs(pairs: list[tuple[str, object]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    return found


def _no_constant(name: str) -> object:
    raise ValueError(name)


# Made once: json.loads() and json.dumps() make new ones whenever they are told how.
_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_constant)
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _encode(message: Json) -> bytes:
    return _ENCODER.encode({"v": VERSION, **message}).encode()


def encode_request(request: Request) -> bytes:
    """Return the message of a request; what is as it is by default is left out."""
    kind = type(request)
    fields = {
        name: value
        for name, value in vars(request).items()
        if not hasattr(kind, name) or value != getattr(kind, name)
    }
    return _encode({"op": request.op, **fields})


def parse_request(data: bytes | memoryview) -> Request:
    """Return the request in a message.

    Raises:
        RemoteProtocolError: It is none.
    """
    message = _decode(data, MAX_REQUEST)
    op = message.get("op")
    kind = _KINDS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise RemoteProtocolError(f'"op" must be one of {", ".join(_KINDS)}')
    del message["v"], message["op"]
    fields = kind.__annotations__
    for name, value in message.items():
        if name not in fields:
            raise RemoteProtocolError(f"{op} has no field {ascii(name)[:40]}")
        _check(name, value)
    for name in fields:
        if name not in message and not hasattr(kind, name):
            raise RemoteProtocolError(f'{op} needs "{name}"')
    return kind(**message)  # type: ignore[arg-type]


def _check(name: str, value: object) -> None:
    check, reason = _CHECKS[name]
    if not check(value):
        raise RemoteProtocolError(f'"{name}" {reason}')


def checked(request: Attach) -> Attach:
    """Return a request that we are about to send, after looking at what is in it.

    Raises:
        RemoteProtocolError: Something is out of range.
    """
    for name, value in vars(request).items():
        _check(name, value)
    return request


def encode_result(result: Json) -> bytes:
    """Return the reply that brings a result."""
    return _encode({"result": result})


def page(bodies: Sequence[Json]) -> list[Json]:
    """Return the first of them, as many as one reply takes."""
    left = _PAGE_BYTES
    found: list[Json] = []
    for body in bodies:
        left -= len(_ENCODER.encode(body))
        if found and left < 0:
            break
        found.append(body)
    return found


# The answer to a request of which there is nothing to tell.
DONE = encode_result({})


def encode_error(error: LoopdevError) -> bytes:
    """Return the reply that says what went wrong."""
    kind = type(error).__name__
    if isinstance(error, RemoteProtocolError):
        kind = "LocalProtocolError"  # who sent the request is the one who reads this
    call = getattr(error, "_call", ())
    body = {
        "type": kind,
        "errno": getattr(error, "errno", None),
        "message": str(error),
        "arguments": [_plain(argument) for argument in call],
    }
    return _encode({"error": body})


def _plain(value: object) -> object:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, Value):
        return value.as_dict()
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def parse_reply(data: bytes | memoryview) -> Json:
    """Return the result in a reply.

    Raises:
        LoopdevError: The error in it, of the type that it was on the other side.
        RemoteProtocolError: It is no reply.
    """
    message = _decode(data, MAX_REPLY)
    result, error = message.get("result"), message.get("error")
    if isinstance(error, dict):
        raise _error_of(error)
    if not isinstance(result, dict):
        raise RemoteProtocolError('neither "result" nor "error"')
    return result


def _error_of(body: Json) -> LoopdevError:
    """Return the exception that a reply describes."""
    kind = getattr(errors, str(body.get("type")), None)
    arguments = body.get("arguments")
    if isinstance(kind, type) and issubclass(kind, LoopdevError) and isinstance(arguments, list):
        try:
            made = kind(*arguments)
            if isinstance(made, errors.DeviceBusyError):
                made.holders = tuple(_holder(item) for item in made.holders)
            str(made)
        except (TypeError, ValueError, AttributeError):
            pass  # a newer broker's error, made of other things
        else:
            return made
    return LoopdevError(str(body.get("message", "the broker names no reason")))


def _holder(body: object) -> Holder:
    from loopdev._holders import Holder

    if not isinstance(body, dict):
        raise TypeError(body)
    return Holder(**body)
