# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A live socket, any bytes, any descriptors: every message gets one answer, or the end."""

from __future__ import annotations

import array
import json
import os
import socket

import pytest
from broker_tools import Served, descriptors
from conftest import bound_to
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import wait_until

import loopdev

ALL = '[[rule]]\nuid = "all"\nrequests_per_second = "unlimited"\n'


pytestmark = pytest.mark.lasting_broker


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("broker"), ALL) as broker:
        yield broker


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Descriptors of many kinds."""
    directory = tmp_path_factory.mktemp("kinds")
    image = directory / "disk.img"
    image.write_bytes(bytes(1 << 20))
    reader, writer = os.pipe()
    pair = socket.socketpair()
    fds = {
        "file": os.open(image, os.O_RDWR),
        "read-only": os.open(image, os.O_RDONLY),
        "append": os.open(image, os.O_RDWR | os.O_APPEND),
        "path": os.open(image, os.O_PATH),
        "directory": os.open(directory, os.O_RDONLY),
        "null": os.open("/dev/null", os.O_RDWR),
        "memfd": os.memfd_create("disk"),
        "reader": reader,
        "writer": writer,
        "socket": pair[0].fileno(),
        "proc": os.open("/proc/self/maps", os.O_RDONLY),
        "event": os.eventfd(0),
    }
    os.ftruncate(fds["memfd"], 1 << 16)
    yield list(fds.values())
    pair[1].close()
    pair[0].detach()
    for fd in fds.values():
        os.close(fd)


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 1 << 65), st.floats(), st.text(max_size=8)
)
_FIELDS = st.sampled_from(
    [
        *("offset", "sizelimit", "sector_size", "read_only", "partscan", "direct_io", "force"),
        *("directory", "want_fd", "lock", "number", "diskseq", "timeout", "after", "other"),
    ]
)
_LIKELY = st.fixed_dictionaries(
    {"v": st.sampled_from([1, 1, 1, 1, 2, True])},
    optional={
        "op": st.sampled_from(["hello", "attach", "attach", "detach", "resize", "sync", "list"]),
        "offset": st.sampled_from([0, 512, 4096, 1 << 62]),
        "sizelimit": st.sampled_from([0, 512, 65536]),
        "sector_size": st.sampled_from([None, 512, 4096, 513]),
        "partscan": st.booleans(),
        "want_fd": st.booleans(),
        "directory": st.booleans(),
        "number": st.integers(999, 1003),
        "diskseq": st.integers(0, 5),
        "timeout": st.sampled_from([0, 0.01]),
    },
)
_MESSAGES = st.one_of(
    st.binary(min_size=1, max_size=200),
    st.dictionaries(_FIELDS, _VALUES, max_size=6).map(lambda d: json.dumps({"v": 1, **d}).encode()),
    _LIKELY.map(lambda d: json.dumps(d).encode()),
)


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.tuples(_MESSAGES, st.lists(st.integers(0, 11), max_size=4)), max_size=4))
def test_any_message_with_any_descriptors(served, kinds, messages):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.connect(served.path)
        raw.settimeout(20)
        for data, which in messages:
            rights = array.array("i", [kinds[index] for index in which])
            raw.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if which else [])
            reply, fds, _, _ = socket.recv_fds(raw, 1 << 18, 4)
            for fd in fds:
                os.close(fd)
            body = json.loads(reply)
            assert body["v"] == 1
            assert ("result" in body) != ("error" in body)


def test_nothing_is_left_of_it(served, tmp_path_factory):
    """After all that: no device, no descriptor, and the same broker."""
    with loopdev.LoopClient(served.path) as client:
        assert client.hello()["version"] == 1
    wait_until(lambda: bound_to(str(tmp_path_factory.getbasetemp())) == {})
    wait_until(lambda: descriptors(served.process.pid) < 20)
    for pid in served.workers():
        assert descriptors(pid) < 8
    assert "Traceback" not in served.log()


def test_oversized_message(served):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.connect(served.path)
        for size in (16385, 100_000):
            raw.send(b" " * size)
            assert b"more than 16384 bytes" in raw.recv(10000)
        raw.send(b'{"v":1,"op":"hello"}' + b" " * 16000)
        assert b'"version":1' in raw.recv(10000)


def test_empty_message_ends_the_connection(served):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.connect(served.path)
        raw.send(b"")
        raw.settimeout(10)
        assert raw.recv(100) == b""


def test_empty_message_with_descriptors(served, kinds):
    before = descriptors(served.process.pid)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.connect(served.path)
            socket.send_fds(raw, [b""], kinds)
            raw.settimeout(10)
            assert raw.recv(100) == b""
    wait_until(lambda: descriptors(served.process.pid) <= before)


def test_flood_of_descriptors(served, kinds):
    """Thousands, as many as fit into messages: the kernel closes what nobody takes."""
    before = [descriptors(pid) for pid in (served.process.pid, *served.workers())]
    sent = 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
        raw.connect(served.path)
        raw.settimeout(20)
        for turn in range(40):
            many = array.array("i", (kinds * 22)[:253])
            op = b'{"v":1,"op":"attach"}' if turn % 2 else b"{"
            raw.sendmsg([op], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
            assert b'"error"' in raw.recv(10000)
            sent += len(many)
    assert sent > 10_000
    wait_until(lambda: descriptors(served.process.pid) <= before[0])
    for pid, count in zip(served.workers(), before[1:], strict=False):
        assert descriptors(pid) <= count + 1


def test_a_flood_that_nobody_reads(served, kinds):
    """Sent and never read: gone with its connection."""
    before = descriptors(served.process.pid)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as raw:
            raw.connect(served.path)
            raw.setblocking(False)
            try:
                for _ in range(1000):
                    socket.send_fds(raw, [b'{"v":1,"op":"list"}'], kinds)
            except (BlockingIOError, OSError):
                pass  # EAGAIN: full; ETOOMANYREFS: the limit of this user
    wait_until(lambda: descriptors(served.process.pid) <= before)
    with loopdev.LoopClient(served.path) as client:
        assert client.hello()["version"] == 1
