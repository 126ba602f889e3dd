# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The numbers of the broker's devices: added, used again, removed, and what they are till then."""

from __future__ import annotations

import errno
import time

from loopdev._control import LoopControl
from loopdev.broker._lease import Stock
from loopdev.broker._pool import Job
from loopdev.errors import BrokerError, DeviceBusyError, NoSuchDeviceError, RefusedError
from loopdev.kernel import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import cast

    from loopdev.broker._jobs import Client, Device, Fds
    from loopdev.broker._poll import Poller
    from loopdev.broker._pool import Pool
    from loopdev.broker._state import State

    Problem = Callable[[int | None, str], None]
else:

    def cast(_, value):
        return value


# Jobs that are nobody's: as if of a user that cannot exist.
_NOBODY = -1
# Seconds: without an attach for so long, unbound devices are removed; how often devices are looked
# at that somebody still has open.
_QUIET = 1.0
_LOOK = 0.5
# What is needed of a device to end it.
_KEPT = ("number", "diskseq", "nodes", "made", "directory")
# How often a worker may be lost over one number, before it is left to the next start.
_TRIES = 3
_LEFT = "could not be cleaned up, and is left to the next start"
# Numbers in one job: removing one takes 40 ms.
_AT_ONCE = 4


class Numbers:
    """Every number that is ours, in the state file from before its device is added.

    Args:
        first: New ones begin here.
        state: Where they are written down.
        pool: Who removes them.
        poller: For what is to be done later.
        private: The directory of the nodes that clients are shown.
        problem: Is told what cannot be done, and of which number.

    Attributes:
        removing: How many jobs are under way.
    """

    def __init__(
        self,
        first: int,
        state: State,
        pool: Pool,
        poller: Poller,
        private: str,
        problem: Problem,
    ) -> None:
        self._state, self._pool, self._poller = state, pool, poller
        self._private, self._problem = private, problem
        self._stock = Stock(first)
        # Ours, and somebody else has them open.
        self._lingering: set[int] = set()
        # By number, whose it is or was.
        self._owners: dict[int, int] = {}
        self._sweeping = False
        self._stopping = False
        self.removing = 0

    def take(self, uid: int) -> tuple[int, bool]:
        """Return a number for a device, and whether the device is yet to be added.

        Raises:
            RefusedError: There is none, or it could not be written down.
        """
        used = self._stock.take(uid)
        if used is not None:
            return used, False  # unless somebody was given it: the worker sees that
        # One that is being recovered may be of no device for a moment, too.
        number = self._stock.new(self._state.live)
        try:
            self._state.put(number)
        except BrokerError as exc:
            del self._state.live[number]
            raise _unwritten(exc) from exc
        self._owners[number] = uid
        return number, True

    def forget(self, number: int) -> None:
        """Leave a number to somebody else, who has it."""
        self._drop(number)

    def attached(self, record: Device, client: Client) -> None:
        """Write a device down; if that fails, the number alone is."""
        try:
            self.plan(record, client)
        except RefusedError as exc:
            self._problem(record["number"], str(exc))

    def plan(self, record: Device, client: Client) -> None:
        """Write a device down, before its client learns of it.

        Raises:
            RefusedError: It could not be done.
        """
        entry = {key: record[key] for key in _KEPT if key in record}  # type: ignore[literal-required]
        try:
            self._state.put(record["number"], device=entry, client=client)
        except BrokerError as exc:
            raise _unwritten(exc) from exc

    def keep(self, number: int) -> None:
        """Use a number no more: a client's node of it is left, and opens what has the number."""
        self._problem(number, "is not used again, since a node of it could not be taken back")

    def detached(self, uid: int, number: int, bound: bool) -> None:
        """Take a number back, of whose device nothing is left but maybe somebody's descriptor."""
        if bound:
            self._linger(number)
        elif not sysfs.exists(number):
            self._drop(number)
        else:
            try:
                self._state.put(number)
            except BrokerError as exc:
                self._problem(number, str(exc))
            if self._stopping or not self._stock.give(uid, number):
                self._remove([number])
            self._sweep_later()

    def lingering(self, uid: int) -> tuple[int, int]:
        """Return how many devices a user keeps that were taken back, and their bytes."""
        kept = [
            number
            for number in self._lingering
            if self._owners.get(number) == uid and sysfs.is_bound(number)
        ]
        return len(kept), sum(map(sysfs.size, kept))

    def _drop(self, number: int) -> None:
        """Have a number no longer. If that cannot be written down, the next start looks at it."""
        self._owners.pop(number, None)
        try:
            self._state.drop(number)
        except BrokerError as exc:
            self._problem(number, str(exc))

    def lost(self, number: int) -> None:
        """Take a number back of which it is not known what a worker has done to it."""
        entry = self._state.live.get(number)
        if entry is not None:
            self._recover(number, entry)

    def recover(self) -> None:
        """Clean up after an earlier broker."""
        for number, entry in list(self._state.live.items()):
            self._recover(number, entry)

    def stop(self) -> None:
        """Keep none from now on, and remove what can be removed."""
        self._stopping = True
        self._remove(self._stock.clear() + self._free())

    def remove_rest(self) -> None:
        """Remove what no worker has come to; what cannot be removed is left to the next start."""
        with LoopControl() as control:
            for number, entry in list(self._state.live.items()):
                # One that was attached may have left nodes, too.
                if "device" in entry or sysfs.is_bound(number):
                    continue
                try:
                    control.remove(number)
                except DeviceBusyError:
                    continue
                except NoSuchDeviceError:
                    pass
                self._drop(number)

    def _linger(self, number: int) -> None:
        self._lingering.add(number)
        self._sweep_later()

    def _free(self) -> list[int]:
        free = [number for number in self._lingering if not sysfs.is_bound(number)]
        self._lingering.difference_update(free)
        return free

    def _sweep_later(self) -> None:
        if not self._sweeping and not self._stopping:
            self._sweeping = True
            self._poller.later(_LOOK, self._sweep)

    def _sweep(self) -> None:
        """Remove devices that nobody needs, and look at those that somebody had open."""
        self._sweeping = False
        self._remove(self._free())
        if time.monotonic() - self._stock.used > _QUIET:
            self._remove(self._stock.clear())
        if self._lingering or self._stock:
            self._sweep_later()

    def _remove(self, numbers: list[int]) -> None:
        for start in range(0, len(numbers), _AT_ONCE):
            self._remove_some(numbers[start : start + _AT_ONCE])

    def _remove_some(self, numbers: list[int]) -> None:
        def done(result: dict[str, object] | None, _: Fds) -> None:
            self.removing -= 1
            left = _list(result, "left") if result is not None else numbers
            for number in numbers:
                if number in left:
                    self._linger(number)
                else:
                    self._drop(number)

        self.removing += 1
        self._pool.submit(Job(_NOBODY, {"job": "remove", "numbers": numbers}, done))

    def _recover(self, number: int, entry: dict[str, object], tries: int = _TRIES) -> None:
        """Have a worker end what an earlier broker, or a worker that is lost, has left."""

        def done(result: dict[str, object] | None, _: Fds) -> None:
            self.removing -= 1
            if result is None and tries > 1:
                self._recover(number, entry, tries - 1)
                return
            problems = _list(result, "problems") if result is not None else (_LEFT,)
            for problem in problems:
                self._problem(number, str(problem))
            if result is None:
                return
            if result.get("left", True):
                self._linger(number)
            else:
                self._drop(number)

        # It may hang in what is the client's, and then in its place.
        client = cast("Client | None", entry.get("client"))
        uid = _NOBODY if client is None else client["uid"]
        self._owners.setdefault(number, uid)
        payload: dict[str, object] = {
            "job": "recover",
            "number": number,
            "device": entry.get("device"),
            "client": client,
            "private": self._private,
        }
        self.removing += 1
        self._pool.submit(Job(uid, payload, done))


def _unwritten(exc: BrokerError) -> RefusedError:
    """Return the same for a client, whose connection is as good as before."""
    return RefusedError(exc.errno or errno.EIO, f"the broker's state {exc.reason}")


def _list(result: dict[str, object], name: str) -> Iterable[object]:
    found = result.get(name, ())
    return found if isinstance(found, (list, tuple)) else ()
