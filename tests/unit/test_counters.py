# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The page of counters: written by workers, read by anybody, through any number of deaths."""

from __future__ import annotations

import os
import struct

import pytest

from loopdev.errors import KernelError
from loopdev.mapping._counters import DAMAGES, Counters


@pytest.fixture
def counters(tmp_path):
    made = Counters.create(str(tmp_path / "counters"), 3)
    yield made
    made.close()


def looked(tmp_path):
    found = Counters.look(str(tmp_path / "counters"))
    try:
        return found.totals()
    finally:
        found.close()


def test_a_new_page(counters, tmp_path):
    totals = looked(tmp_path)
    assert totals.as_dict() | {"uptime": 0} == {
        **dict.fromkeys(
            ("requests", "bytes", "hits", "misses", "errors", "damaged", "restarts"), 0
        ),
        "workers": (),
        "uptime": 0,
    }
    assert 0 <= totals.uptime < 60
    assert (tmp_path / "counters").stat().st_mode & 0o777 == 0o600


def test_what_workers_count(counters, tmp_path):
    for number in range(3):
        row = counters.row(number)
        row.begin(100 + number)
        for _ in range(4):
            row.take()
        row.answer()
        row.answer_read(1000)
        row.wait()
        row.answer_late(300, False)
        row.wait()
        row.answer_late(300, True)
    totals = looked(tmp_path)
    assert (totals.requests, totals.hits, totals.misses, totals.errors) == (12, 3, 6, 3)
    assert totals.bytes == 3 * 1300
    assert totals.workers == (100, 101, 102)
    assert [counters.progress(number) for number in range(3)] == [(4, 0)] * 3


def test_what_a_dead_worker_had_is_in_nobodys_hands(counters):
    row = counters.row(1)
    row.begin(1)
    for _ in range(5):
        row.take()
    row.answer()
    row.answer_late(10, False)
    assert counters.progress(1) == (5, 3)
    again = counters.row(1)
    again.begin(2)
    assert counters.progress(1) == (5, 0)
    again.take()
    assert counters.progress(1) == (6, 1)


def test_another_process_counts(counters, tmp_path):
    pid = os.fork()
    if pid == 0:
        row = counters.row(0)
        row.begin(os.getpid())
        row.take()
        row.answer_read(77)
        os._exit(0)
    os.waitpid(pid, 0)
    counters.restarted()
    totals = looked(tmp_path)
    assert (totals.requests, totals.bytes, totals.restarts) == (1, 77, 1)
    assert totals.workers == (pid,)


def test_damages_are_told_once(counters, tmp_path):
    assert [counters.note_damage(block) for block in (0, 7, 0, 7, 8)] == [
        *(True, True, False, False, True),
    ]
    assert looked(tmp_path).damaged == 3


def test_no_more_damages_are_told_than_there_is_room_for(counters, tmp_path):
    told = [counters.note_damage(block) for block in range(DAMAGES + 20)]
    assert told == [True] * DAMAGES + [False] * 20
    assert looked(tmp_path).damaged == DAMAGES
    # Nothing else was overwritten.
    assert looked(tmp_path).requests == 0


def test_damages_told_by_many_processes(counters, tmp_path):
    """Each is told by one of them."""
    reading, writing = os.pipe()
    for _ in range(4):
        if os.fork() == 0:
            told = sum(counters.note_damage(block) for block in range(50))
            os.write(writing, struct.pack("=I", told))
            os._exit(0)
    for _ in range(4):
        os.wait()
    told = struct.unpack("=4I", os.read(reading, 16))
    os.close(reading)
    os.close(writing)
    assert sum(told) == 50
    assert looked(tmp_path).damaged == 50


def test_a_page_that_is_there(counters, tmp_path):
    with pytest.raises(KernelError, match="EEXIST"):
        Counters.create(str(tmp_path / "counters"), 3)


@pytest.mark.parametrize("data", [None, b"", b"x" * 10, bytes(8320), b"loopdev2" + bytes(8320)])
def test_pages_that_are_none(tmp_path, data):
    path = tmp_path / "counters"
    if data is not None:
        path.write_bytes(data)
    assert Counters.look(str(path)) is None


@pytest.mark.parametrize("workers", [0, 4, 1000, 1 << 60])
def test_a_page_that_lies(counters, tmp_path, workers):
    """A number of workers that it has no rows for."""
    with open(tmp_path / "counters", "r+b") as file:
        file.seek(8)
        file.write(struct.pack("=Q", workers))
    assert Counters.look(str(tmp_path / "counters")) is None


def test_reading_does_not_write(counters, tmp_path):
    found = Counters.look(str(tmp_path / "counters"))
    with pytest.raises(TypeError):
        found.restarted()
    found.close()
