# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A FUSE filesystem with one file whose server can be made to stop answering."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

from oracle import wait_until

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
# More than who looks for filesystems reads at the beginning and at the end of a device.
SIZE = 16 << 20


class StoppedFuse:
    """A mount of one regular file of zeros, served by a child process.

    Args:
        file: Where.
        user: Who serves it, to the kernel.
        directory: It is an empty directory instead, in which nothing can be made.
    """

    def __init__(self, file: Path, user: int = 0, directory: bool = False) -> None:
        self.file, self._user, self._mode = file, user, 0o40755 if directory else 0o100644
        if not directory:
            file.touch()

    def __enter__(self) -> StoppedFuse:
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(self.file), str(self._user), f"{self._mode:o}"],
            stdout=subprocess.PIPE,
        )
        assert self._server.stdout.readline() == b"ready\n"
        return self

    def stop(self) -> None:
        """Stop the server: what asks for the file's attributes waits from here on."""
        self._server.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._server.send_signal(signal.SIGCONT)

    def mute(self) -> None:
        """Have requests read and not answered: not even SIGKILL ends the wait for those."""
        self._server.send_signal(signal.SIGUSR1)
        assert self._server.stdout.readline() == b"mute\n"

    def kill(self) -> None:
        """End the server: whoever waits gets an error."""
        self._server.kill()
        self._server.wait()

    def __exit__(self, *_: object) -> None:
        if self._server.poll() is None:
            self.resume()
        # Whoever waited for an answer may only now be able to close the file.
        try:
            wait_until(self._unmounted)
        except AssertionError:
            subprocess.run(["umount", "--lazy", self.file], check=True)
            self._server.kill()
            raise
        self._server.wait()
        self._server.stdout.close()

    def _unmounted(self) -> bool:
        return subprocess.run(["umount", self.file], stderr=subprocess.DEVNULL).returncode == 0


def _attributes(mode: int) -> bytes:
    return struct.pack("<QQQQQQIIIIIIIIII", 1, SIZE, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _answer(opcode: int, body: bytes, mode: int) -> bytes | int:
    if opcode == 26:  # INIT
        return struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, 1, 12, 10, 1 << 17, 1, 32, 0, 0)
    if opcode == 3:  # GETATTR, valid for no time
        return struct.pack("<QII", 0, 0, 0) + _attributes(mode)
    if opcode == 1:  # LOOKUP
        return -2
    if opcode in (14, 27):  # OPEN, OPENDIR
        return struct.pack("<QII", 1, 0, 0)
    if opcode == 15:  # READ
        offset, size = struct.unpack_from("<8xQI", body)
        return bytes(max(0, min(size, SIZE - offset)))
    if opcode in (18, 20, 25, 29):  # RELEASE, FSYNC, FLUSH, RELEASEDIR
        return b""
    return -38


_mute = False


def _be_mute(*_: object) -> None:
    global _mute  # noqa: PLW0603 - a signal handler has nothing else
    _mute = True
    print("mute", flush=True)


def _serve(path: str, user: str, mode: str) -> None:
    import ctypes

    fd = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode={mode},user_id={user},group_id=0,allow_other".encode()
    if libc.mount(b"fake", path.encode(), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    signal.signal(signal.SIGUSR1, _be_mute)
    print("ready", flush=True)
    while True:
        try:
            request = os.read(fd, 1 << 20)
        except FileNotFoundError:
            continue  # interrupted before it was read
        except OSError:
            return  # unmounted
        _, opcode, unique, *_ = _IN.unpack_from(request)
        if opcode in (2, 42, 36):  # FORGET, BATCH_FORGET, INTERRUPT
            continue
        if _mute:
            continue
        answer = _answer(opcode, request[_IN.size :], int(mode, 8))
        body = b"" if isinstance(answer, int) else answer
        error = answer if isinstance(answer, int) else 0
        try:
            os.write(fd, _OUT.pack(_OUT.size + len(body), error, unique) + body)
        except OSError:
            pass  # the asker was killed


if __name__ == "__main__":
    _serve(*sys.argv[1:])
