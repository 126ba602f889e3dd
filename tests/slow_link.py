# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces with a link between them that is slow or loses packets.

tc netem does that, between two ends of a veth. Where the kernel has no netem, a program stands
between two TUN devices and keeps each packet for a while; see relay.c. Either way TCP sees segments
of 1448 bytes.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

CLIENT_ADDRESS, SERVER_ADDRESS = "10.77.83.1", "10.77.83.2"
RELAY = Path(__file__).with_name("relay.c")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


class SlowLink:
    """The two namespaces; named after *name*, and gone at the end of the ``with``.

    Attributes:
        netem: Whether it is tc netem that delays.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.client, self.server = f"{name}-client", f"{name}-server"
        self._ends = {self.client: f"{name[:9]}-c", self.server: f"{name[:9]}-s"}
        self._addresses = {self.client: CLIENT_ADDRESS, self.server: SERVER_ADDRESS}
        self._relay: subprocess.Popen[str] | None = None
        self.netem = False

    def __enter__(self) -> SlowLink:
        self.open()
        return self

    def open(self) -> None:
        """Make it, or raise OSError where that is not possible."""
        try:
            for namespace in self._ends:
                run("ip", "netns", "add", namespace)
            self.netem = self._has_netem()
            if self.netem:
                ends = [*self._ends.values()]
                run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            else:
                self._start_relay()
            for namespace, end in self._ends.items():
                self._configure(namespace, end)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def _has_netem(self) -> bool:
        command = ["tc", "-n", self.client, "qdisc", "add", "dev", "lo", "root", "netem"]
        if subprocess.run([*command, "delay", "1ms"], capture_output=True).returncode:
            return False
        run("tc", "-n", self.client, "qdisc", "del", "dev", "lo", "root")
        return True

    def _start_relay(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            program = f"{directory}/relay"
            run("gcc", "-O2", "-o", program, str(RELAY))
            self._relay = subprocess.Popen(
                [program, *self._ends.values()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._relay.stdout is not None
        if self._relay.stdout.readline() != "ready\n":
            raise OSError("there is no /dev/net/tun")

    def _configure(self, namespace: str, end: str) -> None:
        run("ip", "link", "set", end, "netns", namespace)
        address, other = self._addresses[namespace], set(self._addresses.values())
        (peer,) = other - {address}
        run("ip", "-n", namespace, "address", "add", address, "peer", peer, "dev", end)
        run("ip", "-n", namespace, "link", "set", end, "mtu", "1500", "txqueuelen", "10000")
        for device in ("lo", end):
            run("ip", "-n", namespace, "link", "set", device, "up")

    def set(self, delay: float = 0.0, loss: float = 0.0) -> None:
        """Delay packets in each direction by *delay* seconds, and lose a part of them."""
        if self._relay is not None:
            assert self._relay.stdin is not None
            assert self._relay.stdout is not None
            self._relay.stdin.write(f"{delay} {loss}\n")
            self._relay.stdin.flush()
            self._relay.stdout.readline()
            return
        for namespace, end in self._ends.items():
            run(
                *("tc", "-n", namespace, "qdisc", "replace", "dev", end, "root", "netem"),
                *("limit", "100000", "delay", f"{delay * 1e6:.0f}us", "loss", f"{loss:%}"),
            )

    def command(self, namespace: str, *command: str) -> list[str]:
        """Return a command that runs another one in a namespace; in that of networks only."""
        # Not "ip netns exec": that makes a namespace of mounts, too.
        return ["nsenter", f"--net=/run/netns/{namespace}", *command]

    def close(self) -> None:
        """Remove all of it."""
        if self._relay is not None:
            self._relay.terminate()
            self._relay.communicate()
            self._relay = None
        for namespace in self._ends:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
