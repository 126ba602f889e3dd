# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Processes of a map that are killed or stopped, at the worst moments."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from loads import Holder, Load, Reader, written_by_fio
from mapped import (
    EIO,
    KIB,
    MIB,
    Map,
    can_resend,
    elapsed,
    infos,
    kill,
    loopdev,
    noise,
    ok,
    padded,
    raw,
    read_all,
    read_direct,
    read_fails,
    state_of,
    stop,
    store,
)
from oracle import SLOW, wait_until

KINDS = ("raw", "datastore")


@pytest.fixture(params=KINDS)
def load_source(request, tmp_path):
    """An image that fio can verify, as a file and as chunks."""
    image = written_by_fio(tmp_path / "fio.img")
    if request.param == "raw":
        return (image,)
    return (*store(tmp_path, image.read_bytes(), MIB), "--cache-limit", 60 * MIB)


@pytest.fixture
def _resending():
    if not can_resend():
        pytest.skip("a kernel before Linux 6.9: reads that a dead worker had fail")


@pytest.mark.usefixtures("_resending")
def test_a_worker_is_killed_under_load(maps, load_source):
    mapping = maps(*load_source)
    with Load(mapping.device, 2) as load:
        victims = mapping.workers()
        for victim in victims:
            time.sleep(0.3)
            kill(victim)
        wait_until(lambda: len(mapping.workers()) == len(victims))
        assert not set(mapping.workers()) & set(victims)
        result = load.result()
    assert (result["error"], result["said"]) == (0, "")
    assert result["reads"] > 500
    info = mapping.info()
    assert (info["status"], info["restarts"], info["errors"]) == ("serving", len(victims), 0)
    assert sorted(info["workers"]) == mapping.workers()
    assert f"worker 0 was killed by signal {int(signal.SIGKILL)}" in maps.log(mapping)
    ok("unmap", mapping.name)


@pytest.mark.usefixtures("_resending")
def test_fifty_kills_a_second(maps, load_source):
    """No read fails, none gets wrong bytes, and the map is as good as new afterwards."""
    mapping = maps(*load_source)
    rng, killed = random.Random(3), 0
    with Load(mapping.device, 4, depth=16) as load:
        next_kill = time.monotonic()
        while load.running():
            next_kill += 1 / 50
            time.sleep(max(0.0, next_kill - time.monotonic()))
            workers = mapping.workers()
            if workers:
                kill(rng.choice(workers))
                killed += 1
        result = load.result()
    assert (result["error"], result["said"]) == (0, "")
    assert killed > 100
    wait_until(lambda: len(mapping.workers()) > 0)
    info = mapping.info()
    assert (info["status"], info["errors"], info["reason"]) == ("serving", 0, None)
    assert info["restarts"] > killed / 2
    ok("unmap", mapping.name)


def test_the_supervisor_is_killed(maps, load_source):
    """Workers go on, the lists say what is missing, gc leaves it, and unmap works."""
    mapping = maps(*load_source)
    with Load(mapping.device, 2) as load:
        kill(mapping.supervisor())
        wait_until(lambda: mapping.supervisor() is None)
        info = mapping.info()
        assert (info["status"], info["supervisor"]) == ("unsupervised", None)
        assert f"{mapping.name}: unsupervised, left as it is" in ok("gc").splitlines()
        result = load.result()
    assert (result["error"], result["said"]) == (0, "")
    assert mapping.exists()
    ok("unmap", mapping.device)
    assert mapping.is_gone()


def test_a_worker_dies_after_the_supervisor(maps, tmp_path):
    """What it had fails, the others serve on; nobody hangs."""
    data = noise(4 * MIB)
    mapping = maps(*raw(tmp_path, data), "--workers", 2)
    kill(mapping.supervisor())
    wait_until(lambda: mapping.supervisor() is None)
    first, second = mapping.workers()
    kill(first)
    wait_until(lambda: mapping.workers() == [second])
    assert read_all(mapping.device, direct=True) == data
    kill(second)
    wait_until(lambda: mapping.workers() == [])
    assert read_fails(mapping.device, 0) == EIO
    assert mapping.info()["status"] == "dead"
    assert f"{mapping.name}: dead, removed" in ok("gc").splitlines()
    assert mapping.is_gone()


def kill_all(mapping: Map) -> None:
    """Kill all at once: none can do anything about another's end."""
    processes = mapping.processes()
    for pid in processes:
        stop(pid)
    for pid in processes:
        kill(pid)
    wait_until(lambda: not any(map(state_of, processes)))


def test_all_are_killed_under_load(maps, load_source):
    mapping = maps(*load_source)
    with Load(mapping.device, 20) as load:
        time.sleep(0.2)
        kill_all(mapping)
        assert load.result()["error"] == EIO
    assert mapping.is_bound()
    assert mapping.info()["status"] == "dead"
    assert f"{mapping.name}: dead, removed" in ok("gc").splitlines()
    assert mapping.is_gone()
    assert ok("gc") == ""


def test_all_are_killed_and_the_name_is_wanted(maps, tmp_path):
    """A dead map makes way for the next of its name."""
    source = raw(tmp_path, noise(MIB))
    mapping = maps(*source)
    kill_all(mapping)
    again = maps(*source, name=mapping.name)
    assert read_all(again.device) == noise(MIB)
    ok("unmap", again.name)


def test_all_are_killed_and_the_device_is_in_use(maps, tmp_path):
    """The device cannot be taken from its user, who gets errors; it goes when he does."""
    source = raw(tmp_path, noise(MIB))
    mapping = maps(*source)
    with Holder(mapping.device):
        kill_all(mapping)
        assert f"{mapping.name}: dead, left as it is" in ok("gc").splitlines()
        assert read_fails(mapping.device, 0) == EIO
        refused(loopdev("map", *source, "--name", mapping.name), 4)
    wait_until(lambda: not mapping.is_bound())
    assert f"{mapping.name}: dead, removed" in ok("gc").splitlines()


def refused(done: subprocess.CompletedProcess[str], exit_code: int) -> None:
    assert (done.returncode, done.stdout) == (exit_code, "")


def test_all_are_killed_and_unmap(maps, tmp_path):
    for words in ((), ("--lazy",), ("--force",)):
        mapping = maps(*raw(tmp_path, noise(MIB)))
        kill_all(mapping)
        ok("unmap", mapping.device, *words)
        assert mapping.is_gone()


def test_all_are_killed_and_the_mount_is_taken_away(maps, tmp_path):
    """The kernel then calls the device's file "/"; it is still known to be ours."""
    mapping = maps(*raw(tmp_path, noise(MIB)))
    kill_all(mapping)
    subprocess.run(["umount", "-l", mapping.image], check=True)
    assert mapping.info()["device"] == mapping.device
    assert f"{mapping.name}: dead, removed" in ok("gc").splitlines()
    assert not os.path.exists(f"/sys/block/loop{mapping.number}/loop")


# Stopped, not dead.


def test_a_stopped_worker_is_replaced(maps, tmp_path):
    """Every read ends, in time, with the right bytes: what it had goes to another worker."""
    data = noise(2 * MIB)
    mapping = maps(*raw(tmp_path, data), "--io-timeout", 0.5, "--workers", 2)
    victim = mapping.workers()[0]
    stop(victim)
    began = time.monotonic()
    readers = [Reader(mapping.device, number * 4096) for number in range(16)]
    assert {reader.result(20) for reader in readers} == {0}
    assert elapsed(began) < 8
    # Where it had taken nothing, it is in nobody's way; it has, if one sees it served no more.
    if victim not in mapping.workers():
        assert "does not answer, and is killed" in maps.log(mapping)
    assert read_all(mapping.device, direct=True) == data
    ok("unmap", mapping.name)
    assert mapping.is_gone()


def test_all_workers_are_stopped(maps, tmp_path):
    """As soon as they keep a request for too long, others take their place."""
    data = noise(2 * MIB)
    mapping = maps(*raw(tmp_path, data), "--io-timeout", 0.5, "--workers", 2)
    victims = mapping.workers()
    for pid in victims:
        stop(pid)
    readers = [Reader(mapping.device, number * 4096) for number in range(8)]
    assert {reader.result(25) for reader in readers} == {0}
    assert not set(mapping.workers()) & set(victims)
    assert read_all(mapping.device, direct=True) == data
    ok("unmap", mapping.name)


def test_all_are_stopped_and_unmap_by_force(maps, tmp_path):
    mapping = maps(*raw(tmp_path, noise(MIB)))
    processes = mapping.processes()
    for pid in processes:
        stop(pid)
    reader = Reader(mapping.device, 0)
    wait_until(reader.is_waiting)
    began = time.monotonic()
    ok("unmap", mapping.name, "--force")
    assert elapsed(began) < 8
    assert reader.result(5) == EIO
    assert not any(map(state_of, processes))
    assert mapping.is_gone()


def test_the_supervisor_is_stopped(maps, tmp_path):
    data = noise(MIB)
    mapping = maps(*raw(tmp_path, data))
    stop(mapping.supervisor())
    assert read_all(mapping.device) == data
    assert mapping.info()["status"] == "serving"
    ok("unmap", mapping.name)
    assert mapping.is_gone()


# Workers that cannot live.


def test_workers_that_die_at_once(maps, tmp_path):
    """Killed faster than they can begin: the map gives up, says why, and readers get errors."""
    mapping = maps(*raw(tmp_path, noise(MIB)), "--workers", 2)
    until = time.monotonic() + 20 * SLOW
    while mapping.info()["status"] != "failed":
        assert time.monotonic() < until
        for _ in range(12):
            for pid in mapping.workers():
                kill(pid)
    info = mapping.info()
    assert info["reason"] == "12 workers died one after the other, the last was killed by signal 9"
    assert info["restarts"] >= 11
    assert f"failed: {info['reason']}" in ok("maps")
    assert f"gave up: {info['reason']}" in maps.log(mapping)
    began = time.monotonic()
    assert read_fails(mapping.device, 0) == EIO
    assert elapsed(began) < 1
    assert mapping.workers() == []
    ok("unmap", mapping.name)
    assert mapping.is_gone()


OLD_KERNEL = """
import sys
from loopdev.fuse import protocol
negotiate = protocol.negotiate
def of_linux_6_8(request):
    init = negotiate(request)
    return protocol.Init(
        minor=init.minor, flags=init.flags & ~protocol.HAS_RESEND, max_readahead=init.max_readahead
    )
protocol.negotiate = of_linux_6_8
import loopdev
mapping = loopdev.map_image(sys.argv[1], name=sys.argv[2], log=sys.argv[3], persist=True, workers=2)
print(mapping.device.path)
mapping.close()
"""


def test_a_kernel_that_cannot_resend(maps, tmp_path):
    """Whoever waited for the dead worker gets EIO, at once; the map goes on."""
    data = noise(4 * MIB)
    [image] = raw(tmp_path, data)
    name = maps.name()
    words = [sys.executable, "-c", OLD_KERNEL, image, name, tmp_path / "log"]
    out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    mapping = Map(name, out.strip())
    for _ in range(5):
        workers = mapping.workers()
        for pid in workers:
            stop(pid)
        readers = [Reader(mapping.device, number * 4096) for number in range(6)]
        wait_until(lambda readers=readers: all(state_of(r.pid) == "D" for r in readers))
        for pid in workers:
            kill(pid)
        assert {reader.result(5) for reader in readers} <= {0, EIO}
        wait_until(lambda: len(mapping.workers()) == 2)
    assert read_all(mapping.device, direct=True) == data
    for _ in range(10):
        readers = [Reader(mapping.device, number * 4096) for number in range(2)]
        for pid in mapping.workers()[:1]:
            kill(pid)
        assert {reader.result(5) for reader in readers} <= {0, EIO}
    assert read_all(mapping.device, direct=True) == data
    assert mapping.info()["status"] == "serving"
    ok("unmap", name)


def test_a_killed_reader_hurts_nobody(maps, tmp_path):
    """Its requests are interrupted, or answered to nobody."""
    data = noise(8 * MIB)
    mapping = maps(*store(tmp_path, data, 64 * KIB), "--cache-limit", MIB)
    over = threading.Event()

    def murder() -> None:
        while not over.is_set():
            dd = subprocess.Popen(["dd", f"if={mapping.image}", "of=/dev/null", "iflag=direct"])
            time.sleep(0.01)
            dd.kill()
            dd.wait()

    thread = threading.Thread(target=murder)
    thread.start()
    try:
        sums = {hashlib.sha256(read_all(mapping.device, direct=True)).digest() for _ in range(5)}
    finally:
        over.set()
        thread.join()
    assert sums == {hashlib.sha256(data).digest()}
    assert mapping.info()["errors"] == 0
    ok("unmap", mapping.name)


def test_what_the_processes_are(maps, tmp_path):
    """They say what they are, and the kernel spares them."""
    mapping = maps(*raw(tmp_path, padded(noise(MIB))))
    wait_until(lambda: mapping.name in title(mapping.supervisor()))
    assert title(mapping.supervisor()) == f"loopdev: map {mapping.name}"
    assert {title(pid) for pid in mapping.workers()} == {
        f"loopdev: map {mapping.name}, worker {number}" for number in range(os.cpu_count())
    }
    for pid in mapping.processes():
        if can_be_protected():
            wait_until(lambda pid=pid: oom_score(pid) < 0)
        assert os.readlink(f"/proc/{pid}/cwd") == "/"
        assert os.getsid(pid) != os.getsid(0)
    read_direct(mapping.device, 0, 4096)
    [info] = [info for info in infos() if info["name"] == mapping.name]
    assert info["supervisor"] == mapping.supervisor()
    assert sorted(info["workers"]) == mapping.workers()
    ok("unmap", mapping.name)


def can_be_protected() -> bool:
    """Return whether this machine lets root lower a score; some containers do not."""
    script = "echo -500 > /proc/self/oom_score_adj"
    return subprocess.run(["sh", "-c", script], stderr=subprocess.DEVNULL).returncode == 0


def oom_score(pid: int) -> int:
    with open(f"/proc/{pid}/oom_score_adj") as file:
        return int(file.read())


def title(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read().rstrip("\0")
