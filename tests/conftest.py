# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Which tests can run here, and that none of them leaves anything."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

# Set in CI: a test that cannot run is then a failure.
REQUIRED = os.environ.get("LOOPDEV_TEST_LOOP") == "1"
SYSFS = Path("/sys/block")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in item.path.parts:
            item.add_marker("loop")


def why_not() -> str | None:
    """Return why loop devices cannot be attached here, None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/loop-control"):
        return "there is no /dev/loop-control"
    return None


@pytest.fixture(autouse=True)
def _loop_devices(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("loop") is None:
        return
    reason = why_not()
    if reason is not None and REQUIRED:
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


def open_descriptors() -> set[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:
            pass  # that of the listing itself
    return found


def bound_to(directory: str) -> dict[str, str]:
    """Return the loop devices that have a file below a directory, and their files."""
    found = {}
    for device in SYSFS.glob("loop*"):
        try:
            backing = os.fsdecode((device / "loop/backing_file").read_bytes())
        except OSError:
            continue
        if backing.startswith(directory):
            found[device.name] = backing
    return found


def numbers() -> set[str]:
    return {device.name for device in SYSFS.glob("loop*")}


def nodes() -> set[str]:
    return {name for name in os.listdir("/dev") if name.startswith("loop")}


@pytest.fixture(autouse=True)
def _no_leaks(request: pytest.FixtureRequest, tmp_path: Path, _loop_devices: None):
    """Fail the test that leaves a descriptor, a bound device, a node or an added number."""
    before = open_descriptors()
    devices_before, nodes_before = numbers(), nodes()
    yield
    deadline = time.monotonic() + 5
    while (left := bound_to(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.01)  # udev, where it runs, may have had one open when it was let go
    assert not left, f"still bound: {left}"
    leaked = open_descriptors() - before
    assert not leaked, f"descriptors left open: {leaked}"
    # Others on the machine add devices, too, so this is for where nobody else is.
    marker = request.node.get_closest_marker
    if REQUIRED and marker("loop") is not None and marker("lasting_broker") is None:
        assert numbers() - devices_before == set()
        assert nodes() - nodes_before == set()


def registered() -> set[str]:
    """Return what there is of maps, of those that are just being made, too."""
    try:
        return set(os.listdir("/run/loopdev/maps"))
    except FileNotFoundError:
        return set()


@pytest.fixture
def maps(tmp_path: Path):
    """What makes maps; it fails the test that leaves anything of one."""
    from mapped import Maps, wait_until

    made, files = Maps(tmp_path), registered()
    try:
        yield made
        try:
            wait_until(lambda: not made.left(), 5)
        except AssertionError:
            pytest.fail(f"left: {made.left()}")
        # Others may map at the same time, and call their maps what they like.
        assert not {name for name in registered() - files if f"t-{os.getpid()}-" in name}
    finally:
        made.remove()


@pytest.fixture(params=[512, 4096])
def sector_size(request: pytest.FixtureRequest) -> int:
    return request.param


def counting_bytes(start: int, length: int) -> bytes:
    """Return *length* bytes of the file of counting 16-bit integers, from byte *start* on."""
    first = start // 2
    count = length // 2 + 2
    data = struct.pack(f"<{count}H", *((first + i) & 0xFFFF for i in range(count)))
    return data[start % 2 : start % 2 + length]


@pytest.fixture
def counting_file(tmp_path: Path) -> Path:
    """An image of 128 KiB whose every byte says where it is."""
    path = tmp_path / "counting.img"
    path.write_bytes(counting_bytes(0, 128 << 10))
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse image of 16 MiB."""
    path = tmp_path / "disk.img"
    with open(path, "wb") as file:
        file.truncate(16 << 20)
    return path
