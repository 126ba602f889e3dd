# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Threads that are started as they are needed."""

from __future__ import annotations

import threading
import time

import pytest

from loopdev.fuse.pool import Pool


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Gate:
    """Jobs that wait until they may go on."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.waiting = 0
        self.done: list[int] = []
        self._lock = threading.Lock()

    def job(self, number: int):
        def run() -> None:
            with self._lock:
                self.waiting += 1
            self.open.wait(10)
            with self._lock:
                self.waiting -= 1
                self.done.append(number)

        return run


def test_every_job_is_done_once():
    pool, lock, done = Pool(4), threading.Lock(), []
    for number in range(1000):

        def job(number=number) -> None:
            with lock:
                done.append(number)

        pool.run(job)
    wait_until(lambda: len(done) == 1000)
    assert sorted(done) == list(range(1000))


def test_no_more_at_a_time_than_allowed():
    pool, gate = Pool(3), Gate()
    for number in range(10):
        pool.run(gate.job(number))
    wait_until(lambda: gate.waiting == 3)
    time.sleep(0.02)
    assert gate.waiting == 3
    gate.open.set()
    wait_until(lambda: len(gate.done) == 10)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_job_gets_a_thread_while_there_are_some(count):
    """None waits behind another one that waits."""
    pool, gate = Pool(5), Gate()
    for number in range(count):
        pool.run(gate.job(number))
    wait_until(lambda: gate.waiting == count)
    gate.open.set()
    wait_until(lambda: len(gate.done) == count)


def test_in_order():
    pool, done = Pool(1), []
    for number in range(200):
        pool.run(lambda number=number: done.append(number))
    wait_until(lambda: len(done) == 200)
    assert done == list(range(200))


def test_threads_are_used_again():
    pool, seen = Pool(8), set()
    for _ in range(20):
        before = threading.Event()

        def job(before=before) -> None:
            seen.add(threading.get_ident())
            before.set()

        pool.run(job)
        assert before.wait(10)
        wait_until(lambda: not pool.busy)
    assert len(seen) <= 3


def test_a_job_that_fails_is_told_of_and_hurts_nobody(capsys):
    pool, done = Pool(1), threading.Event()
    pool.run(lambda: 1 / 0)
    pool.run(done.set)
    assert done.wait(10)
    assert "ZeroDivisionError" in capsys.readouterr().err
