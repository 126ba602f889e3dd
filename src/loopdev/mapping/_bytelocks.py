# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Exclusive locks between the threads of several processes, each named by a byte of a file.

Between processes they are open file description locks (fcntl_locking(2), Linux 3.15), which the
kernel frees when the last thread of their process is gone, whatever ended it. The threads of one
process share its description, to which its own locks are no hindrance, so a table of those held
here stands before them.
"""

from __future__ import annotations

import _thread
import fcntl
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.kernel.fds import OwnedFd

# struct flock: l_type, l_whence, l_start, l_len, l_pid (which must be 0), and the alignment
_flock = struct.Struct("@hhqqi0q")
# How long to sleep before asking again whether another process still holds a byte, in seconds.
# (F_OFD_SETLKW would be woken at once, but knows no deadline: a stopped process would hang us.)
_FIRST_PAUSE = 50e-6
_LONGEST_PAUSE = 1e-3


class ByteLocks:
    """The locks of one process. It must not fork a child that lives on: that would keep them.

    Args:
        file: Opened for writing by this process alone, after it was forked; owned from here on.
    """

    def __init__(self, file: OwnedFd) -> None:
        self._file = file
        self._mutex = _thread.allocate_lock()
        # The bytes that a thread of this process holds or tries to get, each with the gates of
        # the threads that wait for it.
        self._held: dict[int, list[_thread.LockType]] = {}

    def try_acquire(self, byte: int) -> bool:
        """Take a lock if it is free; return whether it was."""
        with self._mutex:
            if byte in self._held:
                return False
            self._held[byte] = []
        return self._acquire_file(byte)

    def reserve(self, byte: int) -> None:
        """Take a lock for the thread of this process that asks for it first; nobody has it yet.

        It is the only one that a child may have: that which alone uses these locks from then on.
        """
        self._request(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, byte)

    def acquire(self, byte: int, deadline: float | None) -> bool:
        """Wait for a lock and take it.

        Args:
            byte: Which one.
            deadline: In seconds of :func:`time.monotonic`; None waits for ever.

        Returns:
            Whether it was taken before the deadline; one try is made even if that has passed.
        """
        pause = _FIRST_PAUSE
        while True:
            gate = self._claim(byte)
            if gate is None and self._acquire_file(byte):
                return True
            left = -1 if deadline is None else deadline - time.monotonic()
            if deadline is not None and left <= 0:
                return False
            if gate is not None:
                gate.acquire(True, min(left, _thread.TIMEOUT_MAX))
            else:
                time.sleep(pause if deadline is None else min(pause, left))
                pause = min(pause * 1.5, _LONGEST_PAUSE)

    def release(self, byte: int) -> None:
        """Let a lock go that this thread holds, and wake those who wait for it here."""
        try:
            self._request(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
        finally:
            self._open_gates(byte)

    def is_held(self, byte: int) -> bool:
        """Return whether anybody holds a lock at this moment, or tries to."""
        if byte in self._held:
            return True
        answer = self._request(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte)
        kind: int = _flock.unpack(answer)[0]
        return kind != fcntl.F_UNLCK

    def close(self) -> None:
        """Let all locks go."""
        self._file.close()

    def _claim(self, byte: int) -> _thread.LockType | None:
        # None: this thread may ask the file. Else a gate, that opens when another one let go.
        with self._mutex:
            gates = self._held.get(byte)
            if gates is None:
                self._held[byte] = []
                return None
            gate = _thread.allocate_lock()
            gate.acquire()
            gates.append(gate)
            return gate

    def _open_gates(self, byte: int) -> None:
        with self._mutex:
            gates = self._held.pop(byte)
        for gate in gates:
            gate.release()

    def _acquire_file(self, byte: int) -> bool:
        try:
            self._request(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, byte)
        except BlockingIOError:
            self._open_gates(byte)
            return False
        except BaseException:
            self._open_gates(byte)
            raise
        return True

    def _request(self, command: int, kind: int, byte: int) -> bytes:
        lock = _flock.pack(kind, 0, byte, 1, 0)
        answer: bytes = fcntl.fcntl(self._file.fileno(), command, lock)
        return answer
