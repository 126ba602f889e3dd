# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces with a link between them that is slow or loses packets.

tc netem does that, between two ends of a veth. Where the kernel has no netem, this program stands
between two TUN devices and keeps each packet for a while; packets are as large as TCP makes them
before segmentation, so it keeps up. Either way TCP sees segments of 1448 bytes.

Usage, as a program: python tests/slow_link.py CLIENT SERVER, which are devices to make. On standard
input it takes lines "DELAY LOSS": seconds in each direction, and a part of the packets.
"""

from __future__ import annotations

import collections
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time

CLIENT_ADDRESS, SERVER_ADDRESS = "10.77.83.1", "10.77.83.2"
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 1, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 1, 2, 4
PACKET = 1 << 17


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
        self._relay = subprocess.Popen(
            [sys.executable, __file__, *self._ends.values()],
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


class Relay:
    """Carries packets between two TUN devices."""

    def __init__(self, names: list[str]) -> None:
        self._fds = [open_tun(name) for name in names]
        self._queues: list[collections.deque[tuple[float, bytes]]] = [
            collections.deque() for _ in names
        ]
        self._delay = self._loss = 0.0

    def run(self) -> None:
        while True:
            soonest = min((queue[0][0] for queue in self._queues if queue), default=None)
            wait = None if soonest is None else max(0.0, soonest - time.monotonic())
            ready, _, _ = select.select([0, *self._fds], [], [], wait)
            if 0 in ready and not self._obey():
                return
            for number, fd in enumerate(self._fds):
                if fd in ready:
                    self._take(number)
                self._deliver(number)

    def _obey(self) -> bool:
        said = os.read(0, 4096).decode()
        for line in said.splitlines():
            self._delay, self._loss = map(float, line.split())
            print("done", flush=True)
        return bool(said)

    def _take(self, number: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(self._fds[number], PACKET)
            except BlockingIOError:
                return
            if random.random() >= self._loss:
                self._queues[number].append((time.monotonic() + self._delay, packet))

    def _deliver(self, number: int) -> None:
        queue, other = self._queues[number], self._fds[1 - number]
        while queue and queue[0][0] <= time.monotonic():
            try:
                os.write(other, queue.popleft()[1])
            except OSError:
                pass  # the device is not up yet, or it is no packet for it


def open_tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    return fd


if __name__ == "__main__":
    relay = Relay(sys.argv[1:3])
    print("ready", flush=True)
    relay.run()
