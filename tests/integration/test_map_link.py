# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A map over a link with delay and loss, between two network namespaces."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "unit"))
import pbs
import pbs_server
from conftest import REQUIRED
from slow_link import SERVER_ADDRESS, SlowLink

LOOPDEV = str(Path(sys.executable).with_name("loopdev"))
NAME = f"link-test-{os.getpid()}"
DATA = os.urandom(1 << 20)
SIZE = 40 << 20


@pytest.fixture
def link():
    made = SlowLink(f"t{os.getpid()}")
    try:
        made.open()
    except OSError as exc:
        if REQUIRED:
            raise
        pytest.skip(f"no network namespaces: {exc}")
    yield made
    made.close()


@pytest.fixture
def mapped(link, tmp_path):
    """A function that maps an image over the link; and the image's checksum."""
    store = tmp_path / "store"
    image = b"".join(bytes([n]) + DATA[1:] for n in range(SIZE >> 20))
    pbs.make_snapshot(store, "vm/100/2024-01-02T03:04:05Z", image, 4 << 20)
    program = [sys.executable, pbs_server.__file__, str(store)]
    program += ["--host", SERVER_ADDRESS, "--directory", str(tmp_path)]
    server = subprocess.Popen(
        link.command(link.server, *program), stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    port, fingerprint = server.stdout.readline().split()
    environment = os.environ | {
        "PBS_PASSWORD": pbs_server.PASSWORD,
        "PBS_FINGERPRINT": fingerprint,
        "PBS_REPOSITORY": f"{pbs_server.USER}@{SERVER_ADDRESS}:{port}:{pbs_server.STORE}",
    }

    def map_it(*options: str) -> str:
        words = [LOOPDEV, "map", "--name", NAME, *options, f"pbs:vm/100/latest/{pbs.DISK}"]
        return subprocess.run(
            link.command(link.client, *words),
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        ).stdout.strip()

    yield map_it, hashlib.sha256(image).hexdigest()
    subprocess.run([LOOPDEV, "unmap", "--force", NAME], check=True)
    server.terminate()
    server.communicate()


def checksum(device: str) -> str:
    with open(device, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize(("delay", "loss"), [(0.02, 0.0), (0.05, 0.0), (0.01, 0.01)])
def test_the_whole_way(link, mapped, delay, loss):
    map_it, expected = mapped
    link.set(delay, loss)
    assert checksum(map_it()) == expected


def connections(link) -> int:
    """Return how many connections there are, as the kernel knows them."""
    listed = subprocess.run(
        link.command(link.client, "ss", "-tnH", "state", "established"),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return len(listed.stdout.splitlines())


@pytest.mark.parametrize(("delay", "lanes"), [(0.0, 1), (0.01, 3)])
def test_a_long_way_has_more_connections(link, mapped, delay, lanes):
    map_it, expected = mapped
    link.set(delay)
    device = map_it("--workers", "2")
    assert checksum(device) == expected
    deadline = time.monotonic() + 10
    while connections(link) != 2 * lanes:
        assert time.monotonic() < deadline, connections(link)
        time.sleep(0.05)


def test_a_link_that_is_dead_for_a_while(link, mapped):
    map_it, expected = mapped
    link.set(0.005)
    device = map_it("--io-timeout", "30")
    link.set(0.005, loss=1.0)
    result: list[str] = []
    reader = threading.Thread(target=lambda: result.append(checksum(device)))
    reader.start()
    reader.join(6)
    assert reader.is_alive(), "nothing can have come"
    link.set(0.005)
    begin = time.monotonic()
    reader.join(30)
    assert result == [expected]
    assert time.monotonic() - begin < 20


def test_nothing_hangs_past_the_deadline_on_a_dead_link(link, mapped):
    map_it, expected = mapped
    device = map_it("--io-timeout", "2")
    link.set(loss=1.0)
    begin = time.monotonic()
    with open(device, "rb", buffering=0) as file:
        file.seek(20 << 20)
        with pytest.raises(OSError, match="Input/output error"):
            file.read(4096)
    assert time.monotonic() - begin < 10
    link.set()
    deadline = time.monotonic() + 30
    while True:
        try:
            found = checksum(device)
        except OSError:
            assert time.monotonic() < deadline, "it is not well again"
        else:
            assert found == expected
            return
