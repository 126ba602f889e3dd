# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Getting a loop device that nobody else has: a search that expects to lose races.

Linux reserves nothing: LOOP_CTL_GET_FREE names the lowest unbound device to everybody who asks,
of all who then try to bind it one succeeds, and when none is unbound it adds one, which costs 40 ms
to remove again. So the devices that the module made at its start are tried first, each process
beginning with the one it had last: processes that attach and detach all the time settle on
different ones. When all are bound but not for long, waiting a moment is cheaper than adding.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from loopdev._backoff import backoff
from loopdev.errors import DeviceBusyError, KernelError, NoFreeDeviceError
from loopdev.kernel import probe, sysfs
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from loopdev._control import LoopControl

    T = TypeVar("T")

# Numbers that this process has detached; hints, never trusted.
_recent: list[int] = []
_RECENT = 8
# How often a device may be locked or claimed by others before it is passed over.
_STUCK = 3
# How many devices are looked at one by one; a module may have been told to make hundreds.
_SCAN = 64
# In seconds: what adding a device and removing it costs; how long the devices must have stayed
# as they are to be taken for long-lived.
_COST_OF_ADDING = 0.04
_QUIET = 0.005
# The pause before asking again whether it is our turn, in seconds.
_TURN = 0.001


class RaceLost(Exception):  # noqa: N818 - an event, not an error
    """A device could not be had.

    Attributes:
        stuck: It is unbound all the same: locked, or claimed exclusively, for who knows how long.
    """

    def __init__(self, stuck: bool = False) -> None:
        super().__init__(stuck)
        self.stuck = stuck


def claim_recent(bind: Callable[[int], T]) -> T | None:
    """Call *bind* with the device that this process had last; None: it has none, or lost it."""
    try:
        return bind(_recent.pop())
    except (IndexError, RaceLost):
        return None


def take_turn(control: LoopControl, timeout: float) -> None:
    """Lock /dev/loop-control, for a search that nobody else may do at the same time.

    Raises:
        NoFreeDeviceError: Somebody has had it locked until the time was up.
    """
    attempts = 0
    for _ in backoff(time.monotonic() + timeout, _TURN):
        attempts += 1
        if _try_lock(control.fileno()):
            return
    raise NoFreeDeviceError(timeout, attempts)


def _try_lock(fd: int) -> bool:
    # Never waited for in flock(): that has no deadline, and its holder may be stopped.
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def claim(
    control: LoopControl, bind: Callable[[int], T], timeout: float, locked: bool = False
) -> T:
    """Call *bind* with numbers of unbound devices until it does not raise RaceLost.

    Args:
        control: Open.
        bind: Opens and binds the device of a number, and leaves nothing when it raises.
        timeout: Seconds.
        locked: *control* is locked already, and stays so.

    Raises:
        NoFreeDeviceError: The time is up.
    """
    start = time.monotonic()
    soon = start + min(timeout, _COST_OF_ADDING)
    if locked:
        found = _claim_existing(None, bind, soon)
    else:
        # A description of its own: what its user does with the other, and a thread, is not ours.
        with OwnedFd.open(f"/proc/self/fd/{control.fileno()}", os.O_RDWR) as turn:
            found = _claim_existing(turn.fileno(), bind, soon)
    if found is not None:
        return found
    attempts = 0
    stuck: dict[int, int] = {}
    for _ in backoff(start + timeout):
        number = _candidate(control, stuck)
        attempts += 1
        try:
            return bind(number)
        except RaceLost as lost:
            if lost.stuck:
                stuck[number] = stuck.get(number, 0) + 1
    raise NoFreeDeviceError(timeout, attempts)


def _claim_existing(turn: int | None, bind: Callable[[int], T], deadline: float) -> T | None:
    """Wait for one of the devices that the module made, for as long as they come and go."""
    seen: list[int | None] = []
    changed = time.monotonic()
    for _ in backoff(deadline, _TURN, 4 * _TURN):
        # One at a time: those who search at once find the same device, and one of them gets it.
        if turn is not None and not _try_lock(turn):
            continue
        try:
            for number in _preset():
                try:
                    return bind(number)
                except RaceLost:
                    pass
            current = [sysfs.diskseq(number) for number in _preset()]
        finally:
            if turn is not None:
                fcntl.flock(turn, fcntl.LOCK_UN)
        if current != seen:
            seen, changed = current, time.monotonic()
        elif time.monotonic() - changed > _QUIET:
            return None
    return None


def _preset() -> range:
    return range(min(probe.preset(), _SCAN))


def _candidate(control: LoopControl, stuck: dict[int, int]) -> int:
    number = control.get_unbound()
    if stuck.get(number, 0) < _STUCK:
        return number
    # The kernel will name this one for as long as it is locked: look further.
    for other in sysfs.numbers():
        if other not in stuck and not sysfs.is_bound(other):
            return other
    stuck.clear()
    return control.add()


def claim_number(
    add: Callable[[int], object], bind: Callable[[int], T], timeout: float, number: int
) -> T:
    """Call *bind* with this one number, after *add* if there is no such device.

    Raises:
        DeviceBusyError: It is bound: at once, since waiting would not help.
        NoFreeDeviceError: It was locked or claimed by somebody until the time was up.
        KernelError: EINVAL: 2^20 or more.
    """
    attempts = 0
    for _ in backoff(time.monotonic() + timeout):
        attempts += 1
        if not sysfs.exists(number):
            try:
                add(number)
            except KernelError as exc:
                if exc.errno != errno.EEXIST:
                    raise
        try:
            return bind(number)
        except RaceLost as lost:
            taken = sysfs.backing_file(number)
            if taken is not None:
                path = f"/dev/loop{number}"
                reason = f"is bound to {taken}"
                raise DeviceBusyError(errno.EBUSY, path, "LOOP_CONFIGURE", reason) from lost
    raise NoFreeDeviceError(timeout, attempts)


def released(number: int) -> None:
    """Remember a device that this process has just detached."""
    if len(_recent) < _RECENT:
        _recent.append(number)
