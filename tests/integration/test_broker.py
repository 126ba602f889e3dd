# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The broker's main job: devices for those who have neither /dev nor rights."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest
from broker_tools import FIRST, USER, Served, in_namespaces, left_behind, open_to, outcome
from conftest import counting_bytes
from oracle import is_bound, losetup, make_gpt, partitions, run, sysfs, wait_until

import loopdev
from loopdev.broker.messages import Attach

ALL = '[[rule]]\nuid = "all"\n'


@pytest.fixture
def served(tmp_path):
    with Served(tmp_path, ALL) as broker:
        yield broker


@pytest.fixture
def server(tmp_path):
    """A broker within this process."""
    with loopdev.LoopServer(tmp_path / "s") as broker:
        yield broker
    assert left_behind() == []
    assert sorted(path.name for path in tmp_path.glob("s*")) == []


@pytest.fixture
def client(server):
    with loopdev.LoopClient(server.path) as connection:
        yield connection


@pytest.fixture
def disk(tmp_path) -> Path:
    """A disk with two partitions, of which the second holds counting integers."""
    path = tmp_path / "gpt.img"
    with open(path, "wb") as file:
        file.truncate(32 << 20)
        file.seek(9 << 20)
        file.write(counting_bytes(0, 1 << 20))
    make_gpt(path, "label: gpt\nsize=8MiB, name=boot\nsize=16MiB\n")
    return path


NODE_CLIENT = """
import json, os, subprocess, sys
import loopdev
socket, image = sys.argv[1:]
assert os.geteuid() == 0 and "CapEff:\\t0000000000000000" in open("/proc/self/status").read()
with loopdev.LoopClient(socket) as client:
    with client.device(image) as path:
        subprocess.run(["mkfs.ext4", "-q", path], check=True)
        found = subprocess.run(["blkid", "-p", "-o", "value", "-s", "TYPE", path], check=True,
                               capture_output=True, text=True).stdout.strip()
        inside = os.listdir("/dev")
    after = os.listdir("/dev")
print(json.dumps({"path": path, "type": found, "inside": inside, "after": after}))
"""

FD_CLIENT = """
import json, os, subprocess, sys
import loopdev
socket, image = sys.argv[1:]
with loopdev.LoopClient(socket) as client:
    with open(image, "r+b") as file, client.attach(file.fileno(), want_fd=True) as device:
        path = f"/proc/self/fd/{device.fileno()}"
        os.set_inheritable(device.fileno(), True)
        subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True, close_fds=False)
        magic = os.pread(device.fileno(), 2, 1024 + 56)
        seen = os.listdir("/dev")
print(json.dumps({"magic": magic.hex(), "seen": seen, "name": device.name}))
"""


def image_for(user: int, tmp_path: Path) -> Path:
    image = tmp_path / "client.img"
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    open_to(user, image)
    return image


def test_disk_by_node_in_namespaces(served, tmp_path):
    image = image_for(USER, tmp_path)
    with in_namespaces(NODE_CLIENT, served.path, image) as process:
        found = outcome(process)
    assert found["path"] == f"/dev/loop{FIRST}"
    assert found["type"] == "ext4"
    assert f"loop{FIRST}" in found["inside"]
    assert found["after"] == ["null2"]
    assert run("blkid", "-p", "-o", "value", "-s", "TYPE", image).strip() == "ext4"
    run("e2fsck", "-fn", image)


def test_disk_by_descriptor_in_namespaces(served, tmp_path):
    image = image_for(USER, tmp_path)
    with in_namespaces(FD_CLIENT, served.path, image) as process:
        found = outcome(process)
    assert found["magic"] == "53ef"
    assert found["seen"] == ["null2"]
    run("e2fsck", "-fn", image)


PARTITION_CLIENT = """
import json, os, stat, sys
import loopdev
socket, image = sys.argv[1:]
with loopdev.LoopClient(socket) as client:
    with client.device(image, partscan=True, read_only=True) as path:
        with open(path + "p2", "rb") as part:
            first = part.read(16).hex()
        modes = {name: oct(os.stat("/dev/" + name).st_mode) for name in os.listdir("/dev")}
        owners = {os.stat("/dev/" + name).st_uid for name in os.listdir("/dev")}
        fd = os.open(path, os.O_RDWR)
        try:
            os.write(fd, bytes(512))
        except OSError as exc:
            refused = exc.errno
        os.close(fd)
    print(json.dumps({"first": first, "modes": modes, "owners": list(owners), "refused": refused,
                      "after": os.listdir("/dev")}))
"""


def test_partitions_in_namespaces(served, tmp_path, disk):
    open_to(USER, disk)
    with in_namespaces(PARTITION_CLIENT, served.path, disk) as process:
        found = outcome(process)
    assert found["first"] == counting_bytes(0, 16).hex()
    names = {"null2", f"loop{FIRST}", f"loop{FIRST}p1", f"loop{FIRST}p2"}
    assert set(found["modes"]) == names
    assert found["modes"][f"loop{FIRST}p1"] == oct(stat.S_IFBLK | 0o600)
    assert found["owners"] == [0]  # itself, in its user namespace
    assert found["refused"] == errno.EPERM
    assert found["after"] == ["null2"]


KEEPER = """
import os, sys
import loopdev
socket, image = sys.argv[1:]
client = loopdev.LoopClient(socket)
with client.device(image) as path:
    held = os.open(path, os.O_PATH)
    again = os.open(path, os.O_RDWR)
    print("ready", flush=True)
    sys.stdin.readline()
    os.close(again)
client.close()
try:
    os.open(f"/proc/self/fd/{held}", os.O_RDWR)
    print("opened", flush=True)
except PermissionError:
    print("refused", flush=True)
"""


def test_a_node_that_was_kept_opens_nothing(served, tmp_path):
    """By an O_PATH descriptor a client could get at the next one's device."""
    image = image_for(USER, tmp_path)
    with in_namespaces(KEEPER, served.path, image) as process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "refused\n"


def test_killed_client_leaves_nothing(served, tmp_path):
    image = image_for(USER, tmp_path)
    with in_namespaces(KEEPER, served.path, image) as process:
        assert process.stdout.readline() == "ready\n"
        assert is_bound(FIRST)
        process.kill()
        wait_until(lambda: not is_bound(FIRST))
        wait_until(lambda: left_behind()[:-1] == [])  # the broker's own directory stays


def test_device_in_a_directory_of_the_host(client, tmp_path, disk):
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    with client.device(disk, partscan=True, directory=nodes) as path:
        assert path == str(nodes / f"loop{FIRST}")
        assert sorted(os.listdir(nodes)) == [f"loop{FIRST}{end}" for end in ("", "p1", "p2")]
        assert os.stat(path).st_rdev == os.makedev(7, FIRST)
        assert partitions(FIRST) == {1: (1 << 20, 8 << 20), 2: (9 << 20, 16 << 20)}
        assert losetup(f"/dev/loop{FIRST}")["back-file"] == str(disk)
    assert os.listdir(nodes) == []
    assert not is_bound(FIRST)


def test_device_of_root_uses_the_node_in_dev(client, image):
    with client.device(image) as path:
        assert path == f"/dev/loop{FIRST}"
        assert os.stat(path).st_uid == 0
    assert not is_bound(FIRST)


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_arguments_arrive(client, counting_file, sector_size):
    fd = os.open(counting_file, os.O_RDWR)
    try:
        device = client.attach(
            fd, offset=8192, sizelimit=65536, sector_size=sector_size, want_fd=True
        )
        with device:
            number = device.number
            assert sysfs(number, "loop/offset") == "8192"
            assert sysfs(number, "loop/sizelimit") == "65536"
            assert sysfs(number, "queue/logical_block_size") == str(sector_size)
            assert sysfs(number, "loop/autoclear") == "1"
            assert os.pread(device.fileno(), 4096, 0) == counting_bytes(8192, 4096)
            assert str(device.lease.diskseq) == sysfs(number, "diskseq")
            assert device.lease.rdev == os.makedev(7, number)
    finally:
        os.close(fd)


def test_read_only_descriptor_gives_a_read_only_device(client, counting_file):
    with open(counting_file, "rb") as file, client.attach(file.fileno(), want_fd=True) as device:
        assert device.lease.read_only
        assert sysfs(device.number, "ro") == "1"
        with pytest.raises(OSError):
            os.write(device.fileno(), bytes(512))


def test_what_was_written_is_in_the_file(client, image):
    with open(image, "r+b") as file:
        with client.attach(file.fileno(), want_fd=True) as device:
            os.pwrite(device.fileno(), b"written", 4096)
            device.sync()
            assert os.pread(file.fileno(), 7, 4096) == b"written"
            os.pwrite(device.fileno(), b"at the end", 8192)
        assert os.pread(file.fileno(), 10, 8192) == b"at the end"


def test_resize(client, image):
    with open(image, "r+b") as file, client.attach(file.fileno()) as device:
        file.truncate(32 << 20)
        assert device.resize() == 32 << 20
        assert sysfs(device.number, "size") == str((32 << 20) // 512)


def test_detach_of_a_device_in_use(client, image):
    with open(image, "r+b") as file:
        device = client.attach(file.fileno())
        with open(f"/dev/{device.name}", "rb"):
            with pytest.raises(loopdev.DeviceBusyError) as caught:
                device.detach(timeout=0.1)
            assert [holder.pid for holder in caught.value.holders] == [os.getpid()]
            assert is_bound(device.number)
        device.detach()
        assert not is_bound(device.number)
        with pytest.raises(loopdev.NotBoundError):
            device.detach()


def test_one_connection_knows_no_others_device(server, client, image):
    with open(image, "r+b") as file, loopdev.LoopClient(server.path) as other:
        with client.attach(file.fileno()) as device:
            listed = other.devices()
            assert [(entry["name"], entry["mine"]) for entry in listed] == [(device.name, False)]
            foreign = loopdev.broker.client.BrokerDevice(other, device)
            for call in (foreign.detach, foreign.sync, foreign.resize):
                with pytest.raises(loopdev.NotBoundError):
                    call()
            assert is_bound(device.number)


def test_list_of_many(client, tmp_path):
    with open(tmp_path / "many.img", "w+b") as file:
        file.truncate(1 << 20)
        for _ in range(120):
            client.attach(file.fileno())
        numbers = [entry["number"] for entry in client.devices()]
    assert len(set(numbers)) == 120
    assert numbers == sorted(numbers)


def test_foreign_number_is_passed_over(server, image):
    """LOOP_CTL_GET_FREE may give a device of ours to anybody, and a number may be taken."""
    with open(image, "r+b") as file, loopdev.LoopClient(server.path) as client:
        client.attach(file.fileno()).detach()  # FIRST is unbound now, and ours to use again
        foreign = loopdev.attach(image, number=FIRST)
        try:
            with client.attach(file.fileno()) as device:
                assert device.number == FIRST + 1
        finally:
            foreign.detach()
    wait_until(lambda: left_behind()[:-1] == [])


def test_exchanged_file_is_found_out(tmp_path, client):
    """Whoever has a read-only device open can give it another file of the same size."""
    import fcntl

    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_bytes(bytes(1 << 20))
    with open(one, "rb") as file, open(other, "rb") as second:
        device = client.attach(file.fileno(), want_fd=True)
        fcntl.ioctl(device.fileno(), 0x4C06, second.fileno())  # LOOP_CHANGE_FD
        for call in (device.sync, device.resize):
            with pytest.raises(loopdev.NotBoundError, match="exchanged"):
                call()
        device.detach()
        assert not is_bound(device.number)


def test_autoclear_that_the_client_cleared(tmp_path, client, image):
    with open(image, "r+b") as file:
        device = client.attach(file.fileno(), want_fd=True)
        with loopdev.loop.Loop(device.number) as loop:
            loop.set_status(autoclear=False)
        device.close_fd()
        client.close()
        wait_until(lambda: not is_bound(device.number))


def test_cleared_by_the_client(client, image):
    import fcntl

    with open(image, "r+b") as file:
        device = client.attach(file.fileno(), want_fd=True)
        fcntl.ioctl(device.fileno(), 0x4C01)  # LOOP_CLR_FD
        device.detach()
        assert not is_bound(device.number)


def test_device_that_somebody_keeps_open(server, image):
    """It goes with its last user; until then its number is given to nobody."""
    with open(image, "r+b") as file:
        client = loopdev.LoopClient(server.path)
        device = client.attach(file.fileno(), want_fd=True)
        kept = os.dup(device.fileno())
        device.close_fd()
        client.close()
        with loopdev.LoopClient(server.path) as other, other.attach(file.fileno()) as second:
            assert second.number != device.number
            os.pwrite(kept, b"kept", 0)
            assert is_bound(device.number)
            os.close(kept)
            wait_until(lambda: not is_bound(device.number))
        wait_until(lambda: not os.path.exists(f"/sys/block/loop{device.number}"))


def test_errors_are_those_of_attach(client, tmp_path):
    with open(tmp_path / "f", "w+b") as file:
        with pytest.raises(loopdev.BackingFileError, match="is empty"):
            client.attach(file.fileno())
        file.truncate(1000)
        with pytest.raises(loopdev.BackingFileError, match="488 too many"):
            client.attach(file.fileno())
        with pytest.raises(loopdev.InvalidValueError, match="multiple of 512") as caught:
            client.attach(file.fileno(), offset=100)
        assert caught.value.name == "offset"
        with pytest.raises(loopdev.InvalidValueError):
            client.attach(file.fileno(), offset=-1)
        with client.attach(file.fileno(), force=True) as device:
            assert device.lease.size == 512
    with pytest.raises(loopdev.BackingFileError) as caught:
        with client.device(tmp_path / "missing"):
            pass
    assert caught.value.errno == errno.ENOENT


def test_no_broker(tmp_path):
    with pytest.raises(loopdev.BrokerError) as caught:
        loopdev.LoopClient(tmp_path / "nobody")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / "nobody"))


def test_broker_that_goes(tmp_path, image):
    with loopdev.LoopServer(tmp_path / "s") as server:
        client = loopdev.LoopClient(server.path)
        client.hello()
    with pytest.raises(loopdev.BrokerError):
        client.hello()
    with pytest.raises(loopdev.ClosedError):
        client.hello()


def test_second_broker_at_one_socket(server, client):
    with pytest.raises(loopdev.BrokerError) as caught, loopdev.LoopServer(server.path):
        pass
    assert caught.value.errno == errno.EADDRINUSE
    assert client.hello()["version"] == 1


def test_hello(client):
    found = client.hello()
    assert found["version"] == 1
    assert {"attach", "detach", "list", "resize", "sync", "want_fd"} <= set(found["features"])
    assert found["limits"]["devices"] is None
    assert found["used"] == {"devices": 0, "bytes": 0}


def test_lock_keeps_others_from_locking(client, image):
    import fcntl

    with open(image, "r+b") as file, client.attach(file.fileno(), lock=True) as device:
        with open(f"/dev/{device.name}", "rb") as other:
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with open(image, "r+b") as file, client.attach(file.fileno()) as device:
        with open(f"/dev/{device.name}", "rb") as other:
            fcntl.flock(other, fcntl.LOCK_EX)  # udev may have it, for a moment


def test_threads_share_a_client(client, image):
    import threading

    failures = []

    def work() -> None:
        try:
            with open(image, "r+b") as file:
                for _ in range(20):
                    client.attach(file.fileno()).detach(timeout=30)
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_asyncio_client(server, tmp_path, disk, counting_file):
    async def main() -> None:
        async with loopdev.AsyncLoopClient(server.path) as client:
            assert (await client.hello())["version"] == 1
            nodes = tmp_path / "nodes"
            nodes.mkdir()
            async with client.device(disk, partscan=True, directory=nodes) as path:
                assert len(os.listdir(nodes)) == 3
                assert os.stat(path).st_rdev == os.makedev(7, FIRST)
            with open(counting_file, "r+b") as file:
                devices = await asyncio.gather(
                    *(client.attach(file.fileno(), want_fd=True) for _ in range(10))
                )
                assert len({device.number for device in devices}) == 10
                assert os.pread(devices[3].fileno(), 512, 512) == counting_bytes(512, 512)
                await devices[0].sync()
                assert await devices[0].resize() == 128 << 10
                assert len(await client.devices()) == 10
                await asyncio.gather(*(device.detach() for device in devices))
                with pytest.raises(loopdev.NotBoundError):
                    await devices[0].detach()
        with pytest.raises(loopdev.ClosedError):
            await client.hello()

    asyncio.run(main())
    assert not is_bound(FIRST)


def test_cancelled_task_closes_the_connection(server, image):
    async def main() -> None:
        client = loopdev.AsyncLoopClient(server.path)
        with open(image, "r+b") as file:
            task = asyncio.create_task(client.attach(file.fileno()))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        with pytest.raises(loopdev.ClosedError):
            await client.hello()

    asyncio.run(main())
    wait_until(lambda: not any(is_bound(number) for number in range(FIRST, FIRST + 4)))


def test_request_has_an_argument_for_each_field():
    """What the protocol can say, both clients can."""
    import inspect

    fields = set(Attach.__annotations__) - {"directory"}
    for client in (loopdev.LoopClient, loopdev.AsyncLoopClient):
        assert fields <= set(inspect.signature(client.attach).parameters)


def test_mount_in_the_host(client, image):
    """A build tool that runs as root mounts what it was given."""
    run("mkfs.ext4", "-q", image)
    mountpoint = image.parent / "mnt"
    mountpoint.mkdir()
    with client.device(image) as path:
        run("mount", path, mountpoint)
        (mountpoint / "file").write_text("hello")
        run("umount", mountpoint)
    assert (
        subprocess.run(["debugfs", "-R", "cat file", image], capture_output=True).stdout == b"hello"
    )
