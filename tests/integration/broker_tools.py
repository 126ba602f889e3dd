# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A broker in a process of its own, and clients in namespaces of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle import wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = Path(sys.executable).with_name("loopdev")
FIRST = 1000
# What is not root, and is nobody's on the machine.
USER = 54321


class Served:
    """A broker that ``loopdev serve`` runs.

    Args:
        launcher: Words before the command.

    Attributes:
        path: Its socket.
    """

    def __init__(
        self,
        directory: Path,
        policy: str | None = None,
        launcher: tuple[str, ...] = (),
        **environment: str,
    ) -> None:
        self.directory, self._environment = directory, environment
        self._launcher = launcher
        self.path = str(directory / "broker.sock")
        self.log_path = directory / "broker.log"
        self.policy = directory / "policy.toml"
        if policy is not None:
            self.policy.write_text(policy)
        self._options = ["--policy", str(self.policy)] if policy is not None else []

    def start(self) -> Served:
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [*self._launcher, COMMAND, "serve", "--socket", self.path, *self._options],
                stderr=log,
                env={**os.environ, **self._environment},
            )
        wait_until(self._answers)
        # It accepts before it has started those, and their sockets would be taken for leaks.
        wait_until(lambda: len(self.workers()) >= 2)
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            return probe.connect_ex(self.path) == 0

    def log(self) -> str:
        return self.log_path.read_text()

    def workers(self) -> list[int]:
        return children(self.process.pid)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(30) == 0, self.log()

    def __enter__(self) -> Served:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert "Traceback" not in self.log(), self.log()
        left = left_behind()
        assert left == [], f"{left}\n{self.log()}"


def children(pid: int) -> list[int]:
    """Return a process's children, without starting one to find out."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                parent = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(name))
    return found


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """Return a process's resident memory in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError(pid)


def left_behind() -> list[str]:
    """Return what a broker must not leave: its numbers, and its directories of nodes."""
    numbers = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    found = [name for name in numbers if int(name[4:]) >= FIRST]
    found += [name for name in os.listdir("/dev") if name.startswith(".loopdev-")]
    with open("/proc/self/mountinfo") as mounts:
        return found + [line.split()[4] for line in mounts if "/.loopdev-" in line]


def interpreter(user: int) -> str:
    """Return a Python that another user may run: this one may be in somebody's home."""
    for path in (sys.executable, "/usr/bin/python3"):
        ids = ["--reuid", str(user), "--regid", str(user), "--clear-groups"]
        words = ["setpriv", *ids, "sh", "-c", 'exec "$0" -c "$1"', path]
        check = "import sys; sys.exit(sys.version_info < (3, 11))"
        if subprocess.run([*words, check], capture_output=True).returncode == 0:
            return path
    pytest.skip("there is no Python 3.11 that another user may run")


@contextlib.contextmanager
def in_namespaces(script: str, *arguments: object, user: int = USER) -> Iterator[subprocess.Popen]:
    """Run Python in mount, pid and user namespaces of its own, without any capability.

    Its /dev is a tmpfs that the user namespace has mounted, with nothing but null in it.
    """
    setup = f"""
mount -t tmpfs -o mode=755 none /dev && : > /dev/null2 && mount -t proc none /proc &&
exec setpriv --inh-caps=-all --ambient-caps=-all --bounding-set=-all --no-new-privs \
  {interpreter(user)} -W error -c "$0" "$@"
"""
    process = subprocess.Popen(
        [
            *("setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups"),
            *("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"),
            *("sh", "-c", setup, script, *map(str, arguments)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HOME": "/nonexistent"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            stream.close()


def outcome(process: subprocess.Popen) -> dict[str, object]:
    """Return what such a program prints at its end."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def as_user(script: str, *arguments: object, user: int = USER) -> subprocess.CompletedProcess:
    """Run Python as another user, in the host's namespaces."""
    return subprocess.run(
        [
            *("setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups"),
            *("sh", "-c", f'exec {interpreter(user)} -c "$0" "$@"', script, *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )


def open_to(user: int, *paths: Path) -> None:
    """Let another user reach files below a test's directory, and have them."""
    for path in paths:
        os.chown(path, user, user)
        for parent in [*path.parents][:-1]:
            parent.chmod(parent.stat().st_mode | 0o011)


def stop_process(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
