# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev serve``."""

from __future__ import annotations

import os

from loopdev.cli._args import Args, Option

HELP = "give loop devices to processes that have no /dev and no privileges"
OPERANDS = ()
OPTIONS = (
    Option(
        *("--socket",),
        convert=str,
        metavar="PATH",
        help="listen here (default: what systemd listens on, else /run/loopdev/broker.sock)",
    ),
    Option(
        *("--policy",),
        convert=str,
        metavar="FILE",
        help="who may have what (default: /etc/loopdev/policy.toml if it exists, else root alone)",
    ),
    Option("--check", help="say whether the policy is good, and do no more"),
)
EXAMPLES = """\
  loopdev serve                            as a service, by systemd or by hand
  loopdev serve --policy policy.toml --check
  kill -HUP PID                            read the policy again"""
SOCKET = "/run/loopdev/broker.sock"
POLICY = "/etc/loopdev/policy.toml"


def run(args: Args) -> int:
    """Serve until a signal asks to end: SIGTERM and SIGINT end, SIGHUP reads the policy again."""
    policy = args.policy if args.policy is not None or not os.path.exists(POLICY) else POLICY
    if args.check:
        from loopdev.broker.policy import PolicyFile

        found = PolicyFile(policy)
        print(f"{policy or 'root alone'}: {len(found.policy.rules)} rules")
        return 0
    import signal
    import socket

    from loopdev.broker import _systemd
    from loopdev.broker.server import LoopServer

    where: str | socket.socket = args.socket or SOCKET
    if args.socket is None:
        where = _systemd.listening_socket() or where
    if not isinstance(where, socket.socket):
        os.makedirs(os.path.dirname(os.path.abspath(where)), mode=0o755, exist_ok=True)
    _raise_limit()
    server = LoopServer(where, policy, log=_systemd.EventLog())
    _systemd.watch(server.call_every)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    signal.signal(signal.SIGHUP, lambda *_: server.reload())
    server.on_stop = lambda: _systemd.notify("STOPPING=1")
    server.on_reload = _reloaded
    server.serve_forever(lambda: _systemd.notify(f"READY=1\nSTATUS=Listening on {server.path}"))
    return 0


def _reloaded(problem: str | None) -> None:
    import time

    from loopdev.broker import _systemd

    status = "Policy read again" if problem is None else f"Old policy kept: {problem}"
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    _systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={now}")
    _systemd.notify(f"READY=1\nSTATUS={status}")


def _raise_limit() -> None:
    """Allow as many connections as may be."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
