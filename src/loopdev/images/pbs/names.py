# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Names of namespaces, groups, snapshots and files, and their paths in a datastore.

Source: pbs-api-types/src/datastore.rs, proxmox-systemd/src/escape.rs.
"""

from __future__ import annotations

import time

from loopdev._value import Value
from loopdev.errors import InvalidValueError

TYPES = ("vm", "ct", "host")
MANIFEST = "index.json.blob"
LATEST = "latest"
INDEX_SUFFIX = ".fidx"
_LEVELS_MAX = 7
_NAMESPACE_MAX = 256
_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_HEX = frozenset("0123456789abcdef")
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"
_DIGITS = (0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18)


class Group(Value):
    """The snapshots of one machine."""

    namespace: str
    type: str
    id: str

    def __str__(self) -> str:
        return f"{self.type}/{self.id}"

    @property
    def path(self) -> str:
        """Its directory, relative to the datastore."""
        return _join(namespace_path(self.namespace), self.type, self.id)

    def snapshot(self, seconds: int) -> Snapshot:
        """Return the group's snapshot of that time."""
        return Snapshot(namespace=self.namespace, type=self.type, id=self.id, time=seconds)


class Snapshot(Value):
    """One snapshot; *time* is Unix seconds."""

    namespace: str
    type: str
    id: str
    time: int

    def __str__(self) -> str:
        return f"{self.type}/{self.id}/{format_time(self.time)}"

    @property
    def group(self) -> Group:
        """The group that it is in."""
        return Group(namespace=self.namespace, type=self.type, id=self.id)

    @property
    def path(self) -> str:
        """Its directory, relative to the datastore."""
        return f"{self.group.path}/{format_time(self.time)}"

    @property
    def full_name(self) -> str:
        """Its name with its namespace in front: ns/a/b/vm/100/2024-01-02T03:04:05Z."""
        return f"ns/{self.namespace}/{self}" if self.namespace else str(self)


class ArchiveName(Value):
    """A file of a snapshot; *time* None is the group's latest snapshot."""

    group: Group
    time: int | None
    filename: str


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def is_safe(name: str) -> bool:
    """Return whether a name can be that of a namespace or the id of a group."""
    return name[:1] in _SAFE and name != "" and not set(name) - _SAFE - {".", "-"}


def as_number(name: str) -> tuple[int, str]:
    """Return what sorts 9 before 10."""
    return (int(name), name) if name.isascii() and name.isdigit() else (1 << 64, name)


def is_namespace(name: str) -> bool:
    """Return whether "a/b" can be a namespace; "" is the root."""
    levels = name.split("/") if name else []
    few = len(levels) <= _LEVELS_MAX and len(name) <= _NAMESPACE_MAX
    return few and all(map(is_safe, levels))


def check_namespace(name: str) -> str:
    """Return *name*, such as "a/b"; "" is the root.

    Raises:
        InvalidValueError: It cannot be one.
    """
    if not is_namespace(name):
        limits = f"at most {_LEVELS_MAX} levels and {_NAMESPACE_MAX} characters"
        raise InvalidValueError("namespace", name, f"is no namespace, such as a/b; {limits}")
    return name


def namespace_path(name: str) -> str:
    """Return the directory of a namespace, relative to the datastore: a/b is ns/a/ns/b."""
    return "/".join(f"ns/{level}" for level in name.split("/")) if name else ""


def parse_group(text: str, namespace: str = "") -> Group:
    """Return the group of "vm/100" or "ns/a/b/vm/100".

    Raises:
        InvalidValueError: It is no such name.
    """
    *front, kind, name = ["", "", *text.split("/")]
    if kind not in TYPES or not is_safe(name):
        raise InvalidValueError("group", text, "is no group, such as vm/100")
    return Group(namespace=_namespace(text, front[2:], namespace), type=kind, id=name)


def parse_snapshot(text: str, namespace: str = "") -> Snapshot:
    """Return the snapshot of "vm/100/2024-01-02T03:04:05Z", maybe with "ns/a/b/" in front.

    Raises:
        InvalidValueError: It is no such name.
    """
    group, _, when = text.rpartition("/")
    seconds = parse_time(when)
    if seconds is None:
        reason = "is no snapshot, such as vm/100/2024-01-02T03:04:05Z"
        raise InvalidValueError("snapshot", text, reason)
    return parse_group(group, namespace).snapshot(seconds)


def parse_archive(text: str, namespace: str = "") -> ArchiveName:
    """Return the file of "[ns/a/b/]vm/100/2024-01-02T03:04:05Z/drive-scsi0.img".

    Instead of the time it may say "latest", and the file may have its ".fidx" or not.

    Raises:
        InvalidValueError: It is no such name.
    """
    snapshot, _, filename = text.rpartition("/")
    group, _, when = snapshot.rpartition("/")
    seconds = parse_time(when)
    if (seconds is None and when != LATEST) or filename in ("", ".", "..") or "\0" in filename:
        reason = "is no image, such as vm/100/2024-01-02T03:04:05Z/drive-scsi0.img"
        raise InvalidValueError("source", text, reason)
    return ArchiveName(group=parse_group(group, namespace), time=seconds, filename=filename)


def _namespace(text: str, levels: list[str], given: str) -> str:
    if not levels:
        return check_namespace(given)
    inside = check_namespace("/".join(levels[1:]))
    if levels[0] != "ns" or not inside:
        raise InvalidValueError("source", text, "has something other than ns/NAME in front")
    if given and not f"{inside}/".startswith(f"{given}/"):
        raise InvalidValueError("source", text, f"is not in the namespace {given}")
    return inside


def parse_time(text: str) -> int | None:
    """Return the Unix seconds of "2024-01-02T03:04:05Z"; None: it is none, or before 1970."""
    if len(text) != 20 or not text.isascii():
        return None
    if not all(text[place].isdigit() for place in _DIGITS):
        return None
    year, month, day = int(text[:4]), int(text[5:7]), int(text[8:10])
    hour, minute, second = int(text[11:13]), int(text[14:16]), int(text[17:19])
    seconds = ((_days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second
    # The 30th of February would be in March.
    return seconds if seconds >= 0 and format_time(seconds) == text else None


def format_time(seconds: int) -> str:
    """Return Unix seconds as a snapshot has them in its name."""
    return time.strftime(_TIME_FORMAT, time.gmtime(seconds))


def _days(year: int, month: int, day: int) -> int:
    """Return the days since 1970-01-01; a year begins in March here, so that leap days end it."""
    year, month = (year, month - 3) if month > 2 else (year - 1, month + 9)
    return (
        year * 365 + year // 4 - year // 100 + year // 400 + (153 * month + 2) // 5 + day - 719469
    )


def escape(text: str) -> str:
    r"""Return *text* as systemd writes it in unit names, but with ":" as ``\x3a``."""
    return "".join(
        "-"
        if byte == 0x2F
        else chr(byte)
        if chr(byte) in _SAFE or (byte == 0x2E and position > 0)
        else f"\\x{byte:02x}"
        for position, byte in enumerate(text.encode("utf-8", "surrogateescape"))
    )


def escape_path(text: str) -> str:
    """Return a path escaped: a slash in front is dropped, and nothing is "-"."""
    return escape(text.removeprefix("/")) or "-"


def unescape(text: str) -> str:
    """Return what was escaped.

    Raises:
        ValueError: It was not made by :func:`escape`.
    """
    head, *rest = text.replace("-", "/").split("\\")
    raw = head.encode()
    for part in rest:
        if part[:1] != "x" or len(part) < 3 or not set(part[1:3]) <= _HEX:
            raise ValueError(text)
        raw += bytes.fromhex(part[1:3]) + part[3:].encode()
    return raw.decode("utf-8", "surrogateescape")
