# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Who may have what: a small TOML file, checked to the last key before it is used.

The first rule that fits a client is its rule; a client that none fits is refused. Limits count for
a user, over all of its connections: a limit of one connection could be had twice by two.
"""

from __future__ import annotations

import os
import re
import stat

from loopdev._value import Value
from loopdev.errors import PolicyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# Numbers that chown(2) cannot be told: -1 means "leave it".
_MAX_ID = (1 << 32) - 2
# What fits the kernel's numbers, and a float's.
_MAX_COUNT = (1 << 63) - 1
_MAX_FILE = 1 << 20
_SIZE = re.compile("[0-9]{1,20}[KMGTP]iB")
_UNITS = {"KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40, "PiB": 50}


class Rule(Value):
    """What some clients may do.

    Attributes:
        uids: Whom it is for, by user; None: it does not say.
        gids: Whom it is for, by group, also a supplementary one; None: it does not say.
        connections: How many at once.
        devices: How many at once; None: no limit.
        bytes: The sizes of all of them together; None: no limit.
        requests_per_second: On the average, a second's worth at once; None: no limit.
        read_only: Devices that cannot be written, and no others.
        partscan: Partitions may be asked for.
        want_fd: A descriptor of the device may be asked for.
        block_devices: A block device may be the backing file.
        lock: Every device is locked for its whole life, so that udev does not look at what is on
            it; a client that locks its device itself then has to wait for ever.
        node_owner: uid and gid of the nodes; None: the client's.
        node_mode: Their permissions.
    """

    uids: frozenset[int] | None = None
    gids: frozenset[int] | None = None
    connections: int = 256
    devices: int | None = 16
    bytes: int | None = None
    requests_per_second: int | None = 1000
    read_only: bool = False
    partscan: bool = True
    want_fd: bool = True
    block_devices: bool = False
    lock: bool = False
    node_owner: tuple[int, int] | None = None
    node_mode: int = 0o600

    def fits(self, uid: int, groups: Collection[int]) -> bool:
        """Return whether it is for this user: all that it says of whom must be so."""
        if self.uids is not None and uid not in self.uids:
            return False
        return self.gids is None or not self.gids.isdisjoint(groups)


class Policy(Value):
    """The rules, in the order in which they are tried.

    Attributes:
        rules: As they are.
        first_number: Devices of the broker have numbers from this one on.
    """

    rules: tuple[Rule, ...]
    first_number: int = 1000

    def rule_for(self, uid: int, groups: Collection[int]) -> Rule | None:
        """Return the rule of a client, None if it is to be refused."""
        return next((rule for rule in self.rules if rule.fits(uid, groups)), None)


# Root alone: it could have every loop device without us.
_ROOT = Rule(
    uids=frozenset({0}),
    connections=1 << 20,
    devices=None,
    requests_per_second=None,
    block_devices=True,
)
DEFAULT = Policy(rules=(_ROOT,))
# Of a client that no rule fits.
NOTHING = Rule(uids=frozenset(), connections=0, devices=0)


def load(path: str) -> Policy:
    """Read a policy file.

    Raises:
        PolicyError: It cannot be read, or is not a policy.
    """
    return _load(path)[0]


def _load(path: str) -> tuple[Policy, tuple[int, int]]:
    """Return the policy in a file, and st_dev and st_ino of that."""
    try:
        # The broker waits for nothing: no pipe, no file without an end.
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PolicyError(path, "is no regular file")
            data = file.read(_MAX_FILE + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as exc:
        reason = "is not UTF-8" if isinstance(exc, UnicodeDecodeError) else exc.strerror
        raise PolicyError(path, f"cannot be read: {reason}") from exc
    if len(data) > _MAX_FILE:
        raise PolicyError(path, f"has more than {_MAX_FILE} bytes")
    return parse(text, path), (status.st_dev, status.st_ino)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def parse(text: str, path: str = "policy") -> Policy:
    """Return the policy in a text.

    Args:
        text: TOML.
        path: Where it is from, for errors.

    Raises:
        PolicyError: It is none.
    """
    import tomllib

    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # also a number of too many digits
        raise PolicyError(path, f"is not TOML: {exc}") from exc
    try:
        return _policy(document)
    except _BadKeyError as exc:
        raise PolicyError(path, str(exc)) from exc


class _BadKeyError(Exception):
    """What is wrong, and where."""


def _policy(document: dict[str, object]) -> Policy:
    unknown = document.keys() - {"rule", "first_number"}
    if unknown:
        raise _BadKeyError(f"unknown key {min(unknown)!r}")
    tables = document.get("rule", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise _BadKeyError("'rule' must be written as [[rule]]")
    rules = tuple(_rule(table, index) for index, table in enumerate(tables, 1))
    if not rules:
        raise _BadKeyError("there is no [[rule]], so that nobody could connect")
    first = document.get("first_number", Policy.first_number)
    # Below eight are those that the module makes.
    if type(first) is not int or not 8 <= first < 1 << 20:
        raise _BadKeyError("first_number must be from 8 to 2^20 - 1")
    return Policy(rules=rules, first_number=first)


def _rule(table: dict[str, object], index: int) -> Rule:
    fields: dict[str, object] = {}
    for key, value in table.items():
        if key not in _KEYS:
            raise _BadKeyError(f"rule {index}: unknown key {key!r}")
        name, convert = _KEYS[key]
        try:
            fields[name] = convert(value)
        except ValueError as exc:
            raise _BadKeyError(f"rule {index}: {key} {exc}") from exc
    if "uid" not in table and "gid" not in table:
        raise _BadKeyError(f"rule {index} does not say whom it is for: uid or gid")
    return Rule(**fields)  # type: ignore[arg-type]


def _ids(look_up: Callable[[str], int]) -> Callable[[object], frozenset[int] | None]:
    def convert(value: object) -> frozenset[int] | None:
        if value == "all":
            return None
        values = value if isinstance(value, list) else [value]
        return frozenset(_id(item, look_up) for item in values)

    return convert


def _id(value: object, look_up: Callable[[str], int]) -> int:
    if isinstance(value, str):
        try:
            return look_up(value)
        except KeyError as exc:
            raise ValueError(f"names nobody: {value!r}") from exc
    if type(value) is int and 0 <= value <= _MAX_ID:
        return value
    raise ValueError('must be a number, a name, a list of them, or "all"')


def _uid(name: str) -> int:
    import pwd

    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    import grp

    return grp.getgrnam(name).gr_gid


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_COUNT:
        raise ValueError("must be a number, 0 or more, and below 2^63")
    return value


def _limit(value: object) -> int | None:
    return None if value == "unlimited" else _count(value)


def _size(value: object) -> int | None:
    if isinstance(value, str) and _SIZE.fullmatch(value):
        value = int(value[:-3]) << _UNITS[value[-3:]]
    try:
        return _limit(value)
    except ValueError as exc:
        raise ValueError('must be bytes, as a number or as in "10GiB", or "unlimited"') from exc


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004 - of a file, not of an argument
    return value


def _owner(value: object) -> tuple[int, int] | None:
    if value == "client":
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError('must be "client", or [user, group]')
    return _id(value[0], _uid), _id(value[1], _gid)


def _mode(value: object) -> int:
    if type(value) is not int or not 0 <= value <= 0o777:
        raise ValueError("must be permissions, as in 0o660")
    return value


_KEYS: dict[str, tuple[str, Callable[[object], object]]] = {
    "uid": ("uids", _ids(_uid)),
    "gid": ("gids", _ids(_gid)),
    "connections": ("connections", _count),
    "devices": ("devices", _limit),
    "bytes": ("bytes", _size),
    "requests_per_second": ("requests_per_second", _limit),
    "node_owner": ("node_owner", _owner),
    "node_mode": ("node_mode", _mode),
    **{
        name: (name, _flag)
        for name in ("read_only", "partscan", "want_fd", "block_devices", "lock")
    },
}


class PolicyFile:
    """A policy that can be read again.

    Args:
        source: A policy, the path of its file, or None: root alone.

    Attributes:
        policy: What counts now.
        identity: st_dev and st_ino of the file; None: there is none.

    Raises:
        PolicyError: The file is bad at the start; later on the last good one counts.
    """

    def __init__(self, source: Policy | str | os.PathLike[str] | None) -> None:
        self.path = None if source is None or isinstance(source, Policy) else os.fspath(source)
        self.identity: tuple[int, int] | None = None
        self.policy = source if isinstance(source, Policy) else DEFAULT
        self.reload()

    def reload(self) -> None:
        """Read the file again.

        Raises:
            PolicyError: It is bad; what counted before still counts.
        """
        if self.path is not None:
            self.policy, self.identity = _load(self.path)
