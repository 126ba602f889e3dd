# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the broker knows of its clients: connections, their devices, and what users have in all."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time

from loopdev.errors import RefusedError
from loopdev.kernel import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container

    from loopdev.broker._jobs import Client, Device
    from loopdev.broker.policy import Rule

_UCRED = struct.Struct("@iII")
_CAP_DAC_OVERRIDE = 1 << 1
_SO_PEERGROUPS = 59  # <asm-generic/socket.h>, Linux 4.13
# Python's limit for an option's value; a user with more groups is known by the first one alone.
_GROUPS_SIZE = 1024
# Unbound devices that are kept to be used again.
_STOCK = 256
# Requests that a worker may answer before the event loop hears of them.
_GRANT = 128
# The part of those left that one connection gets, so that there are some for the others.
_SHARE = 8


def client_of(connection: socket.socket) -> Client:
    """Return who has connected, as the kernel saw it then."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
    except OSError:
        packed = b""  # ENOPROTOOPT, or ERANGE
    return {
        "uid": uid,
        "gid": gid,
        "groups": list(memoryview(packed).cast("I")),
        "pid": pid,
        # Only root's files are anybody's business here: for others the kernel drops it.
        "overrides": uid == 0 and _overrides(pid),
    }


def _overrides(pid: int) -> bool:
    """Return whether a process may write to any directory of the host: not every root may."""
    status = _read(f"/proc/{pid}/status")
    found = status.partition(b"\nCapEff:\t")[2].split(b"\n")[0]
    if not found or not int(found, 16) & _CAP_DAC_OVERRIDE:
        return False
    try:
        return os.stat(f"/proc/{pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino
    except OSError:
        return False


def cgroup_of(pid: int) -> str:
    """Return the control group of a process, for the log; "" if it cannot be had."""
    lines = _read(f"/proc/{pid}/cgroup").decode(errors="replace").split("\n")
    unified = [line for line in lines if line.startswith("0::")]
    return (unified or lines)[0].rpartition(":")[2]


def _read(path: str) -> bytes:
    try:
        return sysfs.read(path) or b""
    except OSError:
        return b""  # ESRCH, EMFILE


class Account:
    """What one user has, over all connections."""

    __slots__ = (
        *("_seen", "_tokens", "bytes", "connections", "devices", "leaving"),
        *("others", "others_bytes", "uid"),
    )

    def __init__(self, uid: int) -> None:
        self.uid = uid
        self.connections = self.devices = self.bytes = 0
        # Devices that were taken back, and that somebody keeps by having them open.
        self.others = self.others_bytes = 0
        # It is looked now and then whether this can be forgotten.
        self.leaving = False
        self._tokens = 0.0
        self._seen = 0.0

    def charge(self, rule: Rule) -> None:
        """Count one request.

        Raises:
            RefusedError: EAGAIN: there were too many in the last second.
        """
        rate = rule.requests_per_second
        if rate is None:
            return
        now = time.monotonic()
        self._tokens = min(float(rate), self._tokens + (now - self._seen) * rate)
        if self._seen == 0.0:
            self._tokens = float(rate)
        self._seen = now
        if self._tokens < 1:
            raise RefusedError(errno.EAGAIN, f"more than {rate} requests a second")
        self._tokens -= 1

    def is_rested(self) -> bool:
        """Return whether a new account would allow no more requests than this one does."""
        return time.monotonic() - self._seen >= 1

    def grant(self, rule: Rule) -> int:
        """Count requests in advance, and return how many."""
        if rule.requests_per_second is None:
            return _GRANT
        granted = min(_GRANT, int(self._tokens) // _SHARE)
        self._tokens -= granted
        return granted

    def give_back(self, requests: int) -> None:
        """Count requests no longer that were granted and not made."""
        self._tokens += requests

    def check_room(self, rule: Rule) -> None:
        """Refuse one device more than is allowed.

        Raises:
            RefusedError: EDQUOT.
        """
        if rule.devices is not None and self.devices + self.others >= rule.devices:
            kept = f", and {self.others} that were given back are still open" if self.others else ""
            raise RefusedError(errno.EDQUOT, f"no more than {rule.devices} devices{kept}")

    def bytes_left(self, rule: Rule) -> int | None:
        """Return how large another device may be; None: no limit."""
        return None if rule.bytes is None else max(0, rule.bytes - self.bytes - self.others_bytes)


class Held:
    """A device of a client, and the descriptors that keep it.

    Attributes:
        record: What it is.
        fds: The device itself, then what is needed to take its nodes away.
    """

    __slots__ = ("fds", "record")

    def __init__(self, record: Device, fds: list[int]) -> None:
        self.record, self.fds = record, fds


class Lease:
    """A connection, and what was given to it.

    Attributes:
        connection: The socket. What came with a message on it is never received here.
        busy: A worker does something for it.
        apart: That worker answers it, too: the client may know of what is not known here yet.
        settled: The request that comes next has waited for what was not known here.
        ended: It is to be closed, when it is no longer busy.
    """

    __slots__ = (
        *("account", "apart", "busy", "cgroup", "client", "connection"),
        *("devices", "ended", "rule", "settled"),
    )

    def __init__(
        self,
        connection: socket.socket,
        client: Client,
        cgroup: str,
        rule: Rule,
        account: Account,
    ) -> None:
        self.connection, self.client, self.cgroup = connection, client, cgroup
        self.rule, self.account = rule, account
        self.busy = self.ended = self.apart = self.settled = False
        self.devices: dict[int, Held] | None = None

    def held(self) -> list[Held]:
        """Return the devices, the newest first: one may be on top of an older one."""
        return [] if self.devices is None else list(self.devices.values())[::-1]

    def add(self, held: Held) -> None:
        """Count a device."""
        if self.devices is None:
            self.devices = {}
        self.devices[held.record["number"]] = held
        self.account.bytes += held.record["size"]

    def remove(self, held: Held) -> None:
        """Count it no longer."""
        if self.devices is not None and self.devices.pop(held.record["number"], None) is held:
            self.account.bytes -= held.record["size"]
            self.account.devices -= 1
            self.devices = self.devices or None


class Stock:
    """Numbers of devices for the broker: new ones, and those that can be used again.

    A device that was used is used again for the same user alone: whoever has found a way to keep it
    open, or a node of it, has kept his own. To remove it, which costs 40 ms, shows that nobody has.

    Args:
        first: New numbers begin here.
    """

    def __init__(self, first: int) -> None:
        self._first = self._next = first
        self._unbound: dict[int, list[int]] = {}
        self.used = time.monotonic()

    def take(self, uid: int) -> int | None:
        """Return a number that was this user's before and is unbound, as far as we know."""
        self.used = time.monotonic()
        numbers = self._unbound.get(uid)
        if not numbers:
            return None
        number = numbers.pop()
        if not numbers:
            del self._unbound[uid]
        return number

    def new(self, taken: Container[int] = ()) -> int:
        """Return a number of which there is no device, and which is not *taken*.

        Raises:
            RefusedError: ENOSPC: there is none.
        """
        end = sysfs.end_of_numbers()
        for _ in range(self._first, end):
            if self._next >= end:
                self._next = self._first
            number = self._next
            self._next += 1
            if number not in taken and not sysfs.exists(number):
                return number
        raise RefusedError(errno.ENOSPC, f"no number from {self._first} to {end - 1} is free")

    def give(self, uid: int, number: int) -> bool:
        """Keep an unbound device for its user; False: there are enough, it is to be removed."""
        self.used = time.monotonic()
        if sum(map(len, self._unbound.values())) >= _STOCK:
            return False
        self._unbound.setdefault(uid, []).append(number)
        return True

    def __bool__(self) -> bool:
        return bool(self._unbound)

    def clear(self) -> list[int]:
        """Return all numbers, which are to be removed."""
        found = [number for numbers in self._unbound.values() for number in numbers]
        self._unbound.clear()
        return found
