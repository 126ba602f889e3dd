# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Shared memory: it is shared, aligned, takes nothing before it is used, and says where it is."""

from __future__ import annotations

import os
import re

import pytest

from loopdev.errors import KernelError
from loopdev.kernel import libc
from loopdev.kernel.hugepages import HUGE_PAGE, SharedMemory

LENGTH = 4 * HUGE_PAGE


@pytest.fixture
def memory():
    made = SharedMemory(LENGTH)
    yield made
    made.close()


def mapping(address: int) -> dict[str, int]:
    """Return what the kernel says of the mapping that begins at an address, in bytes."""
    with open("/proc/self/smaps") as file:
        text = file.read()
    found = re.search(rf"^{address:x}-.*\n((?:\w+: .*\n)+)", text, re.MULTILINE)
    assert found is not None
    rows = re.findall(r"(\w+): +(\d+) kB", found.group(1))
    return {name: int(number) << 10 for name, number in rows}


def test_is_aligned_and_as_long_as_asked_for(memory):
    assert memory.address % HUGE_PAGE == 0
    assert len(memory.data) == mapping(memory.address)["Size"] == LENGTH
    memory.data[5] = 77
    assert bytes(memory.data[:8]) == bytes([0, 0, 0, 0, 0, 77, 0, 0])


def test_takes_no_memory_before_it_is_used(memory):
    assert mapping(memory.address)["Rss"] == 0
    memory.data[HUGE_PAGE] = 1
    assert mapping(memory.address)["Rss"] == 4096


def test_is_shared_with_a_child(memory):
    pid = os.fork()
    if pid == 0:
        memory.data[LENGTH - 1] = 9
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert memory.data[LENGTH - 1] == 9


def test_what_is_made_is_there_and_zero(memory):
    huge = memory.make(HUGE_PAGE, 2 * HUGE_PAGE)
    after = mapping(memory.address)
    assert not any(memory.data)
    assert after["ShmemPmdMapped"] == (2 * HUGE_PAGE if huge else 0)
    assert after["Rss"] == (2 * HUGE_PAGE if huge else 2 * 4096)
    memory.data[HUGE_PAGE + 5 : HUGE_PAGE + 7] = b"ab"
    assert bytes(memory.data[HUGE_PAGE + 4 : HUGE_PAGE + 8]) == b"\0ab\0"


def test_made_again_it_keeps_its_first_page_only(memory):
    """Whoever is killed between making and noting it is followed by one who makes it again."""
    first = memory.make(0, HUGE_PAGE)
    assert memory.make(0, HUGE_PAGE) == first


def test_a_kernel_without_them(memory, monkeypatch):
    def refuse(name, *args):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(libc, "call", refuse)
    assert not memory.make(0, HUGE_PAGE)
    memory.data[0:4] = b"abcd"
    assert bytes(memory.data[0:4]) == b"abcd"
    with pytest.raises(KernelError, match="shared memory"):
        SharedMemory(LENGTH)


def test_a_view_outlives_it():
    memory = SharedMemory(LENGTH)
    memory.data[3] = 4
    view = memory.data[:8]
    memory.close()
    assert view[3] == 4
    with pytest.raises(ValueError, match="released"):
        memory.data[0]
