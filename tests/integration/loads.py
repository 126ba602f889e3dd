# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Processes that read a device, or just have it open."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from oracle import SLOW, run

FIO_SIZE = 64 << 20


class Load:
    """Random reads by fio, each of them checked, while a ``with`` lasts.

    Args:
        device: What is read; :func:`written_by_fio` wrote what is in it.
        seconds: For how long.
    """

    def __init__(self, device: str, seconds: float, depth: int = 8) -> None:
        rate = int(FIO_SIZE / 4096 / seconds)  # it ends when it has read all once
        self._words = [
            *("fio", "--name=load", f"--filename={device}", "--rw=randread", "--bs=4k"),
            *("--direct=1", "--ioengine=libaio", f"--iodepth={depth}", "--verify=crc32c"),
            *("--verify_fatal=1", f"--rate_iops={rate}", "--output-format=json"),
            *("--verify_state_save=0", "--readonly", "--random_generator=lfsr"),
        ]

    def __enter__(self) -> Load:
        self._fio = subprocess.Popen(
            self._words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return self

    def running(self) -> bool:
        return self._fio.poll() is None

    def result(self) -> dict[str, int]:
        """Wait for its end, and return its error and how many reads it did."""
        out, err = self._fio.communicate(timeout=60 * SLOW)
        [job] = json.loads(out[out.index("{") :])["jobs"]
        return {"error": job["error"], "reads": job["read"]["total_ios"], "said": err}

    def __exit__(self, *_: object) -> None:
        self._fio.kill()
        self._fio.communicate()


def written_by_fio(path: Path) -> Path:
    """Write a file that fio can verify."""
    run(
        *("fio", "--name=load", f"--filename={path}", "--rw=write", "--bs=4k"),
        f"--size={FIO_SIZE}",
        *("--verify=crc32c", "--do_verify=0", "--verify_state_save=0"),
        cwd=path.parent,
    )
    return path


class Reader:
    """A read in another process, since it may hang."""

    all: ClassVar[list[Reader]] = []
    CODE = """
import os, sys, mmap
path, offset, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
print("reading", flush=True)
try:
    os.preadv(fd, [mmap.mmap(-1, length)], offset)
except OSError as exc:
    sys.exit(exc.errno)
"""

    def __init__(self, path: object, offset: int, length: int = 4096) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", self.CODE, str(path), str(offset), str(length)],
            stdout=subprocess.PIPE,
        )
        self.all.append(self)
        assert self._process.stdout.readline() == b"reading\n"
        self.pid = self._process.pid

    def result(self, timeout: float) -> int:
        """Return 0 or an errno; wait for *timeout* seconds at most, on a usual machine."""
        return self._process.wait(timeout * SLOW)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def is_waiting(self) -> bool:
        return self._process.poll() is None


class Holder:
    """Another process that has a device open."""

    def __init__(self, path: object) -> None:
        code = "import sys, time; f = open(sys.argv[1], 'rb'); print(1, flush=True); time.sleep(99)"
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", code, str(path)], stdout=subprocess.PIPE
        )
        self._process.stdout.readline()
        self.pid = self._process.pid

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
