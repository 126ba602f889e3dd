# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Every limit of the policy, and who it is for."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat

import pytest
from broker_tools import USER, Served, as_user, open_to
from oracle import is_bound, sysfs, wait_until

import loopdev
from loopdev import Policy, Rule

MIB = 1 << 20


@pytest.fixture
def serving(tmp_path):
    """Start a broker whose only rule is for everybody."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def serve(**fields: object) -> loopdev.LoopClient:
            policy = Policy(rules=(Rule(**fields),))
            server = stack.enter_context(loopdev.LoopServer(tmp_path / "s", policy))
            return stack.enter_context(loopdev.LoopClient(server.path))

        yield serve


@pytest.fixture
def file(image):
    with open(image, "r+b") as opened:
        yield opened


def refusal(call, *args: object, **options: object) -> loopdev.RefusedError:
    with pytest.raises(loopdev.RefusedError) as caught:
        call(*args, **options)
    return caught.value


def test_devices(serving, file):
    client = serving(devices=2)
    with client.attach(file.fileno()), loopdev.LoopClient(client.path) as other:
        # It counts for the user, not for a connection.
        with other.attach(file.fileno()):
            exc = refusal(client.attach, file.fileno())
            assert (exc.errno, exc.reason) == (errno.EDQUOT, "no more than 2 devices")
        client.attach(file.fileno()).detach()
    assert client.hello()["used"] == {"devices": 0, "bytes": 0}


def test_devices_of_one_who_failed_do_not_count(serving, file, tmp_path):
    client = serving(devices=1)
    with open(tmp_path / "empty", "w+b") as empty:
        for _ in range(3):
            with pytest.raises(loopdev.BackingFileError):
                client.attach(empty.fileno())
    client.attach(file.fileno()).detach()


def test_bytes(serving, file):
    client = serving(bytes=24 * MIB)
    with client.attach(file.fileno()):
        assert refusal(client.attach, file.fileno()).errno == errno.EDQUOT
        with client.attach(file.fileno(), sizelimit=8 * MIB):
            assert client.hello()["used"] == {"devices": 2, "bytes": 24 * MIB}
            assert refusal(client.attach, file.fileno(), sizelimit=512).errno == errno.EDQUOT
    client.attach(file.fileno()).detach()


def test_bytes_when_a_device_grows(serving, file):
    client = serving(bytes=20 * MIB)
    with client.attach(file.fileno()) as device:
        file.truncate(20 * MIB)
        assert device.resize() == 20 * MIB
        file.truncate(32 * MIB)
        assert refusal(device.resize).errno == errno.EDQUOT
        assert sysfs(device.number, "size") == str(20 * MIB // 512)
        assert client.hello()["used"]["bytes"] == 20 * MIB


def test_bytes_at_the_same_time(serving, file):
    """Of two that would both fit alone, one is refused."""
    import threading

    client = serving(bytes=24 * MIB)
    others = [loopdev.LoopClient(client.path) for _ in range(6)]
    outcomes: list[object] = []

    def work(other: loopdev.LoopClient) -> None:
        try:
            outcomes.append(other.attach(file.fileno()).number)
        except loopdev.RefusedError as exc:
            outcomes.append(exc.errno)

    threads = [threading.Thread(target=work, args=(other,)) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes)[:5] == [errno.EDQUOT] * 5
    for other in others:
        other.close()
    wait_until(lambda: client.hello()["used"] == {"devices": 0, "bytes": 0})


def test_read_only(serving, file, image):
    client = serving(read_only=True)
    assert "read-only" in refusal(client.attach, file.fileno()).reason
    with client.attach(file.fileno(), read_only=True) as device:
        assert sysfs(device.number, "ro") == "1"
    with open(image, "rb") as reader, client.attach(reader.fileno()) as device:
        assert device.lease.read_only


def test_partscan(serving, file):
    client = serving(partscan=False)
    assert "partscan" in refusal(client.attach, file.fileno(), partscan=True).reason
    client.attach(file.fileno()).detach()


def test_want_fd(serving, file):
    client = serving(want_fd=False)
    assert "want_fd" in refusal(client.attach, file.fileno(), want_fd=True).reason
    client.attach(file.fileno()).detach()


def test_block_devices(serving, image):
    client = serving(block_devices=True)
    with loopdev.attach(image) as lower, open(lower.path, "r+b") as device:
        with client.attach(device.fileno(), offset=MIB) as upper:
            assert upper.lease.size == 15 * MIB
    assert not is_bound(upper.number)


def test_connections(serving):
    client = serving(connections=2)
    with loopdev.LoopClient(client.path) as second:
        second.hello()
        third = loopdev.LoopClient(client.path)
        assert refusal(third.hello).reason == "no more than 2 connections"
        third.close()
    wait_until(lambda: loopdev_hello(client.path))


def loopdev_hello(path: str) -> bool:
    try:
        with loopdev.LoopClient(path) as client:
            return client.hello()["version"] == 1
    except loopdev.LoopdevError:
        return False


def test_request_rate(serving):
    client = serving(requests_per_second=20)
    answers = []
    for _ in range(60):
        try:
            client.hello()
            answers.append(0)
        except loopdev.RefusedError as exc:
            answers.append(exc.errno)
    assert answers[:20] == [0] * 20
    assert set(answers[20:]) <= {0, errno.EAGAIN}
    assert answers.count(errno.EAGAIN) > 20
    wait_until(lambda: loopdev_hello(client.path))


@pytest.mark.parametrize("owner", [None, (1, 6)])
def test_node_owner_and_mode(serving, file, tmp_path, owner):
    client = serving(node_owner=owner, node_mode=0o640)
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    fd = os.open(nodes, os.O_RDONLY)
    try:
        with client.attach(file.fileno(), directory=fd) as device:
            found = (nodes / device.name).stat()
    finally:
        os.close(fd)
    assert stat.S_IMODE(found.st_mode) == 0o640
    assert (found.st_uid, found.st_gid) == (owner or (0, 0))


def test_lock(serving, file):
    import fcntl

    client = serving(lock=True)
    with client.attach(file.fileno()) as device, open(f"/dev/{device.name}", "rb") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with pytest.raises(loopdev.DeviceBusyError):
            device.detach(timeout=0.05)
        # It is locked all the same after a detach that was refused.
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        other.close()


# Who.

WHO = """
import json, sys
import loopdev
try:
    with loopdev.LoopClient(sys.argv[1]) as client:
        found = client.hello()["limits"]["devices"]
except loopdev.RefusedError as exc:
    found = [exc.errno, exc.reason]
print(json.dumps(found))
"""


def answer_to(served: Served, user: int) -> object:
    open_to(USER, served.log_path)
    done = as_user(WHO, served.path, user=user)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_default_is_root_alone(tmp_path):
    with Served(tmp_path, None) as served:
        assert answer_to(served, USER) == [errno.EPERM, f"no rule allows user {USER}"]
        with loopdev.LoopClient(served.path) as client:
            assert client.hello()["limits"]["devices"] is None
        assert f"refused uid={USER}" in served.log()


def test_user_without_the_right_uid(tmp_path):
    with Served(tmp_path, f"[[rule]]\nuid = {USER}\ndevices = 3\n") as served:
        assert answer_to(served, USER) == 3
        assert answer_to(served, USER + 1) == [errno.EPERM, f"no rule allows user {USER + 1}"]
        with loopdev.LoopClient(served.path) as client, pytest.raises(loopdev.RefusedError):
            client.hello()  # root has no rule here


def test_group(tmp_path):
    with Served(tmp_path, f"[[rule]]\ngid = [{USER}]\ndevices = 4\n") as served:
        assert answer_to(served, USER) == 4
        assert answer_to(served, USER + 1)[0] == errno.EPERM


def test_first_rule_that_fits(tmp_path):
    policy = f'[[rule]]\nuid = {USER}\ndevices = 1\n[[rule]]\nuid = "all"\ndevices = 2\n'
    with Served(tmp_path, policy) as served:
        assert answer_to(served, USER) == 1
        assert answer_to(served, USER + 1) == 2


def test_reload(tmp_path, image):
    with Served(tmp_path, '[[rule]]\nuid = "all"\ndevices = 1\n') as served:
        with open(image, "r+b") as opened, loopdev.LoopClient(served.path) as client:
            device = client.attach(opened.fileno())
            served.policy.write_text('[[rule]]\nuid = "all"\ndevices = 7\n')
            served.process.send_signal(signal.SIGHUP)
            wait_until(lambda: answer_to(served, USER) == 7)
            assert client.hello()["limits"]["devices"] == 7  # who was connected before, too
            # A bad one changes nothing, and is told.
            served.policy.write_text('[[rule]]\nuid = "all"\ndevices = -1\n')
            served.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "policy kept" in served.log())
            assert "rule 1: devices must be a number, 0 or more" in served.log()
            assert answer_to(served, USER) == 7
            assert is_bound(device.number)
