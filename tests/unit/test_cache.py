# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The cache: no byte is ever wrong and no memory lost, whoever is killed or stopped when."""

from __future__ import annotations

import _thread
import os
import random
import signal
import time
import traceback

import pytest
from test_pool import wait_until

from loopdev.errors import InvalidValueError, WaitTimeoutError
from loopdev.kernel import membarrier
from loopdev.kernel.fds import OwnedFd
from loopdev.mapping import _cache
from loopdev.mapping._bytelocks import ByteLocks
from loopdev.mapping._cache import Cache
from loopdev.mapping._cachetable import READERS

BLOCK = 16 << 10
# The last block is short, and no multiple of anything.
SIZE = 40 * BLOCK - 1003


def content(block: int, length: int = BLOCK, stamp: bytes = bytes(8)) -> bytes:
    """Return what a block is made of: 16 bytes, over and over, that say which and from when."""
    unit = block.to_bytes(8, "little") + stamp
    return (unit * -(-length // 16))[:length]


def producer(block: int, stamp: bytes = bytes(8)):
    def produce(view: memoryview) -> None:
        view[:] = content(block, len(view), stamp)

    return produce


def fill(cache: Cache, *blocks: int, timeout: float = 10) -> None:
    for block in blocks:
        cache.fill(block, producer(block), time.monotonic() + timeout)


def present(cache: Cache) -> list[int]:
    return [block for block in range(40) if cache.present(block)]


def copied(reader, offset: int, length: int) -> bytes | None:
    view = reader.read(offset, length)
    data = None if view is None else bytes(view)
    reader.done()
    return data


def shared_memory() -> int:
    """Return how much of the shared memory that this process has is there, in bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssShmem:"))
    return int(line.split()[1]) << 10


def never(view: memoryview) -> None:
    raise AssertionError("it is present")


class Child:
    """A process that runs ``function(cache, tell, wait)`` as a worker, and tells what it does."""

    def __init__(self, cache: Cache, worker: int, function) -> None:
        told, tell = os.pipe()
        wait, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(told)
                os.close(self._go)
                cache.enter(worker)
                function(cache, lambda text: os.write(tell, text), lambda: os.read(wait, 1))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(tell)
        os.close(wait)
        self._told = told

    def hear(self) -> bytes:
        """Return what it told; nothing when it is gone."""
        return os.read(self._told, 100)

    def go(self) -> None:
        os.write(self._go, b".")

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        self.kill(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def end(self) -> int:
        """Wait for its end and return its exit code, minus the signal."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._told)
        os.close(self._go)
        return code


@pytest.fixture
def make_cache():
    made = []

    def make(size=SIZE, block_size=BLOCK, limit=4 * BLOCK, workers=3) -> Cache:
        made.append(Cache.create(size, block_size, limit, workers))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def test_workers_need_no_other_descriptor(make_cache):
    """A supervisor closes all that it does not know."""
    cache = make_cache()

    def work(cache, tell, wait):
        fill(cache, 5)
        tell(str(len(cache.filenos())).encode())

    pid = os.fork()
    if pid == 0:
        (kept,) = cache.filenos()
        os.closerange(3, kept)
        os.closerange(kept + 1, 1024)
        child = Child(cache, 1, work)
        os._exit(int(child.hear()) - 1 or child.end())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    cache.enter(0)
    assert copied(cache.reader(), 5 * BLOCK, BLOCK) == content(5)


def test_what_was_read_outlives_the_cache():
    cache = Cache.create(SIZE, BLOCK, 0, 1)
    cache.enter(0)
    fill(cache, 5)
    view = cache.reader().read(5 * BLOCK, BLOCK)
    cache.close()
    assert bytes(view) == content(5)
    with pytest.raises(ValueError, match="released"):
        cache.present(5)


@pytest.fixture
def cache(make_cache) -> Cache:
    """A cache of 4 of 40 blocks, of which this process is worker 0."""
    cache = make_cache()
    cache.enter(0)
    return cache


@pytest.fixture
def reader(cache):
    return cache.reader()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("size", (0, 4096, 0, 1)),
        ("block_size", (1, 2048, 0, 1)),
        ("block_size", (1, 12288, 0, 1)),
        ("block_size", (1, 0, 0, 1)),
        ("workers", (1, 4096, 0, 0)),
    ],
)
def test_bad_numbers(name, arguments):
    with pytest.raises(InvalidValueError, match=f"^{name}="):
        Cache.create(*arguments)


def test_is_empty_at_first(cache, reader):
    assert reader.read(0, 1) is None
    assert present(cache) == []
    stats = cache.stats()
    assert (stats.blocks, stats.bytes, stats.fills, stats.evictions) == (0, 0, 0, 0)
    assert stats.limit == 4 * BLOCK


def test_what_was_filled_is_read(cache, reader):
    fill(cache, 7)
    assert present(cache) == [7]
    for offset, length in [(0, BLOCK), (1, 1), (BLOCK - 1, 1), (4096, 4096)]:
        assert copied(reader, 7 * BLOCK + offset, length) == content(7)[offset : offset + length]
    cache.fill(7, never)
    stats = cache.stats()
    assert (stats.blocks, stats.bytes, stats.fills, stats.evictions) == (1, BLOCK, 1, 0)


def test_a_range_in_several_blocks(cache, reader):
    fill(cache, 3, 4, 5)
    whole = content(3) + content(4) + content(5)
    for offset, length in [(0, 3 * BLOCK), (BLOCK - 1, 2), (5, 2 * BLOCK), (BLOCK, 2 * BLOCK)]:
        assert copied(reader, 3 * BLOCK + offset, length) == whole[offset : offset + length]
    assert copied(reader, 3 * BLOCK - 1, 2) is None
    assert copied(reader, 5 * BLOCK, BLOCK + 1) is None


def test_the_last_block_ends_with_the_image_and_then_come_zeros(cache, reader):
    fill(cache, *range(35, 39))  # every frame has something in it
    lengths = []
    cache.fill(39, lambda view: (lengths.append(len(view)), producer(39)(view)))
    tail = BLOCK - 1003
    assert lengths == [tail]
    assert copied(reader, 39 * BLOCK, BLOCK) == content(39, tail) + bytes(1003)


def test_an_image_of_one_byte(make_cache):
    cache = make_cache(size=1, block_size=4096, limit=0, workers=2)
    cache.enter(1)
    cache.fill(0, lambda view: view.__setitem__(slice(None), b"x"))
    assert copied(cache.reader(), 0, 4096) == b"x" + bytes(4095)
    assert cache.stats().limit == 4096


def test_a_large_image_costs_nothing(make_cache):
    before = shared_memory()
    cache = make_cache(size=64 << 40, block_size=4 << 20, limit=1 << 40, workers=64)
    cache.enter(0)
    last = (64 << 40) - 1
    reader = cache.reader()
    assert reader.read(last, 1) is None
    cache.fill(last >> 22, lambda view: view.__setitem__(-1, 7))
    assert copied(reader, last, 1) == b"\7"
    assert shared_memory() - before < (4 << 20) + (1 << 20)  # the frame, and some of the table


def test_the_limit_holds(cache, reader):
    before = shared_memory()
    for block in range(40):
        fill(cache, block)
        assert copied(reader, block * BLOCK, 16) == content(block)[:16]
        assert len(present(cache)) == min(block + 1, 4)
    stats = cache.stats()
    assert (stats.blocks, stats.fills, stats.evictions) == (4, 40, 36)
    assert stats.bytes == 4 * BLOCK
    assert shared_memory() - before <= 4 * BLOCK + 6 * 4096  # and the table


def test_each_worker_and_one_more_have_a_block(make_cache):
    assert make_cache(limit=0, workers=5).stats().limit == 6 * BLOCK
    assert make_cache(limit=1 << 40, workers=5).stats().limit == 40 * BLOCK


def test_what_is_read_stays_longer(cache, reader):
    fill(cache, 0, 1, 2, 3)
    for block in range(4, 20):
        assert copied(reader, 0, 1) is not None
        fill(cache, block)
    assert cache.present(0)


def test_what_was_read_ahead_stays_until_it_is_read(cache, reader):
    """One block is read ahead in each step, through all frames and many times around."""
    fill(cache, 0)
    for block in range(39):
        cache.fill(block + 1, producer(block + 1), leave=True)
        assert copied(reader, block * BLOCK, 16) == content(block)[:16]
    assert cache.stats().fills == 40


def test_a_pinned_block_stays(cache, reader):
    fill(cache, 0)
    view = reader.read(0, BLOCK)
    for block in range(1, 40):
        fill(cache, block)
        assert bytes(view) == content(0)
    assert cache.present(0)
    reader.done()
    fill(cache, *range(1, 9))
    assert not cache.present(0)


def test_what_was_filled_stays_for_who_filled_it(make_cache):
    """However many want its frame before it is read."""
    cache = make_cache(limit=0, workers=1)
    cache.enter(0)
    reader = cache.reader()
    assert cache.capacity == 2
    cache.fill(5, producer(5), time.monotonic() + 10, reader=reader)
    fill(cache, *range(10, 20))
    assert copied(reader, 5 * BLOCK, BLOCK) == content(5)
    fill(cache, *range(10, 20))
    assert not cache.present(5)


def test_what_could_not_be_filled_is_not_kept(make_cache):
    def fail(view):
        raise OSError

    cache = make_cache(limit=0, workers=1)
    cache.enter(0)
    with pytest.raises(OSError):
        cache.fill(5, fail, reader=cache.reader())
    fill(cache, 1, 2)
    assert present(cache) == [1, 2]


def test_all_pinned_is_a_timeout(cache):
    fill(cache, 0, 1, 2, 3)
    readers = [cache.reader() for _ in range(4)]
    views = [reader.read(block * BLOCK, BLOCK) for block, reader in enumerate(readers)]
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="block 4 is not read") as caught:
        cache.fill(4, never, begin + 0.1)
    assert isinstance(caught.value, WaitTimeoutError)
    assert 0.1 <= time.monotonic() - begin < 5
    assert [bytes(view) for view in views] == [content(block) for block in range(4)]
    assert not cache.filling(4)
    readers[2].done()
    fill(cache, 4)
    assert present(cache) == [0, 1, 3, 4]
    for view in views:
        view.release()  # the error's traceback has them, too


def test_a_failure_passes_and_costs_nobody_a_block(cache, reader):
    def fail(view):
        view[:] = content(99, len(view))
        raise OSError("damaged")

    fill(cache, 0, 1, 2, 3)
    for _ in range(10):
        with pytest.raises(OSError, match="damaged"):
            cache.fill(5, fail)
        assert reader.read(5 * BLOCK, 1) is None
    assert cache.stats().blocks == 3
    fill(cache, 5)
    assert copied(reader, 5 * BLOCK, BLOCK) == content(5)
    assert cache.stats().blocks == 4


class Racing:
    """The table of places, to which something happens between two looks of a reader."""

    def __init__(self, places, between) -> None:
        self._places, self._between = places, between

    def __getitem__(self, block: int) -> int:
        frame = self._places[block]
        if self._between is not None:
            between, self._between = self._between, None
            between()
        return frame


def test_evicted_between_the_look_and_the_pin(cache, reader):
    fill(cache, 0)
    reader._places = Racing(reader._places, lambda: fill(cache, *range(10, 18)))
    assert reader.read(0, BLOCK) is None
    assert not any(cache._table.pins)


def test_filled_again_between_the_look_and_the_pin(cache, reader):
    fill(cache, 0)
    reader._places = Racing(reader._places, lambda: fill(cache, *range(10, 18), 0))
    assert copied(reader, 0, BLOCK) in (None, content(0))


def test_where_the_barriers_stand(cache, monkeypatch):
    """No test can see what a processor reorders, but the order that the proof wants is there."""
    fill(cache, 0, 1, 2, 3)
    table, seen, barrier = cache._table, [], membarrier.barrier
    frame = table.places[0]
    data = table.data[frame * BLOCK : (frame + 1) * BLOCK]

    def look():
        owner = table.owners[frame] - 1
        seen.append(
            (owner, table.places[0], table.places[9], int.from_bytes(data[-16:-8], "little"))
        )
        barrier()

    monkeypatch.setattr(membarrier, "barrier", look)
    fill(cache, 9)
    # Out of its place, barrier, nobody has a pin, barrier, filled, barrier, in its place.
    assert seen == [(0, 0, 0, 0), (0, 0, 0, 0), (9, 0, 0, 9)]
    assert table.places[9] == frame
    data.release()


def test_threads_that_want_one_block_produce_it_once(cache):
    made, ended = [], _thread.allocate_lock()
    results, count = [], 16

    def produce(view):
        made.append(1)
        time.sleep(0.05)
        producer(5)(view)

    def run():
        try:
            cache.fill(5, produce, time.monotonic() + 10)
            results.append(cache.present(5))
        except BaseException as exc:
            results.append(exc)
        if len(results) == count:
            ended.release()

    ended.acquire()
    for _ in range(count):
        _thread.start_new_thread(run, ())
    assert ended.acquire(timeout=10)
    assert results == [True] * count
    assert made == [1]


def test_who_waits_is_woken_when_it_is_filled(cache, monkeypatch):
    """And does not look every now and then."""
    monkeypatch.setattr(_cache, "_LONGEST_WAIT", 30.0)
    ends = []

    def fill_it(cache, tell, wait):
        def produce(view):
            tell(b"filling")
            wait()
            producer(5)(view)

        cache.fill(5, produce)

    child = Child(cache, 1, fill_it)
    assert child.hear() == b"filling"
    begin, done = time.monotonic(), _thread.allocate_lock()
    done.acquire()
    _thread.start_new_thread(
        lambda: (cache.fill(5, never, begin + 20), ends.append(time.monotonic()), done.release()),
        (),
    )
    assert not done.acquire(timeout=0.1)
    child.go()
    assert done.acquire(timeout=10)
    assert ends[0] - begin < 10
    assert child.end() == 0


def test_what_others_fill_can_be_left_to_them(cache):
    inside, leave, ended = (_thread.allocate_lock() for _ in range(3))
    for lock in (inside, leave, ended):
        lock.acquire()

    def produce(view):
        inside.release()
        leave.acquire()
        producer(5)(view)

    _thread.start_new_thread(lambda: (cache.fill(5, produce), ended.release()), ())
    assert inside.acquire(timeout=10)
    cache.fill(5, never, leave=True)
    assert not cache.present(5)
    cache.fill(6, producer(6), leave=True)
    assert cache.present(6)
    leave.release()
    assert ended.acquire(timeout=10)
    assert cache.present(5)


def test_who_waits_is_woken_when_it_fails(cache, monkeypatch):
    monkeypatch.setattr(_cache, "_LONGEST_WAIT", 30.0)

    def fail_at_it(cache, tell, wait):
        def fail(view):
            tell(b"filling")
            wait()
            raise OSError("damaged")

        with pytest.raises(OSError, match="damaged"):
            cache.fill(5, fail)

    child, done = Child(cache, 1, fail_at_it), _thread.allocate_lock()
    done.acquire()
    assert child.hear() == b"filling"
    _thread.start_new_thread(lambda: (fill(cache, 5), done.release()), ())
    assert not done.acquire(timeout=0.1)
    child.go()
    assert done.acquire(timeout=10)
    assert copied(cache.reader(), 5 * BLOCK, BLOCK) == content(5)
    assert child.end() == 0


def test_threads_of_one_process_do_not_evict_what_another_fills(cache):
    inside, leave, ended = (_thread.allocate_lock() for _ in range(3))
    for lock in (inside, leave, ended):
        lock.acquire()

    def produce(view):
        producer(5)(view[: BLOCK // 2])
        inside.release()
        leave.acquire()
        view[BLOCK // 2 :] = content(5)[BLOCK // 2 :]

    _thread.start_new_thread(lambda: (cache.fill(5, produce), ended.release()), ())
    assert inside.acquire(timeout=10)
    assert cache.filling(5)
    assert not cache.filling(6)
    fill(cache, *range(10, 30))
    leave.release()
    assert ended.acquire(timeout=10)
    assert not cache.filling(5)
    assert copied(cache.reader(), 5 * BLOCK, BLOCK) == content(5)


def test_a_process_waits_for_another_that_fills(cache, reader):
    def work(cache, tell, wait):
        def produce(view):
            tell(b"inside")
            wait()
            producer(5)(view)

        cache.fill(5, produce)

    child = Child(cache, 1, work)
    assert child.hear() == b"inside"
    assert cache.filling(5)
    with pytest.raises(TimeoutError):
        cache.fill(5, never, time.monotonic() + 0.05)
    child.go()
    cache.fill(5, never, time.monotonic() + 10)
    assert copied(reader, 5 * BLOCK, BLOCK) == content(5)
    assert child.end() == 0


def stuck(cache, tell, wait):
    """Fill half of block 5, and no more."""

    def produce(view):
        view[: BLOCK // 2] = content(99, BLOCK // 2)
        tell(b"inside")
        while True:
            signal.pause()

    cache.fill(5, produce)


def test_who_fills_is_killed(cache, reader):
    child = Child(cache, 1, stuck)
    assert child.hear() == b"inside"
    child.kill(signal.SIGKILL)
    fill(cache, 5)  # it need not be waited for first
    assert child.end() == -signal.SIGKILL
    assert copied(reader, 5 * BLOCK, BLOCK) == content(5)
    fill(cache, *range(10, 20))
    assert cache.stats().bytes <= 4 * BLOCK
    assert cache.stats().blocks == 4


def reserving(cache, function) -> Child:
    """Return a worker that block 5 is left to, and be another one."""
    cache.reserve(5)
    child = Child(cache, 1, function)
    cache.let_go(5)
    cache.enter(0)
    return child


def test_a_block_is_left_to_who_it_is_reserved_for(make_cache):
    def work(cache, tell, wait):
        tell(b"entered")
        wait()
        fill(cache, 5)

    cache = make_cache()
    child = reserving(cache, work)
    assert child.hear() == b"entered"
    cache.fill(5, never, leave=True)
    with pytest.raises(TimeoutError):
        cache.fill(5, never, time.monotonic() + 0.05)
    fill(cache, 4)
    child.go()
    cache.fill(5, never, time.monotonic() + 10)
    assert child.end() == 0
    assert copied(cache.reader(), 5 * BLOCK, BLOCK) == content(5)


def test_a_block_is_reserved_for_any_thread_of_a_process(make_cache):
    def work(cache, tell, wait):
        _thread.start_new_thread(lambda: (fill(cache, 5), tell(b"filled")), ())
        wait()

    cache = make_cache()
    child = reserving(cache, work)
    assert child.hear() == b"filled"
    cache.fill(5, never)
    child.go()
    assert child.end() == 0


def test_what_was_reserved_and_let_go_is_free(make_cache, monkeypatch):
    monkeypatch.setattr(_cache, "_LONGEST_WAIT", 30.0)

    def work(cache, tell, wait):
        tell(b"entered")
        wait()
        cache.let_go(5)
        cache.let_go(5)
        wait()

    cache = make_cache()
    child = reserving(cache, work)
    assert child.hear() == b"entered"
    done = _thread.allocate_lock()
    done.acquire()
    _thread.start_new_thread(lambda: (fill(cache, 5, timeout=60), done.release()), ())
    assert not done.acquire(timeout=0.1)
    child.go()
    assert done.acquire(timeout=10)
    child.go()
    assert child.end() == 0


def test_who_it_was_reserved_for_is_killed(make_cache):
    cache = make_cache()
    child = reserving(cache, lambda cache, tell, wait: (tell(b"entered"), wait()))
    assert child.hear() == b"entered"
    child.kill(signal.SIGKILL)
    fill(cache, 5)
    assert child.end() == -signal.SIGKILL


def test_a_process_that_could_not_be_started_keeps_nothing(make_cache):
    cache = make_cache()
    cache.reserve(5)
    cache.let_go(5)
    cache.enter(0)
    fill(cache, 5)


def test_who_fills_is_stopped(cache, reader):
    child = Child(cache, 1, stuck)
    try:
        assert child.hear() == b"inside"
        child.stop()
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            cache.fill(5, never, begin + 0.1)
        assert 0.1 <= time.monotonic() - begin < 5
        fill(cache, *range(10, 30))  # all others go on
        assert cache.stats().blocks == 3
    finally:
        child.kill(signal.SIGKILL)
        child.end()
    fill(cache, 5)
    assert copied(reader, 5 * BLOCK, BLOCK) == content(5)


def hold(cache, tell, wait):
    """Read block 0, and never let it go."""
    view = cache.reader().read(0, BLOCK)
    tell(b"pinned")
    wait()
    tell(b"right" if bytes(view) == content(0) else b"wrong")


def test_who_reads_is_stopped_and_finds_its_data_unchanged(cache):
    fill(cache, 0)
    child = Child(cache, 1, hold)
    assert child.hear() == b"pinned"
    child.stop()
    fill(cache, *range(10, 40))
    child.kill(signal.SIGCONT)
    child.go()
    assert child.hear() == b"right"
    assert child.end() == 0


def test_the_pins_of_the_dead_are_in_nobodys_way(cache):
    fill(cache, 0)
    child = Child(cache, 1, hold)
    assert child.hear() == b"pinned"
    child.kill(signal.SIGKILL)
    child.end()
    fill(cache, *range(10, 20))  # nobody has taken its place
    assert not cache.present(0)


def test_the_pins_of_the_dead_are_gone_when_it_is_replaced(cache):
    fill(cache, 0)
    children = [Child(cache, 1, hold)]
    assert children[0].hear() == b"pinned"
    children[0].kill(signal.SIGKILL)
    children[0].end()
    assert any(cache._table.pins)
    child = Child(cache, 1, lambda cache, tell, wait: None)
    assert child.end() == 0
    assert not any(cache._table.pins)


def test_two_cannot_be_the_same_worker(cache, monkeypatch):
    monkeypatch.setattr(_cache, "_SUCCESSION", 0.05)

    def work(cache, tell, wait):
        tell(b"entered")
        wait()

    child = Child(cache, 1, work)
    assert child.hear() == b"entered"
    other = Child(cache, 2, lambda cache, tell, wait: try_to_be_1(cache, tell))
    assert other.hear() == b"worker 1 is still alive"
    child.go()
    assert [child.end(), other.end()] == [0, 0]


def try_to_be_1(cache, tell):
    try:
        cache.enter(1)
    except WaitTimeoutError as exc:
        tell(exc.what.encode())


def test_readers_are_counted_and_need_a_worker(make_cache):
    cache = make_cache()
    with pytest.raises(InvalidValueError):
        cache.reader()
    with pytest.raises(InvalidValueError):
        cache.fill(0, never)
    cache.enter(2)
    readers = [cache.reader() for _ in range(READERS)]
    assert len({reader._slot for reader in readers}) == READERS
    assert max(reader._slot for reader in readers) == len(cache._table.pins) - 1
    with pytest.raises(InvalidValueError):
        cache.reader()


# -- the storm ---------------------------------------------------------------------------------


def check(block: int, data: bytes) -> None:
    """Fail unless all of it is of this block and of one filling."""
    unit = data[:16]
    assert int.from_bytes(unit[:8], "little") == block, f"block {block}: {unit.hex()}"
    assert data == (unit * -(-len(data) // 16))[: len(data)], f"block {block} is mixed"


def read_and_check(cache: Cache, reader, block: int) -> None:
    length = min(BLOCK, SIZE - block * BLOCK)
    start = random.randrange(0, length - 16, 16)
    view = reader.read(block * BLOCK + start, length - start)
    if view is None:
        cache.fill(block, slow_producer(block), time.monotonic() + 20)
        return
    first = bytes(view)
    time.sleep(random.choice((0, 0, 0.0002)))
    check(block, first)
    assert bytes(view) == first, "it changed while it was read"
    reader.done()


def slow_producer(block: int):
    def produce(view):
        stamp, half = os.urandom(8), len(view) // 32 * 16
        view[:half] = content(block, half, stamp)
        time.sleep(random.choice((0, 0.0001)))
        view[half:] = content(block, len(view) - half, stamp)

    return produce


def read_across_and_check(cache: Cache, reader, block: int) -> None:
    at = (block + 1) * BLOCK
    view = reader.read(at - 32, 64)
    if view is not None:
        data = bytes(view)
        check(block, data[:32])
        check(block + 1, data[32:])
    reader.done()


def storm(cache: Cache, seconds: float) -> int:
    reader, end, count = cache.reader(), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        # Some blocks are wanted more than others.
        read_and_check(cache, reader, min(random.randrange(40), random.randrange(40)))
        read_across_and_check(cache, reader, random.randrange(39))
        count += 1
    return count


def storm_in_two_threads(cache: Cache, seconds: float) -> int:
    failures, ended = [], _thread.allocate_lock()
    random.seed(os.urandom(8))

    def second():
        try:
            storm(cache, seconds)
        except BaseException as exc:
            failures.append(exc)
        ended.release()

    ended.acquire()
    _thread.start_new_thread(second, ())
    count = storm(cache, seconds)
    assert ended.acquire(timeout=30)
    for failure in failures:
        raise failure
    return count


def storm_child(cache: Cache, worker: int, seconds: float) -> Child:
    def work(cache, tell, wait):
        tell(str(storm_in_two_threads(cache, seconds)).encode())

    return Child(cache, worker, work)


def check_nothing_is_left(cache: Cache) -> None:
    """Nobody lives any more: there is no lock, no memory too much, and every block can be read."""
    locks = ByteLocks(OwnedFd.open(f"/proc/self/fd/{cache.filenos()[0]}", os.O_RDWR))
    assert [byte for byte in range(44) if locks.is_held(byte)] == []
    locks.close()
    before = shared_memory()
    cache.enter(0)
    reader = cache.reader()
    for block in range(40):
        if not cache.present(block):
            fill(cache, block)
        length = min(BLOCK, SIZE - block * BLOCK)
        check(block, copied(reader, block * BLOCK, length))
    assert cache.stats().blocks == cache.stats().limit // BLOCK
    assert cache.stats().bytes <= cache.stats().limit == 4 * BLOCK
    assert shared_memory() - before <= 4 * BLOCK + 6 * 4096
    # Nothing is kept in the place that would be one too many.
    assert not any(cache._table.data[:BLOCK])
    assert len(cache._table.data) == 5 * BLOCK


def test_storm(make_cache):
    """Nobody is killed, and nothing is left."""
    cache = make_cache()
    children = [storm_child(cache, worker, 2) for worker in range(3)]
    counts = [int(child.hear()) for child in children]
    assert [child.end() for child in children] == [0, 0, 0]
    assert min(counts) > 100
    assert cache.stats().evictions > 100
    check_nothing_is_left(cache)


def test_storm_with_kills(make_cache):
    """Workers are killed at any point and replaced at once; those left alive see nothing of it."""
    cache = make_cache()
    end = time.monotonic() + 4
    children = [storm_child(cache, worker, 60) for worker in range(3)]
    kills = 0
    while time.monotonic() < end:
        time.sleep(random.uniform(0, 0.02))
        worker = random.randrange(3)
        children[worker].kill(signal.SIGKILL)
        assert children[worker].end() == -signal.SIGKILL
        children[worker] = storm_child(cache, worker, 60)
        kills += 1
    fills = cache.stats().fills
    wait_until(lambda: cache.stats().fills > fills)  # they do not hang
    for child in children:
        child.kill(signal.SIGKILL)
        assert child.end() == -signal.SIGKILL
    assert kills > 50
    check_nothing_is_left(cache)


def test_storm_with_stops(make_cache):
    """Workers are stopped for a moment at any point."""
    cache = make_cache()
    children = [storm_child(cache, worker, 2) for worker in range(3)]
    end = time.monotonic() + 1.8
    while time.monotonic() < end:
        child = random.choice(children)
        child.stop()
        time.sleep(random.uniform(0, 0.01))
        child.kill(signal.SIGCONT)
    assert [child.end() for child in children] == [0, 0, 0]
    check_nothing_is_left(cache)
