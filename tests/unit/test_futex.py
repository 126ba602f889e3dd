# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Sleeping on shared memory: woken by another process, by time, and not at all."""

from __future__ import annotations

import os
import time

import pytest

from loopdev.kernel import futex
from loopdev.kernel.hugepages import SharedMemory


@pytest.fixture
def memory():
    made = SharedMemory(4096)
    yield made
    made.close()


def test_another_value_is_no_wait(memory):
    memory.data[4] = 1
    begin = time.monotonic()
    futex.wait(memory.address + 4, 0, 30)
    assert time.monotonic() - begin < 10


def test_it_ends_in_time(memory):
    begin = time.monotonic()
    futex.wait(memory.address, 0, 0.05)
    assert 0.05 <= time.monotonic() - begin < 10


def test_woken_by_another_process(memory):
    """It wakes until it hears that it was heard, because the other one may not sleep yet."""
    heard, hear = os.pipe()
    os.set_blocking(heard, False)
    pid = os.fork()
    if pid == 0:
        while True:
            futex.wake(memory.address + 8)
            try:
                os._exit(len(os.read(heard, 1)) - 1)
            except BlockingIOError:
                time.sleep(0.001)
    begin = time.monotonic()
    futex.wait(memory.address + 8, 0, 30)
    os.write(hear, b".")
    assert time.monotonic() - begin < 10
    assert os.waitpid(pid, 0)[1] == 0
    os.close(heard)
    os.close(hear)


def test_an_address_that_is_none():
    with pytest.raises(OSError, match="Invalid argument"):
        futex.wait(3, 0, 1)
