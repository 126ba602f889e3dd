# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The broker itself: connections, their leases, and the numbers of its devices, in one thread."""

from __future__ import annotations

import errno
import os
import socket
import time

from loopdev.broker import _poll, messages
from loopdev.broker._answers import peek
from loopdev.broker._jobs import Fds, attach_facts
from loopdev.broker._lease import Account, Held, Lease, cgroup_of, client_of
from loopdev.broker._numbers import Numbers
from loopdev.broker._pool import Job, Pool
from loopdev.broker._recover import remove_private
from loopdev.broker._requests import Requests
from loopdev.broker._room import Room
from loopdev.broker.policy import NOTHING
from loopdev.errors import BrokerError, RefusedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from loopdev.broker._state import State
    from loopdev.broker.policy import PolicyFile

    Log = Callable[[str, dict[str, object]], None]

# Seconds: how long a stop may take; how often it is looked whether it is done; after which
# accept() is tried again when there was no descriptor for it.
_STOP = 10.0
_POLL_STOP = 0.005
_AGAIN = 0.1
# Seconds: how long a request waits for what workers have yet to tell.
_SETTLE = 0.25
# More connections than this are not accepted in one go, so that others get their turn.
_ACCEPTS = 64
# Seconds after which it is looked whether a user who has left need still be known.
_FORGET = 1.0


class Broker:
    """All that a LoopServer does.

    Args:
        listener: Bound and listening; it stays the caller's.
        policy: What counts.
        state: Where it is written down.
        log: Takes events.
        workers: How many there are without need; None: one for each processor, at least two.

    Attributes:
        numbers: Those of its devices.
        private: The directory of the nodes that clients are shown.
        poller: Its event loop.
    """

    def __init__(
        self,
        listener: socket.socket,
        policy: PolicyFile,
        state: State,
        log: Log,
        workers: int | None,
    ) -> None:
        self.poller = _poll.Poller()
        # Another one each time: a worker of an earlier broker that still hangs can make no node.
        self.private = f"/dev/.loopdev-{os.urandom(8).hex()}"
        self._listener, self._policy, self._state, self._log = listener, policy, state, log
        self._pool = Pool(self.poller, workers)
        self._requests = Requests(self)
        self._leases: dict[int, Lease] = {}
        # Connections that are being ended.
        self._leaving = 0
        # Connections that a worker answers.
        self._apart: set[Lease] = set()
        # Requests that wait until is_settled() for a user, or for all, and what is done then.
        self._settling: list[tuple[Account | None, Callable[[], None]]] = []
        self._accounts: dict[int, Account] = {}
        self._room = Room(listener.fileno())
        # Connections are waiting for descriptors.
        self._full = False
        self.numbers = Numbers(
            policy.policy.first_number,
            *(state, self._pool, self.poller, self.private, self._problem),
        )
        self._stop_at: float | None = None

    def start(self) -> None:
        """Clean up after an earlier broker, and accept connections from now on."""
        earlier = self._state.directories
        self._state.use([*earlier, self.private])
        os.mkdir(self.private, 0o700)
        for path in earlier:
            self._remove_directory(path)
        self._state.use([self.private])
        # In the thread that serves: workers die with the thread that has started them.
        self.poller.later(0, self._begin)
        self._listener.setblocking(False)
        self.poller.watch(self._listener.fileno(), self._accept)

    def _begin(self) -> None:
        self._pool.start()
        self.numbers.recover()

    # For Requests.

    def log(self, event: str, lease: Lease | None, **facts: object) -> None:
        """Tell of an event, and whose it is."""
        client: dict[str, object] = {}
        if lease is not None:
            known = lease.client
            client = {"uid": known["uid"], "gid": known["gid"], "pid": known["pid"]}
            client["cgroup"] = lease.cgroup
        self._log(event, {**client, **facts})

    def _problem(self, number: int | None, reason: str) -> None:
        self.log("problem", None, number=number, reason=reason)

    def leases(self) -> Iterator[Lease]:
        """Yield the connections."""
        return iter(self._leases.values())

    def own_files(self) -> list[list[int]]:
        """Return st_dev and st_ino of files that are no client's to use."""
        return [list(found) for found in (self._state.identity(), self._policy.identity) if found]

    def apply_policy(self) -> None:
        """Have a policy that was read again count for those who are connected, too."""
        # What they may do on their own was decided before.
        self._pool.recall()
        for lease in self._leases.values():
            client = lease.client
            groups = {client["gid"], *client["groups"]}
            lease.rule = self._policy.policy.rule_for(client["uid"], groups) or NOTHING

    def submit(self, job: Job) -> None:
        """Have a worker do something."""
        self._pool.submit(job)

    def attached(self, lease: Lease, held: Held) -> None:
        """Write a device down, before its client learns of it."""
        self.numbers.attached(held.record, lease.client)
        self.log("attach", lease, **attach_facts(held.record))

    def detached(self, lease: Lease, held: Held, result: dict[str, object] | None) -> None:
        """Account for a device that its client has no longer."""
        lease.remove(held)
        number = held.record["number"]
        for problem in result.get("problems", ()) if result is not None else ():  # type: ignore[attr-defined]
            self.log("problem", lease, number=number, reason=problem)
        self.log("detach", lease, number=number)
        if result is None or "error" in result:
            self.numbers.lost(number)
        elif result["open"]:
            self.numbers.keep(number)
        else:
            self.numbers.detached(lease.client["uid"], number, bool(result["bound"]))

    def end_device(self, lease: Lease, held: Held, then: Callable[[], None] = lambda: None) -> None:
        """Take a device away from its client."""
        fds, held.fds = Fds(held.fds), []
        payload: dict[str, object] = {
            "job": "end",
            "client": lease.client,
            "device": held.record,
            "private": self.private,
        }

        def done(result: dict[str, object] | None, _: Fds) -> None:
            self.detached(lease, held, result)
            then()

        self.submit(Job(lease.client["uid"], payload, done, given=fds))

    def has_room(self) -> bool:
        """Return whether there are descriptors for another device or connection."""
        return self._room.is_left()

    def leave(self, lease: Lease) -> None:
        """Have a worker answer a client until idle()."""
        lease.apart = True
        self._apart.add(lease)

    def is_settled(self, account: Account | None = None) -> bool:
        """Return whether all that clients, or those of one user, were answered is known here."""
        return not any(account in (None, lease.account) for lease in self._apart)

    def settle(
        self, lease: Lease, then: Callable[[], None], account: Account | None = None
    ) -> None:
        """Go on with a request when is_settled(), or a moment later: some worker may hang."""
        lease.busy = True
        waiting = (account, then)
        self._settling.append(waiting)
        self._go_on()
        if waiting in self._settling:
            self._pool.recall()
            self.poller.later(_SETTLE, lambda: self._go_on(waiting))

    def _go_on(self, late: tuple[Account | None, Callable[[], None]] | None = None) -> None:
        """Go on with the requests that have waited for long enough."""
        for waiting in self._settling[:]:
            if waiting in self._settling and (waiting is late or self.is_settled(waiting[0])):
                self._settling.remove(waiting)
                waiting[1]()

    def idle(self, lease: Lease) -> None:
        """Go on with a connection for which a worker was busy."""
        lease.busy = lease.apart = False
        if lease in self._apart:
            self._apart.remove(lease)
            self._go_on()
        if lease.ended:
            self._end(lease)
        else:
            self.poller.rearm(lease.connection.fileno(), _poll.IN)

    # Connections.

    def _accept(self, _: int) -> None:
        for _ in range(_ACCEPTS):
            if not self.has_room():
                self._pause_accepting(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
                return
            try:
                connection, _address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as exc:
                if exc.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._pause_accepting(exc)
                    return
                continue  # ECONNABORTED: it has gone already
            self._full = False
            self._welcome(connection)

    def _pause_accepting(self, exc: OSError) -> None:
        if not self._full:
            self.log("problem", None, reason=f"accept: {exc.strerror}")
        self._full = True
        self.poller.forget(self._listener.fileno())
        self.poller.later(_AGAIN, self._accept_again)

    def _accept_again(self) -> None:
        if self._stop_at is None:
            self.poller.watch(self._listener.fileno(), self._accept)

    def _welcome(self, connection: socket.socket) -> None:
        client = client_of(connection)
        uid = client["uid"]
        rule = self._policy.policy.rule_for(uid, {client["gid"], *client["groups"]})
        account = self._accounts.get(uid) or Account(uid)
        lease = Lease(connection, client, cgroup_of(client["pid"]), rule or NOTHING, account)
        if rule is None:
            self._turn_away(lease, RefusedError(errno.EPERM, f"no rule allows user {uid}"))
        elif account.connections >= rule.connections:
            reason = f"no more than {rule.connections} connections"
            self._turn_away(lease, RefusedError(errno.EDQUOT, reason))
        else:
            self._accounts[uid] = account
            account.connections += 1
            fd = connection.fileno()
            self._leases[fd] = lease
            self.log("connect", lease)
            self.poller.watch(fd, lambda events: self._event(lease, events))

    def _turn_away(self, lease: Lease, exc: RefusedError) -> None:
        self.log("refused", lease, reason=exc.reason)
        self._requests.reply(lease, messages.encode_error(exc))
        self._close(lease)

    def _event(self, lease: Lease, events: int) -> None:
        if events & _poll.HUP:
            lease.ended = True
            if not lease.busy:
                self._end(lease)
            return
        try:
            data, descriptors = peek(lease.connection, messages.MAX_REQUEST + 1)
        except BlockingIOError:
            return
        if not data:
            lease.ended = True  # closed, or an empty message, which cannot be told from that
        elif not self._requests.handle(lease, data, descriptors) and lease.busy:
            self.poller.rearm(lease.connection.fileno(), _poll.ONESHOT)
        if lease.ended and not lease.busy:
            self._end(lease)

    def _end(self, lease: Lease) -> None:
        """Take everything back that a connection was given, the newest device first."""
        fd = lease.connection.fileno()
        if self._leases.pop(fd, None) is None:
            return
        self.poller.forget(fd)
        self._leaving += 1
        self._end_next(lease)

    def _end_next(self, lease: Lease) -> None:
        held = lease.held()
        if held:
            self.end_device(lease, held[0], lambda: self._end_next(lease))
            return
        self._leaving -= 1
        account = lease.account
        account.connections -= 1
        if not account.connections and not account.leaving:
            account.leaving = True
            self._forget(account)
        self.log("disconnect", lease)
        self._close(lease)

    def _forget(self, account: Account) -> None:
        """Know a user no longer when nothing is counted any more, not even requests."""
        if account.connections:
            account.leaving = False
        elif account.is_rested():
            del self._accounts[account.uid]
        else:
            self.poller.later(_FORGET, lambda: self._forget(account))

    def _close(self, lease: Lease) -> None:
        """Close a connection; by a worker where something waits on it, since that may take time."""
        connection = lease.connection
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # ENOTCONN
        data, descriptors = peek(connection, 1)
        if data or descriptors:
            given = Fds([connection.detach()])
            self.submit(Job(lease.client["uid"], {"job": "bury"}, lambda *_: None, given=given))
        else:
            connection.close()

    # The end.

    def stop(self) -> None:
        """Take everything back, and let the event loop end."""
        if self._stop_at is not None:
            return
        self._stop_at = time.monotonic() + _STOP
        self.poller.forget(self._listener.fileno())
        self._pool.recall()
        for lease in list(self._leases.values()):
            lease.ended = True
            if not lease.busy:
                self._end(lease)
        self._check_stopped()

    def _check_stopped(self) -> None:
        assert self._stop_at is not None
        waiting = self._leases or self._leaving
        if not waiting:
            self.numbers.stop()
        if (waiting or self.numbers.removing) and time.monotonic() < self._stop_at:
            self.poller.later(_POLL_STOP, self._check_stopped)
        else:
            self.poller.stop()

    def close(self) -> None:
        """Give back what is the broker's own. Descriptors that are left free what they hold."""
        self._pool.close()
        self.numbers.remove_rest()
        for lease in self._leases.values():
            for held in lease.held():
                Fds(held.fds).close()
            lease.connection.close()
        self.poller.close()
        if self._remove_directory(self.private):
            try:
                self._state.use([])
            except BrokerError as exc:
                self.log("problem", None, reason=str(exc))

    def _remove_directory(self, path: str) -> bool:
        try:
            remove_private(path)
        except OSError as exc:
            self.log("problem", None, reason=f"{path}: {exc.strerror}")
            return False
        return True
