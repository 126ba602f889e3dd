# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of clients, workers and the broker, at any moment, under load."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broker_tools import (
    FIRST,
    USER,
    Served,
    in_namespaces,
    left_behind,
    open_to,
    resident,
)
from conftest import bound_to
from oracle import is_bound, run, wait_until

import loopdev

ALL = '[[rule]]\nuid = "all"\ndevices = "unlimited"\n'

LOAD = """
import os, sys
import loopdev
path, image, nodes = sys.argv[1:]
directory = os.open(nodes, os.O_RDONLY)
print("ready", flush=True)
turn = 0
with loopdev.LoopClient(path) as client, open(image, "r+b") as file:
    while True:
        turn += 1
        with client.attach(file.fileno(), partscan=turn % 2 == 0, want_fd=turn % 3 == 0,
                           directory=directory if turn % 4 == 0 else None) as device:
            if device.fd is not None:
                os.pwrite(device.fileno(), b"x" * 512, 0)
"""


def load(path: str, image: Path, nodes: Path) -> subprocess.Popen:
    nodes.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, path, image, nodes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen) -> str:
    process.kill()
    _, err = process.communicate()
    return err


def images(tmp_path: Path, count: int) -> list[Path]:
    made = []
    for index in range(count):
        path = tmp_path / f"{index}.img"
        with open(path, "wb") as file:
            file.truncate(8 << 20)
        run("sfdisk", "-q", path, input="label: gpt\nstart=2048, size=2MiB\n")
        made.append(path)
    return made


def test_kill_of_clients_under_load(tmp_path):
    """Each time at another moment; others never notice, and nothing is left."""
    chance = random.Random(5)
    files = images(tmp_path, 4)
    with Served(tmp_path, ALL) as served:
        steady = [load(served.path, files[0], tmp_path / "steady")]
        try:
            for turn in range(25):
                victim = load(served.path, files[1 + turn % 3], tmp_path / f"n{turn}")
                time.sleep(chance.random() * 0.05)
                assert end(victim) == ""
                nodes = tmp_path / f"n{turn}"
                wait_until(lambda nodes=nodes: os.listdir(nodes) == [])
            assert steady[0].poll() is None
        finally:
            assert end(steady[0]) == ""
        wait_until(lambda: bound_to(str(tmp_path)) == {})
    assert os.listdir(tmp_path / "steady") == []


def test_kill_of_the_broker_under_load(tmp_path):
    """The kernel frees the devices, and the next start removes the rest."""
    chance = random.Random(7)
    files = images(tmp_path, 3)
    for turn in range(12):
        served = Served(tmp_path, ALL).start()
        clients = [load(served.path, path, tmp_path / f"nodes{i}") for i, path in enumerate(files)]
        time.sleep(chance.random() * 0.15)
        served.kill()
        for client in clients:
            client.wait(20)
            assert "BrokerError" in client.stderr.read(), turn
            client.stdout.close()
            client.stderr.close()
        wait_until(lambda: bound_to(str(tmp_path)) == {})
    with Served(tmp_path, ALL):
        wait_until(lambda: [name for name in left_behind() if name.startswith("loop")] == [])
        for index in range(3):
            wait_until(lambda index=index: os.listdir(tmp_path / f"nodes{index}") == [])
    assert not (tmp_path / "broker.sock.state").exists()


def test_kill_of_workers_under_load(tmp_path):
    """Who was served by it loses its lease; the broker goes on, and leaves nothing."""
    files = images(tmp_path, 2)
    with Served(tmp_path, ALL) as served:
        for turn in range(10):
            client = load(served.path, files[turn % 2], tmp_path / "nodes")
            time.sleep(0.01 * turn)
            for pid in served.workers():
                os.kill(pid, signal.SIGKILL)
            try:
                client.wait(0.3)
            except subprocess.TimeoutExpired:
                pass
            end(client)
            with loopdev.LoopClient(served.path) as other, open(files[0], "r+b") as file:
                other.attach(file.fileno()).detach(timeout=30)
        wait_until(lambda: bound_to(str(tmp_path)) == {})
        wait_until(lambda: os.listdir(tmp_path / "nodes") == [])


KEEPER = """
import os, sys, time
import loopdev
path, image = sys.argv[1:]
client = loopdev.LoopClient(path)
with open(image, "r+b") as file:
    device = client.attach(file.fileno(), partscan=True, directory=os.open("/dev", os.O_RDONLY))
    print(device.name, flush=True)
    sys.stdin.readline()
    print(os.listdir("/dev"), flush=True)
    sys.stdin.readline()
    try:
        os.open("/dev/" + device.name, os.O_RDWR)
        print("opened", flush=True)
    except OSError as exc:
        print("refused", flush=True)
"""


def test_nodes_in_a_namespace_that_outlive_the_broker(tmp_path):
    """The client lives on, in its own namespaces: the next start takes its nodes away."""
    image = images(tmp_path, 1)[0]
    served = Served(tmp_path, ALL).start()
    open_to(USER, image)
    with in_namespaces(KEEPER, served.path, image) as process:
        name = process.stdout.readline().strip()
        assert name.startswith("loop"), process.stderr.read()
        served.kill()
        wait_until(lambda: not is_bound(int(name[4:])))
        with Served(tmp_path, ALL):
            wait_until(lambda: [one for one in left_behind() if one.startswith("loop")] == [])
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "['null2']\n"
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "refused\n"


def test_foreign_device_with_a_number_of_the_dead_broker(tmp_path, image, counting_file):
    """Who has been given the number since keeps it."""
    served = Served(tmp_path, ALL).start()
    with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
        number = client.attach(file.fileno()).number
        wait_until(lambda: '"device"' in state_of(tmp_path))
        served.kill()
    wait_until(lambda: not is_bound(number))
    with loopdev.attach(counting_file, number=number) as foreign:
        with Served(tmp_path, ALL) as again, loopdev.LoopClient(again.path) as client:
            with open(image, "r+b") as file, client.attach(file.fileno()) as device:
                assert device.number != number
            wait_until(lambda: f'"number":{number},"gone"' in state_of(tmp_path))
            assert foreign.backing_file == str(counting_file)
            assert left_behind().count(f"loop{number}") == 1
            foreign.detach()


def test_foreign_device_with_a_number_that_a_worker_had(tmp_path, image, counting_file):
    """So too if nobody had written down yet what that was: it is looked at again later."""
    served = Served(tmp_path, ALL).start()
    with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
        client.attach(file.fileno()).detach()
        number = client.attach(file.fileno()).number
        served.kill()
    wait_until(lambda: not is_bound(number))
    with loopdev.attach(counting_file, number=number) as foreign, Served(tmp_path, ALL) as again:
        with loopdev.LoopClient(again.path) as client, open(image, "r+b") as file:
            for _ in range(3):
                with client.attach(file.fileno()) as device:
                    assert device.number != number
        assert foreign.backing_file == str(counting_file)
        foreign.detach()
        wait_until(lambda: not [name for name in left_behind() if name.startswith("loop")])


def state_of(directory: Path) -> str:
    return (directory / "broker.sock.state").read_text()


def test_device_without_autoclear_is_ended_by_the_next_start(tmp_path, image):
    """A client may have switched it off: then the kernel frees nothing."""
    served = Served(tmp_path, ALL).start()
    with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
        device = client.attach(file.fileno())
        with loopdev.loop.Loop(device.number) as loop:
            loop.set_status(autoclear=False)
        served.kill()
    assert is_bound(device.number)
    with Served(tmp_path, ALL):
        wait_until(lambda: not is_bound(device.number))
    assert not is_bound(device.number)


def test_state_of_another_boot_is_nothing(tmp_path, image):
    """Its numbers were another kernel's."""
    with loopdev.attach(image, number=FIRST) as device:
        entry = {"number": FIRST, "device": {"diskseq": device.diskseq, "nodes": []}, "client": {}}
        lines = [{"boot": "00000000-0000-0000-0000-000000000000", "directories": ["/etc"]}, entry]
        state = tmp_path / "broker.sock.state"
        state.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with Served(tmp_path, ALL) as served, loopdev.LoopClient(served.path) as client:
            client.hello()
            assert is_bound(FIRST)
            device.remove()


def test_state_file_of_another_user(tmp_path):
    state = tmp_path / "s.state"
    state.write_text("")
    os.chown(state, USER, USER)
    with pytest.raises(loopdev.BrokerError, match="another user"):
        with loopdev.LoopServer(tmp_path / "s"):
            pass


STORM = """
import os, sys
import loopdev
path, image, cycles = sys.argv[1], sys.argv[2], int(sys.argv[3])
with loopdev.LoopClient(path) as client, open(image, "r+b") as file:
    sys.stdin.readline()
    for _ in range(cycles):
        client.attach(file.fileno()).detach(timeout=60)
"""


def test_storm(tmp_path):
    """40 clients at once, 10 cycles each; `make bench` has 200 with 20."""
    with Served(tmp_path, ALL) as served:
        files = images(tmp_path, 4)
        with loopdev.LoopClient(served.path) as client, open(files[0], "r+b") as file:
            client.attach(file.fileno()).detach()
        before = resident(served.process.pid)
        clients = [
            subprocess.Popen(
                [sys.executable, "-c", STORM, served.path, files[index % 4], "10"],
                stdin=subprocess.PIPE,
            )
            for index in range(40)
        ]
        for client in clients:
            client.stdin.close()
        assert [client.wait() for client in clients] == [0] * 40
        wait_until(lambda: [name for name in left_behind() if name.startswith("loop")] == [])
        assert resident(served.process.pid) < before + (10 << 20)
