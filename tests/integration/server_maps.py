# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Maps of images on the test server, made by the command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "unit"))
import pbs
import pbs_server

DISK = f"{pbs.SNAPSHOT}/{pbs.DISK}"
LOOPDEV = str(Path(sys.executable).with_name("loopdev"))
NAME = f"server-test-{os.getpid()}"
MAPS = Path("/run/loopdev/maps")


class Maps:
    """The command, with the server's secrets in its environment; nothing outlives the ``with``."""

    def __init__(self, server, log: Path) -> None:
        self.server, self.log = server, log
        self.environment = {
            **os.environ,
            "PBS_PASSWORD": pbs_server.PASSWORD,
            "PBS_FINGERPRINT": server.fingerprint,
        }

    def __enter__(self) -> Maps:
        return self

    def __exit__(self, *_: object) -> None:
        if (MAPS / NAME).exists():
            self.run("unmap", "--force", NAME)
        assert not (MAPS / NAME).exists()
        wait_for(lambda: not self.processes())  # the last to go has let go of all else before

    def run(self, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
        environment = self.environment | options.pop("environment", {})
        return subprocess.run(
            [LOOPDEV, *words],
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            **options,
        )

    def map(self, source: str = DISK, *options: str) -> str:
        done = self.run(*self.words(source, *options))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def words(self, source: str, *options: str) -> list[str]:
        words = ["map", "--name", NAME, "--log", str(self.log), *options, source]
        if not source.startswith("pbs://") and "--repository" not in options:
            words += ["--repository", self.server.repository]
        return words

    def unmap(self) -> None:
        done = self.run("unmap", NAME)
        assert done.returncode == 0, done.stderr

    def processes(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if (path / "cmdline").read_bytes().startswith(f"loopdev: map {NAME}".encode()):
                    found.append(int(path.name))
            except OSError:
                continue
        return found


def content(device: str) -> bytes:
    with open(device, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        data = bytearray()
        while part := file.read(1 << 20):
            data += part
    return bytes(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
