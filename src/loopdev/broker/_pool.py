# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Worker processes for all that may hang.

A loop ioctl, fsync, close() of a file on FUSE, the lookup of a name: each may wait for a filesystem
that never answers, and then neither a deadline nor SIGKILL ends the wait. A thread that hangs so
would keep its whole process from dying, with every descriptor in it: after a ``kill -9`` of the
broker no device of any client would be freed, at the will of one client. So workers are processes,
started afresh (not forked: the broker may be embedded in a program with threads), with descriptors
passed for one job at a time; one that hangs has nothing but what belongs to its job.

There are a few, and more when those are slow. A client has at most one job at a time, and the
clients of one user have a bounded number of workers; users take turns. The event loop itself never
receives, closes or asks anything of a client's descriptor.
"""

from __future__ import annotations

import collections
import os
import signal
import socket
import subprocess
import sys
import time

from loopdev.broker import _jobs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from loopdev.broker._poll import Poller

    Done = Callable[[dict[str, object] | None, _jobs.Fds], None]
    Note = Callable[[object], dict[str, object]]

# Seconds: after this a worker does not count as one of the few; after that it is given up.
_SLOW = 0.1
_HUNG = 120.0
_TICK = 0.05
# Without work for so long, workers beyond the few are ended.
_IDLE = 2.0
# How long all of them together have, to end.
_END = 1.0
# Workers that one user can have, and all together.
_MOST_OF_USER = 64
_MOST = 512

_START = """\
import sys
sys.path.insert(0, sys.argv[1])
from loopdev.broker._worker import main
main(int(sys.argv[2]))
"""


class Job:
    """One thing for a worker to do.

    Args:
        uid: For whom.
        payload: What, as in _worker.
        lent: Descriptors for the worker that stay the caller's.
        given: Descriptors for the worker that the caller has no longer.
        done: Called with the result, None if the worker died or was given up, and what came along.
        note: Called with what the worker wants to have written down before it goes on; returns what
            it is told.
    """

    __slots__ = ("done", "given", "lent", "note", "payload", "uid")

    def __init__(
        self,
        uid: int,
        payload: dict[str, object],
        done: Done,
        lent: tuple[int, ...] = (),
        given: _jobs.Fds | None = None,
        note: Note = lambda _: {},
    ) -> None:
        self.uid, self.payload, self.done = uid, payload, done
        self.note = note
        self.lent, self.given = lent, given if given is not None else _jobs.Fds()


def _nothing(_result: dict[str, object] | None, _fds: _jobs.Fds) -> None:
    """Be done with a job of which there is nothing more to tell."""


class _Worker:
    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process, self.sock = process, sock
        self.job: Job | None = None
        self.since = time.monotonic()
        # It may stay with a client when it has done what it was told, until it is recalled.
        self.stays = False

    @property
    def fd(self) -> int:
        return self.sock.fileno()


class Pool:
    """The workers, and the jobs that wait for one.

    Args:
        poller: In whose thread everything here happens.
        base: How many workers there are without need.
    """

    def __init__(self, poller: Poller, base: int | None = None) -> None:
        self._poller = poller
        self._base = base or max(2, os.cpu_count() or 1)
        self._workers: dict[int, _Worker] = {}
        self._idle: list[_Worker] = []
        self._queues: collections.OrderedDict[int, collections.deque[Job]]
        self._queues = collections.OrderedDict()
        self._running: collections.Counter[int] = collections.Counter()
        # Given up, and not dead yet: the kernel cannot end them.
        self._stuck: list[tuple[_Worker, int]] = []
        self._inbox = _jobs.Inbox()
        self._ticking = False
        self._closed = False
        # No more processes could be started until then.
        self._grow_after = 0.0

    def start(self) -> None:
        """Start the few workers before they are needed."""
        while len(self._workers) < self._base:
            self._idle.append(self._spawn())

    @property
    def busy(self) -> bool:
        """Whether there is any job, waiting or in work."""
        return bool(self._queues) or any(worker.job for worker in self._workers.values())

    def pids(self) -> list[int]:
        """Return the processes of all workers."""
        return [worker.process.pid for worker in self._workers.values()]

    def submit(self, job: Job) -> None:
        """Have a job done, as soon as it is its turn."""
        self._queues.setdefault(job.uid, collections.deque()).append(job)
        self._dispatch()
        if self._queues:
            self.recall()
        self._tick_later()

    def _tick_later(self) -> None:
        if not self._ticking:
            self._ticking = True
            self._poller.later(_TICK, self._tick)

    def recall(self) -> None:
        """Have those workers come back that stay with a client."""
        for worker in self._workers.values():
            if worker.stays:
                worker.stays = False
                self._tell(worker, {}, [])

    def _spawn(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = self._start_process(theirs.fileno())
            except BaseException:
                ours.close()
                raise
        worker = _Worker(process, ours)
        self._workers[worker.fd] = worker
        self._poller.watch(worker.fd, lambda _: self._ready(worker))
        return worker

    def _start_process(self, link: int) -> subprocess.Popen[bytes]:
        place = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        # -I: nothing of the environment or of the working directory is taken in.
        command = [sys.executable, "-I", "-S", "-c", _START, place, str(link)]
        return subprocess.Popen(  # noqa: S603 - ourselves
            command,
            pass_fds=[link],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={"PATH": os.defpath},
            cwd="/",
        )

    def _next(self) -> Job | None:
        """Return the job whose turn it is, users in turn."""
        for uid in list(self._queues):
            if self._running[uid] >= _MOST_OF_USER:
                continue
            queue = self._queues.pop(uid)
            job = queue.popleft()
            if queue:
                self._queues[uid] = queue  # at the end
            return job
        return None

    def _dispatch(self) -> None:
        while self._idle or self._may_grow():
            job = self._next()
            if job is None:
                return
            try:
                worker = self._idle.pop() if self._idle else self._spawn()
            except OSError:
                # EAGAIN, ENOMEM, EMFILE: the job waits for a worker that there is, or for better
                # times, at _tick().
                self._put_back(job)
                self._grow_after = time.monotonic() + _TICK
                return
            self._give(worker, job)

    def _may_grow(self) -> bool:
        now = time.monotonic()
        if not self._queues or self._closed or now < self._grow_after:
            return False
        if len(self._workers) >= _MOST:
            return False
        quick = sum(now - worker.since < _SLOW for worker in self._workers.values() if worker.job)
        return quick + len(self._idle) < self._base

    def _give(self, worker: _Worker, job: Job) -> None:
        worker.job, worker.since = job, time.monotonic()
        worker.stays = bool(job.payload.get("stay"))
        self._running[job.uid] += 1
        try:
            _jobs.send(worker.sock, job.payload, [*job.lent, *job.given])
        except ConnectionError:
            # It has died, and was told nothing of it: another one will do it.
            worker.job = None
            self._ended(job.uid)
            self._put_back(job)
            return
        except OSError:
            self._kill(worker)
        job.given.close()

    def _put_back(self, job: Job) -> None:
        self._queues.setdefault(job.uid, collections.deque()).appendleft(job)

    def _kill(self, worker: _Worker) -> None:
        """End a worker that could not be told (ETOOMANYREFS, ENOBUFS) what it would wait for."""
        worker.process.send_signal(signal.SIGKILL)

    def _tell(self, worker: _Worker, message: dict[str, object], fds: list[int]) -> None:
        try:
            _jobs.send(worker.sock, message, fds)
        except ConnectionError:
            pass  # it has died: _ready() will hear of it
        except OSError:
            self._kill(worker)

    def _ready(self, worker: _Worker) -> None:
        received = self._inbox.message(worker.sock)
        if received is None:
            self._lost(worker)
            return
        result, fds = received
        if "cut" in result:
            self._cut(worker, fds)
            return
        job = worker.job
        assert job is not None
        if "note" in result:
            # In the middle of its job: it goes on when that is written down.
            fds.close()
            self._tell(worker, job.note(result["note"]), [])
            return
        worker.since, worker.stays = time.monotonic(), False
        if result.get("closing"):
            # It has failed, and there is something to be closed yet, which may hang.
            worker.job = Job(job.uid, {}, _nothing)
        else:
            worker.job = None
            self._idle.append(worker)
            self._ended(job.uid)
        with fds:
            job.done(result, fds)
        self._dispatch()

    def _ended(self, uid: int) -> None:
        self._running[uid] -= 1
        if not self._running[uid]:
            del self._running[uid]

    def _cut(self, worker: _Worker, fds: _jobs.Fds) -> None:
        """Do without a worker whose result we had no room for: what it has done is not known."""
        uid = worker.job.uid if worker.job is not None else 0
        worker.process.send_signal(signal.SIGKILL)
        self._lost(worker)
        # Closing them may hang.
        self.submit(Job(uid, {"job": "bury"}, _nothing, given=fds))

    def _lost(self, worker: _Worker) -> None:
        """Do without a worker that has died."""
        self._close(worker)
        job, worker.job = worker.job, None
        # Its end of the socket is closed before all else that it had, which may hang.
        uid = job.uid if job is not None else 0
        if worker.process.poll() is None:
            if job is None:
                self._running[uid] += 1
            self._stuck.append((worker, uid))
        elif job is not None:
            self._ended(uid)
        if job is not None:
            job.done(None, _jobs.Fds())
        self._dispatch()
        self._tick_later()

    def _close(self, worker: _Worker) -> None:
        del self._workers[worker.fd]
        if worker in self._idle:
            self._idle.remove(worker)
        self._poller.forget(worker.fd)
        worker.sock.close()

    def _tick(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers.values()):
            if worker.job is not None and now - worker.since > _HUNG:
                self._give_up(worker)
        for worker, uid in list(self._stuck):
            if worker.process.poll() is not None:
                self._stuck.remove((worker, uid))
                self._ended(uid)
        self._shrink(now)
        self._dispatch()
        surplus = len(self._workers) > self._base
        self._ticking = self.busy or surplus or bool(self._stuck)
        if self._ticking and not self._closed:
            self._poller.later(_TICK, self._tick)

    def _give_up(self, worker: _Worker) -> None:
        """Kill a worker that hangs. It still counts for its user until it is really dead."""
        job, worker.job = worker.job, None
        assert job is not None
        worker.process.send_signal(signal.SIGKILL)
        self._close(worker)
        self._stuck.append((worker, job.uid))
        job.done(None, _jobs.Fds())

    def _shrink(self, now: float) -> None:
        for worker in self._idle[:]:
            surplus = worker.job is None and len(self._workers) > self._base
            if surplus and now - worker.since > _IDLE:
                self._lost(worker)  # it ends at once: it waits for nothing but us

    def close(self) -> None:
        """End all workers: those in work are killed."""
        self._closed = True
        workers = list(self._workers.values())
        for worker in workers:
            if worker.job is not None:
                worker.process.send_signal(signal.SIGKILL)
            self._close(worker)
        end = time.monotonic() + _END
        for worker in [*workers, *(worker for worker, _ in self._stuck)]:
            try:
                worker.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                # Forgotten, not waited for: the kernel has it, and nothing else has.
                worker.process.returncode = -signal.SIGKILL
        for queue in self._queues.values():
            for job in queue:
                job.given.close()
        self._queues.clear()
