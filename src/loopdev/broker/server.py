# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""LoopServer: the broker as a service of its own, or as a part of a build tool."""

from __future__ import annotations

import errno
import os
import socket as sockets
import stat
import threading

from loopdev.broker._broker import Broker
from loopdev.broker._state import State
from loopdev.broker.policy import PolicyFile
from loopdev.errors import BrokerError, ClosedError, PolicyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from loopdev.broker._broker import Log
    from loopdev.broker.policy import Policy

_BACKLOG = 4096


class LoopServer:
    """A broker at a Unix socket.

    In a ``with`` it serves in a thread of its own; devices that it has given out are bound until
    their clients leave, or the ``with`` ends. serve_forever() serves in the calling thread. It
    needs root.

    Args:
        socket: The path of the socket, whose file is made and, in the end, removed; or a socket
            (AF_UNIX, SOCK_SEQPACKET) that is listening already, which stays the caller's.
        policy: Who may have what: a policy, or the path of its file; None: root alone.
        state: The file that says what there is, for the next start after a SIGKILL; None: the
            socket's path with ".state". Its directory must be writable for root alone.
        log: Called in the server's thread with the name of each event and its facts: uid, gid, pid
            and cgroup of the client among them.
        workers: How many worker processes there are without need; None: one for each processor,
            at least two.

    Attributes:
        path: The socket's path.

    Raises:
        PolicyError: The policy's file is bad.
        BrokerError: EADDRINUSE: another broker has the socket; or it cannot be made. EINVAL: a
            socket that was given has no path, and *state* none either.
    """

    def __init__(
        self,
        socket: str | os.PathLike[str] | sockets.socket,
        policy: Policy | str | os.PathLike[str] | None = None,
        *,
        state: str | os.PathLike[str] | None = None,
        log: Log | None = None,
        workers: int | None = None,
    ) -> None:
        self._policy = PolicyFile(policy)
        given = socket if isinstance(socket, sockets.socket) else None
        self.path = str(given.getsockname()) if given is not None else os.fspath(socket)  # type: ignore[arg-type]
        self._given = given
        if state is None and not os.path.isabs(self.path) and given is not None:
            raise BrokerError(errno.EINVAL, self.path, "has no file, so that it needs state=")
        self._state_path = os.fspath(state) if state is not None else f"{self.path}.state"
        self._log = log if log is not None else _silent
        self._workers = workers
        self._periodic: list[tuple[float, Callable[[], None]]] = []
        self._broker: Broker | None = None
        self._thread: threading.Thread | None = None
        self._wanted: set[str] = set()
        #: Called when a stop begins, and with what was wrong (or None) when the policy was read.
        self.on_stop: Callable[[], None] = lambda: None
        self.on_reload: Callable[[str | None], None] = lambda _: None

    def _open(self) -> None:
        """Make everything, and accept connections."""
        if self._broker is not None:
            raise ClosedError("a LoopServer that serves already, or has been used, to serve again")
        self._state = State.open(self._state_path)
        try:
            self._listener = self._given if self._given is not None else _listen(self.path)
            try:
                broker = Broker(self._listener, self._policy, self._state, self._log, self._workers)
                broker.poller.on_wake = self._woken
                for seconds, call in self._periodic:
                    self._repeat(broker, seconds, call)
                self._broker = broker
                broker.start()
                if self._wanted:
                    broker.poller.wake()
            except BaseException:
                self._close_socket()
                raise
        except BaseException:
            self._state.close()
            raise

    def _repeat(self, broker: Broker, seconds: float, call: Callable[[], None]) -> None:
        def run() -> None:
            call()
            broker.poller.later(seconds, run)

        broker.poller.later(seconds, run)

    def call_every(self, seconds: float, call: Callable[[], None]) -> None:
        """Have something called in the server's loop, as a sign of its life; before it serves."""
        self._periodic.append((seconds, call))

    def serve_forever(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until stop() is called, by a signal handler for one.

        Args:
            ready: Called once connections are accepted.
        """
        self._open()
        if ready is not None:
            ready()
        self._run()

    def _run(self) -> None:
        assert self._broker is not None
        try:
            self._broker.poller.run()
        finally:
            try:
                self._broker.close()
            finally:
                self._close_socket()
                self._state.close()

    def _close_socket(self) -> None:
        if self._given is None:
            self._listener.close()
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass

    def stop(self) -> None:
        """End: all devices are synced, detached and removed. From any thread or signal handler."""
        self._want("stop")

    def reload(self) -> None:
        """Read the policy's file again; a bad one is told to the log, and changes nothing.

        From any thread or signal handler. It counts for every later request; devices that were
        given out stay given.
        """
        self._want("reload")

    def _want(self, what: str) -> None:
        self._wanted.add(what)
        if self._broker is not None:
            try:
                self._broker.poller.wake()
            except OSError:
                pass  # it has ended

    def _woken(self) -> None:
        broker = self._broker
        assert broker is not None
        # Taken off before it is done: what another thread asks for meanwhile is done once more.
        if "reload" in self._wanted:
            self._wanted.discard("reload")
            try:
                self._policy.reload()
            except PolicyError as exc:
                broker.log("policy kept", None, reason=str(exc))
                self.on_reload(str(exc))
            else:
                broker.apply_policy()
                broker.log("policy", None, path=self._policy.path)
                self.on_reload(None)
        if "stop" in self._wanted:
            self._wanted.discard("stop")
            self.on_stop()
            broker.stop()

    def __enter__(self) -> Self:
        self._open()
        self._thread = threading.Thread(target=self._run, name="loopdev-broker", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()


def _silent(_event: str, _facts: dict[str, object]) -> None:
    pass


def _check_unserved(path: str) -> None:
    """Raise OSError: EADDRINUSE: somebody listens, who need not have the same state file."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) != errno.ECONNREFUSED:
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _listen(path: str) -> sockets.socket:
    """Return a socket that listens; the file that an earlier broker left is replaced."""
    listener = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    try:
        try:
            if stat.S_ISSOCK(os.lstat(path).st_mode):
                _check_unserved(path)
                os.unlink(path)
        except FileNotFoundError:
            pass
        listener.bind(path)
        # Who may do what is the policy's to say, so that those refused are told.
        os.chmod(path, 0o666)
        listener.listen(_BACKLOG)
    except OSError as exc:
        listener.close()
        code = exc.errno or errno.EIO
        raise BrokerError(code, path, f"cannot listen: {exc.strerror or exc}") from exc
    return listener
