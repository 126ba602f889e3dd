# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The process that looks after a map's workers: starts them, replaces them, and ends with them.

It has one thread and serves nothing, so there is little that can go wrong with it. It holds the
descriptors that the workers serve, so the kernel keeps what a dead worker has taken, until another
one answers it.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import errno
import os
import select
import sys
import time

from loopdev.errors import KernelError, NotMappedError
from loopdev.kernel import mounts, process, sysfs
from loopdev.mapping import _worker
from loopdev.mapping._readers import FIRST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

    from loopdev.mapping._plan import Plan

# How often to look whether all is well, in seconds.
_ROUND = 1.0
_LAST_ROUNDS = 0.1
# A worker that lived so long, in seconds, had begun well.
_SETTLED = 1.0
# How many may die one after the other without having begun well, and the pauses between them.
_DEATHS = 12
_PAUSES = (0.0, 0.0, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.0, 1.0)
# How long past the deadline of its reads a worker may keep one, in seconds.
_GRACE = 2.0
_OOM_SCORE = -500


class Slot:
    """The place of one worker.

    Attributes:
        number: From 0 on.
        fd: The descriptor that it serves.
        pid: The process that is there now; 0: none.
        deaths: How many have died here without having begun well.
        due: When to start the next.
    """

    def __init__(self, number: int, fd: int) -> None:
        self.number, self.fd = number, fd
        self.pid = self.deaths = self.taken_before = 0
        self.began = self.due = 0.0
        # Requests that were taken, at the last look that saw a change, and when that was.
        self.taken, self.stuck_since = -1, 0.0


def start(plan: Plan) -> int:
    """Start a supervisor, which is no child of this process, and return its number."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            pid = os.fork()
            if pid:
                os.write(writing, str(pid).encode())
            else:
                _run(plan)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        os.waitpid(child, 0)
        told = os.read(reading, 32)
        if not told:
            raise KernelError(errno.EAGAIN, "the supervisor", "fork")
        return int(told)
    finally:
        os.close(reading)


def _run(plan: Plan) -> NoReturn:
    """Be the supervisor."""
    code = 1
    _worker.report_to(plan.log, "the supervisor")
    try:
        _detach_from_starter(plan)
        Supervisor(plan).run()
        code = 0
    except BaseException:  # noqa: BLE001 - it is the log that hears of it
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _detach_from_starter(plan: Plan) -> None:
    """Let go of all that belongs to who made the map: its directory, terminal and descriptors."""
    os.chdir("/")
    keep = sorted(
        {
            *(0, 1, 2),
            *plan.source.filenos(),
            *plan.session.filenos(),
            *(plan.cache.filenos() if plan.cache is not None else ()),
            plan.counters.fileno(),
            *plan.log.filenos(),
            plan.lock.fileno(),
            plan.supervising.fileno(),
            plan.owner.fileno(),
        }
    )
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        if fd not in plan.log.filenos():
            os.dup2(null, fd)
    for before, after in zip(keep, [*keep[1:], os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(before + 1, after)


class Supervisor:
    """Looks after the workers of one map, until none is needed."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._entry, self._log = plan, plan.entry, plan.log
        self._slots = [Slot(number, fd) for number, fd in enumerate(plan.session.clones)]
        self._signals: list[int] = []
        self._device: tuple[int, int | None] | None = None
        self._owned, self._orphaned = True, False
        self._enders: list[int] = []
        self._end_failed = False
        # Requests that no worker has taken.
        self._queue = select.poll()
        self._queue.register(plan.session.fileno(), select.POLLIN)
        self._taken, self._unserved_since = -1, 0.0
        self._over = False
        self._failed = False

    def run(self) -> None:
        """Do all that a supervisor does; return when the file is not mounted any more."""
        wakeup = self._catch_signals()
        self._start_all()
        process.set_title(f"loopdev: map {self._entry.name}")
        process.protect_from_oom(_OOM_SCORE)
        poller = select.poll()
        poller.register(wakeup, select.POLLIN)
        poller.register(self._plan.owner.fileno(), select.POLLIN)
        looked = time.monotonic()
        while not self._over:
            for fd, _ in poller.poll(self._pause(looked) * 1000):
                if fd == wakeup:
                    os.read(wakeup, 4096)
                elif not self._hear_owner():
                    poller.unregister(fd)
            self._reap()
            self._obey()
            self._start_due()
            if time.monotonic() - looked >= self._round:
                looked = time.monotonic()
                self._look()
        self._clean_up()

    def _catch_signals(self) -> int:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)
        _signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGCHLD):
            _signal.signal(number, self._signalled)
        for number in (_signal.SIGHUP, _signal.SIGPIPE):
            _signal.signal(number, _signal.SIG_IGN)
        return reading

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if number != _signal.SIGCHLD:
            self._signals.append(number)

    def _pause(self, looked: float) -> float:
        now = time.monotonic()
        due = [slot.due for slot in self._slots if not slot.pid] if not self._failed else []
        return max(0.0, min([looked + self._round, *due]) - now)

    @property
    def _round(self) -> float:
        # When it has failed, what is left to see is that it was unmapped; somebody waits for us.
        return _LAST_ROUNDS if self._failed else _ROUND

    def _hear_owner(self) -> bool:
        """Listen to who made the map; False: it will say no more."""
        said = os.read(self._plan.owner.fileno(), 4096).split()
        for word in said:
            if word == b"stay":
                self._owned = False
            else:
                number, _, diskseq = word.partition(b":")
                self._device = int(number), int(diskseq) if diskseq else None
        if not said and self._owned:
            # Nobody is left to ask again, so what is in use goes with its last user.
            self._orphaned = True
            self._end()
        return bool(said)

    def _start_all(self) -> None:
        cache = self._plan.cache
        for slot in self._slots:
            if cache is not None and slot.number == 0:
                cache.reserve(FIRST)
            self._start(slot)
            if cache is not None and slot.number == 0:
                cache.let_go(FIRST)

    def _start(self, slot: Slot) -> bool:
        slot.began, slot.taken = time.monotonic(), -1
        slot.taken_before = self._plan.counters.progress(slot.number)[0]
        pid = self._fork()
        if pid is None:
            slot.due = slot.began + _ROUND
            return False
        if pid == 0:
            _worker.run(self._plan, slot.number, slot.fd, (self._plan.supervising,))
        slot.pid = pid
        return True

    def _fork(self) -> int | None:
        try:
            return os.fork()
        except OSError as exc:
            # EAGAIN, ENOMEM: there are too many processes, or too little memory, for now.
            self._log.log(f"no process can be started: {exc.strerror}")
            return None

    def _start_due(self) -> None:
        for slot in self._slots:
            due = not slot.pid and not self._failed and slot.due <= time.monotonic()
            if due and self._start(slot):
                self._plan.counters.restarted()

    def _reap(self) -> None:
        """See who has died."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._enders:
                self._enders.remove(pid)
                self._end_failed = status != 0
                continue
            for slot in self._slots:
                if slot.pid == pid:
                    self._died(slot, os.waitstatus_to_exitcode(status))

    def _died(self, slot: Slot, code: int) -> None:
        slot.pid = 0
        if not self._entry.is_mounted():
            self._over = True
            return
        if code == _worker.DISCONNECTED:
            # umount -f, or fusectl: it is mounted still, so that whoever asks gets an error.
            self._fail("the connection was aborted")
            return
        now = time.monotonic()
        slot.deaths = (
            0 if now - slot.began >= _SETTLED or self._has_served(slot) else slot.deaths + 1
        )
        if slot.deaths >= _DEATHS:
            self._fail(f"{slot.deaths} workers died one after the other, the last {_how(code)}")
            return
        slot.due = now + _PAUSES[slot.deaths]
        if slot.deaths in (0, 1):
            self._log.log(f"worker {slot.number} {_how(code)}, and is replaced")
        # What it had taken goes to the others at once, and to its successor.
        if not self._plan.session.resend():
            # Linux before 6.9 cannot do that: who waits for those gets an error.
            slot.fd = self._plan.session.replace(slot.fd)

    def _has_served(self, slot: Slot) -> bool:
        return self._plan.counters.progress(slot.number)[0] > slot.taken_before

    def _fail(self, reason: str) -> None:
        """Serve no more: who reads gets an error from now on."""
        if self._failed:
            return
        self._failed = True
        self._log.log(f"gave up: {reason}")
        self._entry.fail(reason)
        try:
            mounts.umount(self._entry.image, mounts.MNT_FORCE | mounts.UMOUNT_NOFOLLOW)
        except OSError:
            pass  # in use: then it is aborted, and stays until it is unmapped

    def _obey(self) -> None:
        if self._signals:
            self._signals.clear()
            self._end()

    def _end(self) -> None:
        """Have the map ended by another process: to detach takes time, and reads of the file."""
        pid = self._fork()
        if pid is None:
            self._end_failed = True
        elif pid:
            self._enders.append(pid)
        else:
            self._run_end()

    def _run_end(self) -> NoReturn:
        code = 1
        try:
            _worker.forget_signals()
            self._plan.supervising.close()
            self._plan.lock.close()
            self._plan.session.close()
            self._plan.source.close()
            from loopdev.mapping._end import end

            end(self._entry, lazy=self._orphaned)
            code = 0
        except NotMappedError:
            code = 0  # somebody else was quicker
        except Exception as exc:  # noqa: BLE001 - as above
            self._log.log(f"cannot be unmapped: {exc}")
        finally:
            os._exit(code)

    def _look(self) -> None:
        """See whether the device is there still, and whether the workers work."""
        if self._failed and not self._entry.is_mounted():
            self._over = True
            return
        if not self._enders and self._is_to_end():
            self._end()
        unserved = self._is_unserved()
        for slot in self._slots:
            if slot.pid and (unserved or self._is_stuck(slot)):
                self._log.log(f"worker {slot.number} does not answer, and is killed")
                os.kill(slot.pid, _signal.SIGKILL)  # a child that was not waited for: no other

    def _is_unserved(self) -> bool:
        """Return whether requests wait in the kernel for longer than they may: nobody takes any."""
        taken = sum(self._plan.counters.progress(slot.number)[0] for slot in self._slots)
        now, queued = time.monotonic(), self._queue.poll(0)
        if taken != self._taken or not queued:
            self._taken, self._unserved_since = taken, now
            return False
        if now - self._unserved_since <= self._plan.timeout + _GRACE:
            return False
        self._unserved_since = now
        return True

    def _is_to_end(self) -> bool:
        """Return whether it is time to end the map, maybe once more."""
        if self._orphaned:
            return self._end_failed or not self._entry.devices()
        if self._device is None:
            return False
        number, diskseq = self._device
        return sysfs.backing_file(number) != self._entry.image or sysfs.diskseq(number) != diskseq

    def _is_stuck(self, slot: Slot) -> bool:
        """Return whether a worker has kept a request for longer than it may."""
        taken, kept = self._plan.counters.progress(slot.number)
        now = time.monotonic()
        if kept <= 0 or taken != slot.taken:
            slot.taken, slot.stuck_since = taken, now
            return False
        return now - slot.stuck_since > self._plan.timeout + _GRACE

    def _clean_up(self) -> None:
        """Wait for the workers, which end with the mount, and remove the directory."""
        deadline = time.monotonic() + self._plan.timeout
        for slot in self._slots:
            while slot.pid and os.waitpid(slot.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    os.kill(slot.pid, _signal.SIGKILL)
                time.sleep(0.001)
        if not self._entry.is_mounted() and not self._entry.devices():
            self._entry.discard()
        # Who sees that the lock is free may go on to unmount the store, so it is the last to go.
        lock = self._plan.lock.fileno()
        os.closerange(0, lock)
        os.closerange(lock + 1, os.sysconf("SC_OPEN_MAX"))


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code}"
    return f"ended with code {code}"
