# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""``loopdev serve``, ``attach --broker`` and ``list --broker``, and the units of systemd."""

from __future__ import annotations

import configparser
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from broker_tools import COMMAND, FIRST, ROOT, USER, Served, in_namespaces, open_to, outcome
from oracle import is_bound, losetup, run, wait_until
from test_broker import FD_CLIENT, NODE_CLIENT, image_for

import loopdev

ALL = '[[rule]]\nuid = "all"\n'
UNITS = ROOT / "systemd"


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path, ALL) as broker:
        yield broker


def attach(served: Served, *arguments: object) -> subprocess.Popen:
    words = [COMMAND, "attach", "--broker", served.path, *arguments]
    return subprocess.Popen(
        [str(word) for word in words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_attach_until_a_signal(served, image, tmp_path, number):
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    process = attach(served, "--nodes", nodes, "--read-only", image)
    path = process.stdout.readline().strip()
    assert path == str(nodes / f"loop{FIRST}")
    assert stat.S_ISBLK(os.stat(path).st_mode)
    assert losetup(f"/dev/loop{FIRST}")["ro"] is True
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (128 + number, "")
    assert not is_bound(FIRST)
    assert os.listdir(nodes) == []


def test_attach_as_json(served, image):
    process = attach(served, "--json", "--sector-size", "4096", image)
    found = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
    process.terminate()
    process.communicate(timeout=20)
    assert (found["path"], found["number"]) == (f"/dev/loop{FIRST}", FIRST)
    assert found["sector_size"] == 4096


def test_attach_ends_with_the_broker(tmp_path, image):
    served = Served(tmp_path, ALL).start()
    process = attach(served, image)
    process.stdout.readline()
    served.stop()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "the broker has" in err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--number", "5"], 2, "number=5: cannot be had from a broker"),
        (["--reuse"], 2, "reuse=True: cannot be had from a broker"),
        (["--loop-ref", "x"], 2, "loop_ref=x: cannot be had from a broker"),
        (["--no-lock"], 2, "no_lock=True: cannot be had from a broker"),
        (["--offset", "100"], 2, "offset=100: must be a multiple of 512"),
        (["--nodes", "/nonexistent"], 3, "/nonexistent: cannot get nodes: No such file"),
    ],
)
def test_mistakes(served, image, options, code, message):
    process = attach(served, *options, image)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert message in err
    assert err.startswith("loopdev: ")


def test_nodes_without_a_broker(image):
    done = subprocess.run(
        [COMMAND, "attach", "--nodes", "/tmp", image], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "is for use with --broker" in done.stderr


def test_no_broker(tmp_path, image):
    for command in (["attach", image], ["list"]):
        words = [COMMAND, *command, "--broker", tmp_path / "nobody"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 1
        assert "no broker: No such file or directory" in done.stderr


def test_list(served, image):
    words = [COMMAND, "list", "--broker", served.path]
    assert run(*words) == ""
    with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
        client.attach(file.fileno())
        second = client.attach(file.fileno())
        table = run(*words).splitlines()
        assert table[0].split()[:3] == ["NAME", "SIZE", "SECTOR"]
        assert [line.split()[0] for line in table[1:]] == [f"loop{FIRST}", f"loop{FIRST + 1}"]
        assert str(image) in table[1]
        found = json.loads(run(*words, "--json", second.name))
        assert [entry["number"] for entry in found] == [second.number]
        assert found[0]["uid"] == 0


def test_log_has_the_client(served, image):
    with loopdev.LoopClient(served.path) as client, open(image, "r+b") as file:
        client.attach(file.fileno()).detach()
    wait_until(lambda: "disconnect uid=0 gid=0 pid=" in served.log().splitlines()[-1])
    for event in ("connect", "attach", "detach", "disconnect"):
        assert re.search(
            rf"^{event} uid=0 gid=0 pid={os.getpid()} cgroup=/", served.log(), re.MULTILINE
        )


def test_check_of_a_policy(tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(ALL)
    words = [COMMAND, "serve", "--check", "--policy", policy]
    assert run(*words) == f"{policy}: 1 rules\n"
    policy.write_text("[[rule]]\n")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "does not say whom it is for" in done.stderr


def test_bad_policy_at_the_start(tmp_path):
    done = subprocess.run(
        [COMMAND, "serve", "--socket", tmp_path / "s", "--policy", tmp_path / "missing"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "cannot be read" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_second_broker(served):
    done = subprocess.run(
        [COMMAND, "serve", "--socket", served.path], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "another broker is running with this socket" in done.stderr
    assert loopdev.LoopClient(served.path).close() is None


def test_socket_that_a_killed_broker_left(tmp_path):
    served = Served(tmp_path, ALL).start()
    served.kill()
    assert os.path.exists(served.path)
    with Served(tmp_path, ALL) as again, loopdev.LoopClient(again.path) as client:
        assert client.hello()["version"] == 1
    assert not os.path.exists(served.path)


def test_file_in_the_place_of_the_socket(tmp_path):
    (tmp_path / "s").write_text("mine")
    done = subprocess.run(
        [COMMAND, "serve", "--socket", tmp_path / "s"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "cannot listen" in done.stderr
    assert (tmp_path / "s").read_text() == "mine"


# systemd.

ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = "1"
os.execv(sys.argv[2], sys.argv[2:])
"""


class Manager:
    """What systemd does for a service: listens, waits for readiness, watches."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "activated.sock")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(directory / "notify"))
        self._notify.settimeout(20)
        self._log = open(directory / "log", "wb")  # closed in __exit__
        environment = {"NOTIFY_SOCKET": str(directory / "notify"), "WATCHDOG_USEC": "400000"}
        fd = self._listener.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, str(fd), COMMAND, "serve"],
            pass_fds=[fd],
            env={**os.environ, **environment},
            stderr=self._log,
        )

    def hears(self) -> str:
        return self._notify.recv(1000).decode()

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        assert self.process.wait(20) == 0
        for thing in (self._listener, self._notify, self._log):
            thing.close()


def test_under_a_manager(tmp_path, image):
    with Manager(tmp_path) as manager:
        assert manager.hears() == f"READY=1\nSTATUS=Listening on {manager.path}"
        with loopdev.LoopClient(manager.path) as client, open(image, "r+b") as file:
            client.attach(file.fileno()).detach()
        assert [manager.hears() for _ in range(3)] == ["WATCHDOG=1"] * 3
        manager.process.send_signal(signal.SIGHUP)
        heard = [manager.hears() for _ in range(3)]
        assert any(word.startswith("RELOADING=1\nMONOTONIC_USEC=") for word in heard)
        manager.process.send_signal(signal.SIGTERM)
        while manager.hears() != "STOPPING=1":
            pass
    # The socket is the manager's: a client may connect at any time.
    assert os.path.exists(manager.path)


def test_watchdog_of_a_stopped_broker(tmp_path):
    """A loop that does not go round says nothing."""
    with Manager(tmp_path) as manager:
        manager.hears()
        manager.process.send_signal(signal.SIGSTOP)
        try:
            manager._notify.settimeout(1.0)
            with pytest.raises(TimeoutError):
                for _ in range(20):
                    manager.hears()
        finally:
            manager.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("name", ["loopdev-broker.service", "loopdev-broker.socket"])
def test_units_are_sound(name, tmp_path):
    """As systemd reads them, with our command in the place of the installed one."""
    for unit in UNITS.glob("loopdev-broker.*"):
        text = unit.read_text().replace("/usr/bin/loopdev", str(COMMAND))
        (tmp_path / unit.name).write_text(text.replace("Documentation=man:loopdev(1)\n", ""))
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_unit_is_hardened():
    done = run(*("systemd-analyze", "security", "--offline=yes", UNITS / "loopdev-broker.service"))
    exposure = float(re.search(r"exposure level for .*: ([\d.]+)", done)[1])
    assert exposure < 4.0


def test_capabilities_of_the_unit_are_enough(tmp_path):
    """With those alone, and a mount namespace of its own, it does its main job."""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    text = (UNITS / "loopdev-broker.service").read_text()
    # A key may be there twice, which is no mistake to systemd.
    unit.read_string(text.replace("SystemCallFilter=~", "SystemCallFilter2="))
    wanted = unit["Service"]["CapabilityBoundingSet"].split()
    bounding = "-all," + ",".join("+" + name.removeprefix("CAP_").lower() for name in wanted)
    served = Served(tmp_path, ALL)
    open_to(USER, served.policy)
    with open(served.log_path, "wb") as log:
        served.process = subprocess.Popen(
            [
                *("unshare", "--mount", "--net", "setpriv", "--no-new-privs"),
                *(f"--bounding-set={bounding}", "--inh-caps=-all"),
                *(COMMAND, "serve", "--socket", served.path, "--policy", served.policy),
            ],
            stderr=log,
        )
    wait_until(served._answers)
    try:
        image = image_for(USER, tmp_path)
        for script in (NODE_CLIENT, FD_CLIENT):
            with in_namespaces(script, served.path, image) as process:
                outcome(process)
        status = Path(f"/proc/{served.process.pid}/status").read_text()
        assert int(re.search(r"CapEff:\s+(\w+)", status)[1], 16).bit_count() == len(wanted)
    finally:
        served.stop()
    assert "problem" not in served.log()
