# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What the broker does with a request: check it, have a worker do it, account for it, answer."""

from __future__ import annotations

import array
import errno
import socket

import loopdev
from loopdev.broker import messages
from loopdev.broker._answers import drop, find, summary
from loopdev.broker._jobs import Fds, reply_of
from loopdev.broker._lease import Held
from loopdev.broker._pool import Job
from loopdev.errors import LoopdevError, RefusedError, RemoteProtocolError
from loopdev.kernel import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import cast

    from loopdev.broker._broker import Broker
    from loopdev.broker._jobs import Device
    from loopdev.broker._lease import Account, Lease
    from loopdev.broker._pool import Done, Note

    Reply = dict[str, object] | None
else:

    def cast(_, value):
        return value


FEATURES = ("attach", "detach", "list", "resize", "sync", "partscan", "directory", "want_fd")
_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
# The errors of those who ask for too much.
_LIMITS = (errno.EAGAIN, errno.EDQUOT)
_GAVE_UP = "it took too long, or ended unexpectedly"


class Requests:
    """The requests of all clients.

    Args:
        broker: What they are made to.
    """

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def handle(self, lease: Lease, data: bytes, descriptors: bool) -> bool:
        """Act on one message, which is still on its connection.

        Args:
            lease: Whose it is.
            data: What it says.
            descriptors: Whether something came with it.

        Returns:
            Whether it was answered at once; otherwise a worker is at it.
        """
        settled, lease.settled = lease.settled, False
        try:
            lease.account.charge(lease.rule)
            request = messages.parse_request(data)
            if isinstance(request, messages.Attach):
                self._attach(lease, request)
                return False
            if descriptors:
                raise RemoteProtocolError(f"no descriptor belongs to {request.op}")
        except (RefusedError, RemoteProtocolError) as exc:
            if not settled and self._may_change(lease, exc):
                return False
            self._broker.log("refused", lease, reason=str(exc))
            if descriptors:
                self._refuse(lease, exc)
                return False
            drop(lease)
            self.reply(lease, messages.encode_error(exc))
            return True
        drop(lease)
        return self._simple(lease, request)

    def _may_change(self, lease: Lease, exc: LoopdevError) -> bool:
        """Look at a request again if its user may have got rid of something that is not known yet.

        It stays on the connection until then.
        """
        if getattr(exc, "errno", None) not in _LIMITS or self._broker.is_settled(lease.account):
            return False
        lease.settled = True
        self._broker.settle(lease, lambda: self._broker.idle(lease), lease.account)
        return True

    def _simple(self, lease: Lease, request: messages.Request) -> bool:
        """Do what comes without descriptors."""
        try:
            if isinstance(request, messages.Hello):
                self._tell(lease, lambda: self._hello(lease), lease.account)
                return False
            if isinstance(request, messages.List):
                self._tell(lease, lambda: self._list(lease, request))
                return False
            held = find(lease, request)
        except LoopdevError as exc:
            self.reply(lease, messages.encode_error(exc))
            return True
        if isinstance(request, messages.Detach):
            self._detach(lease, held, request)
        elif isinstance(request, messages.Resize):
            self._resize(lease, held)
        else:
            self._sync(lease, held)
        return False

    def _hello(self, lease: Lease) -> dict[str, object]:
        rule, account = lease.rule, lease.account
        limits = {
            name: getattr(rule, name)
            for name in (
                *("devices", "bytes", "connections", "requests_per_second"),
                *("read_only", "partscan", "want_fd", "block_devices"),
            )
        }
        return {
            "version": messages.VERSION,
            "server": f"loopdev {loopdev.__version__}",
            "features": FEATURES,
            "limits": {**limits, "max_request": messages.MAX_REQUEST},
            "used": {"devices": account.devices, "bytes": account.bytes},
        }

    def _tell(
        self, lease: Lease, look: Callable[[], dict[str, object]], account: Account | None = None
    ) -> None:
        """Answer with what there is, when it is known."""

        def then() -> None:
            self.reply(lease, messages.encode_result(look()))
            self._broker.idle(lease)

        self._broker.settle(lease, then, account)

    def _list(self, lease: Lease, request: messages.List) -> dict[str, object]:
        uid = lease.client["uid"]
        found = sorted(
            (
                (held.record["number"], owner, held.record)
                for owner in self._broker.leases()
                for held in owner.held()
                if uid in (0, owner.client["uid"]) and held.record["number"] > request.after
            ),
            key=lambda item: item[0],
        )
        first = found[: messages.PAGE]
        page = messages.page([summary(held, owner, owner is lease) for _, owner, held in first])
        return {"devices": page, "more": len(found) > len(page)}

    def _attach(self, lease: Lease, request: messages.Attach) -> None:
        rule, account = lease.rule, lease.account
        if not self._broker.has_room():
            raise RefusedError(errno.EMFILE, "the broker has no descriptors left")
        if rule.devices is not None or rule.bytes is not None:
            account.others, account.others_bytes = self._broker.numbers.lingering(account.uid)
        account.check_room(rule)
        if request.partscan and not rule.partscan:
            raise RefusedError(errno.EPERM, "partscan is not allowed")
        if request.want_fd and not rule.want_fd:
            raise RefusedError(errno.EPERM, "a descriptor of the device (want_fd) is not allowed")
        taken = self._broker.numbers.take(lease.client["uid"])
        account.devices += 1
        self._try_attach(lease, request, *taken)

    def _try_attach(self, lease: Lease, request: messages.Attach, number: int, fresh: bool) -> None:
        rule, account = lease.rule, lease.account
        # What must be written down or counted first is answered here.
        direct = messages.is_plain(request) and rule.bytes is None
        granted = account.grant(rule) if direct else None
        payload: dict[str, object] = {
            "job": "attach",
            "client": lease.client,
            "request": {**messages.BY_DEFAULT, **vars(request)},
            "number": number,
            "fresh": fresh,
            "rule": {
                "read_only": rule.read_only,
                "block_devices": rule.block_devices,
                "lock": rule.lock,
                "node_owner": rule.node_owner,
                "node_mode": rule.node_mode,
                "bytes": account.bytes_left(rule),
            },
            "ours": self._broker.own_files(),
            "private": self._broker.private,
            "stay": granted,
        }

        def done(result: Reply, fds: Fds) -> None:
            if result is not None and "events" in result:
                account.give_back(int(str(result["unused"])))
                self._visited(lease, number, result, fds)
                return
            account.give_back(granted or 0)
            if result is not None and result.get("taken"):
                self._broker.numbers.forget(number)
                self._try_again(lease, request)
                return
            record = cast("Device | None", result and result.get("device"))
            if record is None:
                account.devices -= 1
                self._unused(lease, number, result)
                self._failed(lease, "attach", result)
                return
            self._attached(lease, request, record, [fds.take(fd) for fd in fds])

        def note(facts: object) -> dict[str, object]:
            planned = cast("dict[str, Device]", facts)["device"]
            try:
                self._broker.numbers.plan(planned, lease.client)
            except RefusedError as exc:
                return {"refused": (exc.errno, exc.reason)}
            return {}

        if direct:
            self._broker.leave(lease)
        self._submit(lease, payload, done, (lease.connection.fileno(),), note=note)

    def _try_again(self, lease: Lease, request: messages.Attach) -> None:
        """Go on with another number than one that somebody else has."""
        try:
            taken = self._broker.numbers.take(lease.client["uid"])
        except RefusedError as exc:
            lease.account.devices -= 1
            self._refuse(lease, exc)
            return
        self._try_attach(lease, request, *taken)

    def _visited(self, lease: Lease, number: int, result: dict[str, object], fds: Fds) -> None:
        """Take over from a worker that has stayed with a client."""
        for event, facts in cast("list[tuple[str, dict[str, object]]]", result["events"]):
            self._broker.log(event, lease, **facts)
        record = cast("Device | None", result["device"])
        if record is not None:
            held = Held(record, [fds.take(fd) for fd in fds])
            lease.add(held)
            self._broker.numbers.attached(record, lease.client)
        else:
            lease.account.devices -= 1
            if result.get("taken"):
                self._broker.numbers.forget(number)
            else:
                bound = bool(result["bound"]) or sysfs.is_bound(number)
                self._broker.numbers.detached(lease.client["uid"], number, bound)
        if "error" in result:
            self._failed(lease, str(result["what"]), result)
        else:
            self._broker.idle(lease)

    def _unused(self, lease: Lease, number: int, result: Reply) -> None:
        """Take a number back that no device came of."""
        if result is None:
            self._broker.numbers.lost(number)
        else:
            bound = sysfs.is_bound(number)
            self._broker.numbers.detached(lease.client["uid"], number, bound)

    def _attached(
        self, lease: Lease, request: messages.Attach, record: Device, fds: list[int]
    ) -> None:
        given = Fds([fds.pop(1)] if request.want_fd else [])
        held = Held(record, fds)
        left = lease.account.bytes_left(lease.rule)
        lease.add(held)
        self._broker.attached(lease, held)
        with given:
            if left is None or record["size"] <= left:
                self.reply(lease, reply_of(record), given)
                self._broker.idle(lease)
                return
        # Another connection of the same user was given the rest at the same time.
        exc = RefusedError(errno.EDQUOT, f"only {left} bytes are left by now")

        def ended() -> None:
            self.reply(lease, messages.encode_error(exc))
            self._broker.idle(lease)

        # Busy until then: nobody else may end it, too.
        self._broker.end_device(lease, held, ended)

    def _detach(self, lease: Lease, held: Held, request: messages.Detach) -> None:
        fds, held.fds = Fds(held.fds), []
        # Where sizes are counted, what the next attach may have must be known first.
        direct = lease.rule.bytes is None
        payload: dict[str, object] = {
            "job": "detach",
            "client": lease.client,
            "device": held.record,
            "timeout": request.timeout,
            "private": self._broker.private,
            "direct": direct,
        }

        def done(result: Reply, fds: Fds) -> None:
            if result is not None and "error" in result and len(fds):
                held.fds = [fds.take(fd) for fd in fds]
                self._failed(lease, "detach", result)
                return
            self._broker.detached(lease, held, result)
            if result is None or "error" in result:
                self._failed(lease, "detach", result)
                return
            if not direct:
                self.reply(lease, cast("bytes", result["reply"]))
            self._broker.idle(lease)

        if direct:
            self._broker.leave(lease)
        self._submit(lease, payload, done, (lease.connection.fileno(),), fds)

    def _resize(self, lease: Lease, held: Held) -> None:
        left = lease.account.bytes_left(lease.rule)
        most = None if left is None else left + held.record["size"]
        payload: dict[str, object] = {"job": "resize", "device": held.record, "most": most}

        def done(result: Reply, _: Fds) -> None:
            size = result.get("size") if result is not None else None
            if not isinstance(size, int):
                self._failed(lease, "resize", result)
                return
            lease.account.bytes += size - held.record["size"]
            held.record["size"] = size
            self._broker.log("resize", lease, number=held.record["number"], size=size)
            self.reply(lease, messages.encode_result({"size": size}))
            self._broker.idle(lease)

        self._submit(lease, payload, done, lent=(held.fds[0],))

    def _sync(self, lease: Lease, held: Held) -> None:
        def done(result: Reply, _: Fds) -> None:
            if result is None or "error" in result:
                self._failed(lease, "sync", result)
                return
            self.reply(lease, messages.DONE)
            self._broker.idle(lease)

        self._submit(lease, {"job": "sync", "device": held.record}, done, lent=(held.fds[0],))

    def _refuse(self, lease: Lease, exc: LoopdevError) -> None:
        """Have a worker take a message off the connection, for what came with it."""

        def done(_: Reply, __: Fds) -> None:
            self.reply(lease, messages.encode_error(exc))
            self._broker.idle(lease)

        self._submit(lease, {"job": "refuse"}, done, lent=(lease.connection.fileno(),))

    def _submit(
        self,
        lease: Lease,
        payload: dict[str, object],
        done: Done,
        lent: tuple[int, ...] = (),
        given: Fds | None = None,
        note: Note = lambda _: {},
    ) -> None:
        lease.busy = True
        self._broker.submit(Job(lease.client["uid"], payload, done, lent, given, note))

    def _failed(self, lease: Lease, what: str, result: Reply) -> None:
        """Answer with the error of a worker; one that gave none may have left anything."""
        if result is None:
            self._broker.log("lost", lease, what=what, reason=_GAVE_UP)
            lease.ended = True
            self._broker.idle(lease)
            return
        self._broker.log("failed", lease, what=what, reason=result["text"])
        self.reply(lease, str(result["error"]).encode())
        self._broker.idle(lease)

    def reply(self, lease: Lease, data: bytes, fds: Fds | None = None) -> None:
        """Answer; a client that takes no answers is cut off."""
        ancillary = []
        if fds is not None and len(fds):
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [*fds]))]
        try:
            lease.connection.sendmsg([data], ancillary, _FLAGS)
        except OSError as exc:
            if not lease.ended:
                self._broker.log("cut off", lease, reason=exc.strerror)
            lease.ended = True
