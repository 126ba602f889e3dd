# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Whatever a client passes as a file or a directory: used, or refused with the reason."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from broker_tools import (
    FIRST,
    USER,
    Served,
    as_user,
    descriptors,
    in_namespaces,
    interpreter,
    open_to,
    outcome,
)
from conftest import bound_to
from fake_fuse import SIZE, StoppedFuse
from oracle import is_bound, run, sysfs, wait_until

import loopdev

ALL = '[[rule]]\nuid = "all"\nblock_devices = false\n'
F_ADD_SEALS, F_SEAL_WRITE, F_SEAL_SHRINK = 1033, 8, 2


pytestmark = pytest.mark.lasting_broker


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with Served(tmp_path_factory.mktemp("broker"), ALL) as broker:
        yield broker


@pytest.fixture
def client(served):
    workers = served.workers()
    before = [descriptors(pid) for pid in (served.process.pid, *workers)]
    with loopdev.LoopClient(served.path) as connection:
        yield connection
    # Each worker keeps one for the list of FUSE's connections.
    wait_until(lambda: descriptors(served.process.pid) <= before[0])
    for pid, count in zip(workers, before[1:], strict=True):
        wait_until(lambda pid=pid, count=count: descriptors(pid) <= count + 1)


def refused(client, fd: int, **options) -> loopdev.LoopdevError:
    """Have a descriptor refused; the connection goes on afterwards."""
    with pytest.raises(loopdev.LoopdevError) as caught:
        client.attach(fd, **options)
    assert client.devices() == []
    return caught.value


def test_pipe(client):
    ends = os.pipe()
    try:
        for end in ends:
            exc = refused(client, end)
            assert isinstance(exc, loopdev.BackingFileError)
            assert "pipe" in str(exc) or "write-only" in str(exc)
    finally:
        for end in ends:
            os.close(end)


def test_socket(client):
    with socket.socket(socket.AF_UNIX) as sock:
        assert "is a socket" in str(refused(client, sock.fileno()))


def test_the_connection_itself(client):
    assert "is a socket" in str(refused(client, client.fileno()))


def test_o_path(client, image):
    fd = os.open(image, os.O_PATH)
    try:
        exc = refused(client, fd)
    finally:
        os.close(fd)
    assert "O_PATH" in str(exc)
    assert exc.errno == errno.EBADF


def test_directory(client, tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert refused(client, fd).errno == errno.EISDIR
    finally:
        os.close(fd)


def test_character_device(client):
    with open("/dev/null", "r+b") as null:
        assert "character device" in str(refused(client, null.fileno()))


def test_epoll(client):
    import select

    with select.epoll() as poll:
        assert "another kind" in str(refused(client, poll.fileno()))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(os.O_WRONLY, "write-only"), (os.O_RDWR | os.O_APPEND, "append-only")],
)
def test_access_modes(client, image, flags, reason):
    fd = os.open(image, flags)
    try:
        assert reason in str(refused(client, fd))
    finally:
        os.close(fd)


def test_block_device_that_policy_forbids(client, image):
    with loopdev.attach(image) as device, open(device.path, "rb") as file:
        exc = refused(client, file.fileno())
    assert isinstance(exc, loopdev.RefusedError)
    assert "block device" in str(exc)


def test_memfd(client):
    fd = os.memfd_create("disk")
    try:
        os.ftruncate(fd, 1 << 20)
        with client.attach(fd, want_fd=True) as device:
            os.pwrite(device.fileno(), b"hello", 4096)
            device.sync()
            assert os.pread(fd, 5, 4096) == b"hello"
    finally:
        os.close(fd)


def test_sealed_memfd(client):
    fd = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 1 << 20)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK)
        assert "sealed" in str(refused(client, fd))
        with client.attach(fd, read_only=True) as device:
            assert device.lease.read_only
    finally:
        os.close(fd)


def test_deleted_file(client, image):
    with open(image, "r+b") as file:
        image.unlink()
        with client.attach(file.fileno(), want_fd=True) as device:
            assert sysfs(device.number, "loop/backing_file").endswith("(deleted)")
            os.pwrite(device.fileno(), b"there", 0)
        assert os.pread(file.fileno(), 5, 0) == b"there"


def test_file_that_is_truncated_afterwards(client, image):
    with open(image, "r+b") as file:
        device = client.attach(file.fileno(), want_fd=True)
        os.ftruncate(file.fileno(), 0)
        try:
            found = os.pread(device.fileno(), 4096, 1 << 20)
        except OSError:
            found = b""  # EIO; on the buffered path it is zeros
        assert found.strip(b"\0") == b""
        assert device.resize() == 0
        os.ftruncate(file.fileno(), 1 << 20)
        assert device.resize() == 1 << 20
        device.detach()
        assert not is_bound(device.number)


def test_swap_file(client, tmp_path):
    swap = tmp_path / "swap file"
    swap.write_bytes(bytes(1 << 20))
    swap.chmod(0o600)
    run("mkswap", swap)
    done = subprocess.run(["swapon", swap], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"swapon: {done.stderr}")
    try:
        with open(swap, "rb") as file:
            exc = refused(client, file.fileno())
    finally:
        run("swapoff", swap)
    assert "swap" in str(exc)
    assert exc.errno == errno.EBUSY


@pytest.mark.parametrize("name", ["broker.sock.state", "policy.toml"])
def test_files_of_the_broker(client, served, name):
    with open(served.directory / name, "rb") as file:
        exc = refused(client, file.fileno())
    assert isinstance(exc, loopdev.RefusedError)
    assert "broker's own" in str(exc)


def test_fuse_that_another_user_serves(client, tmp_path):
    with StoppedFuse(tmp_path / "fuse", user=USER) as fuse, open(fuse.file, "rb") as file:
        # Not even stopped it can make the broker wait.
        fuse.stop()
        try:
            exc = refused(client, file.fileno())
        finally:
            fuse.resume()  # close() asks it, too
    assert isinstance(exc, loopdev.RefusedError)
    assert f"user {USER}" in str(exc)


def test_fuse_that_root_serves(client, tmp_path):
    with StoppedFuse(tmp_path / "fuse") as fuse, open(fuse.file, "rb") as file:
        with client.attach(file.fileno()) as device:
            assert device.lease.size == SIZE


@pytest.mark.parametrize("count", [0, 2, 3, 50, 253])
def test_number_of_descriptors(served, image, count):
    """One belongs to this request; what is too much is closed, and the connection goes on."""
    before = descriptors(served.process.pid)
    with open(image, "r+b") as file, loopdev.LoopClient(served.path) as client:
        with socket.socket(fileno=os.dup(client.fileno())) as raw:
            raw.sendmsg(
                [b'{"v":1,"op":"attach"}'],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * count))]
                if count
                else [],
            )
            reply = raw.recv(10000)
        assert b"LocalProtocolError" in reply
        assert b"needs 1 descriptors" in reply
        assert client.devices() == []
    wait_until(lambda: descriptors(served.process.pid) == before)
    for pid in served.workers():
        links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert str(image) not in links


def test_descriptors_where_none_belong(served, image):
    with open(image, "r+b") as file, loopdev.LoopClient(served.path) as client:
        with socket.socket(fileno=os.dup(client.fileno())) as raw:
            socket.send_fds(raw, [b'{"v":1,"op":"hello"}'], [file.fileno()] * 5)
            assert b"no descriptor belongs to hello" in raw.recv(10000)
        assert client.hello()["version"] == 1


# Directories.

NODES = """
import json, os, sys
import loopdev
socket, image, directory = sys.argv[1:]
try:
    with loopdev.LoopClient(socket) as client:
        with client.device(image, directory=directory) as path:
            found = {"stat": os.stat(path).st_mode, "uid": os.stat(path).st_uid}
            with open(path, "r+b", buffering=0) as file:
                file.write(b"x" * 512)
except loopdev.LoopdevError as exc:
    found = {"error": type(exc).__name__, "text": str(exc), "errno": exc.errno}
print(json.dumps(found))
"""


def user_image(tmp_path: Path) -> Path:
    image = tmp_path / "user.img"
    with open(image, "wb") as file:
        file.truncate(1 << 20)
    open_to(USER, image)
    return image


def run_nodes(served, image: Path, directory: Path) -> dict[str, object]:
    import json

    open_to(USER, served.directory / "policy.toml")  # and with it the way to the socket
    done = as_user(NODES, served.path, image, directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_user_of_the_host_has_its_own_nodes(served, tmp_path):
    image, nodes = user_image(tmp_path), tmp_path / "nodes"
    nodes.mkdir()
    open_to(USER, nodes)
    found = run_nodes(served, image, nodes)
    assert found == {"stat": stat.S_IFBLK | 0o600, "uid": USER}
    assert image.read_bytes()[:3] == b"xxx"
    assert os.listdir(nodes) == []


@pytest.mark.parametrize("mode", [0o755, 0o555, 0o700])
def test_directory_that_the_client_may_not_write(served, tmp_path, mode):
    """It is root's; the broker could write it, and does not."""
    image, nodes = user_image(tmp_path), tmp_path / "nodes"
    nodes.mkdir()
    open_to(USER, image)
    fd = os.open(nodes, os.O_RDONLY)
    nodes.chmod(mode)
    os.set_inheritable(fd, True)
    found = run_nodes_by_fd(served, image, fd)
    os.close(fd)
    assert found["errno"] == errno.EACCES
    assert os.listdir(nodes) == []
    assert bound_to(str(tmp_path)) == {}


BY_FD = """
import json, os, sys
import loopdev
socket, image, fd = sys.argv[1], sys.argv[2], int(sys.argv[3])
with loopdev.LoopClient(socket) as client, open(image, "r+b") as file:
    try:
        with client.attach(file.fileno(), directory=fd) as device:
            found = {"nodes": list(device.lease.nodes)}
    except loopdev.LoopdevError as exc:
        found = {"error": type(exc).__name__, "errno": exc.errno, "text": str(exc)}
print(json.dumps(found))
"""


def run_nodes_by_fd(served, image: Path, fd: int) -> dict[str, object]:
    import json

    open_to(USER, served.directory / "policy.toml")
    done = subprocess.run(
        [
            *("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups", "sh", "-c"),
            f'exec {interpreter(USER)} -c "$0" "$@"',
            *(BY_FD, served.path, str(image), str(fd)),
        ],
        capture_output=True,
        text=True,
        pass_fds=[fd],
        env={**os.environ, "PYTHONPATH": str(Path(loopdev.__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("capabilities", "code"), [([], None), (["--bounding-set=-all"], 13)])
def test_root_with_and_without_capabilities(served, image, tmp_path, capabilities, code):
    """Root in a container is no more than an owner."""
    import json

    nodes = tmp_path / "nodes"
    nodes.mkdir()
    fd = os.open(nodes, os.O_RDONLY)
    os.chown(nodes, USER, USER)
    nodes.chmod(0o700)
    try:
        done = subprocess.run(
            ["setpriv", *capabilities, sys.executable, "-c", BY_FD, served.path, image, str(fd)],
            capture_output=True,
            text=True,
            pass_fds=[fd],
        )
    finally:
        os.close(fd)
    found = json.loads(done.stdout)
    assert found.get("errno") == code
    assert ("nodes" in found) is (code is None)
    assert os.listdir(nodes) == []


def test_group_that_may_write(served, tmp_path):
    """Supplementary groups count, as the kernel knows them."""
    image, nodes = user_image(tmp_path), tmp_path / "nodes"
    nodes.mkdir()
    os.chown(nodes, 0, USER)
    nodes.chmod(0o770)
    fd = os.open(nodes, os.O_RDONLY)
    found = run_nodes_by_fd(served, image, fd)
    os.close(fd)
    assert len(found["nodes"]) == 1


def test_file_in_place_of_the_directory(client, image):
    with open(image, "r+b") as file, open(image, "rb") as no_directory:
        exc = refused(client, file.fileno(), directory=no_directory.fileno())
    assert exc.errno == errno.ENOTDIR


def test_something_is_in_the_way(client, image, tmp_path):
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    names = [f"loop{number}" for number in range(FIRST, FIRST + 300)]
    for name in names:
        (nodes / name).write_text("mine")
    fd = os.open(nodes, os.O_RDONLY)
    try:
        with open(image, "r+b") as file:
            exc = refused(client, file.fileno(), directory=fd)
    finally:
        os.close(fd)
    assert exc.errno == errno.EEXIST
    assert {(nodes / name).read_text() for name in names} == {"mine"}


def test_symbolic_link_in_the_way(client, image, tmp_path):
    nodes, victim = tmp_path / "nodes", tmp_path / "victim"
    nodes.mkdir()
    victim.write_text("")
    for number in range(FIRST, FIRST + 300):
        (nodes / f"loop{number}").symlink_to(victim)
    fd = os.open(nodes, os.O_RDONLY)
    try:
        with open(image, "r+b") as file:
            refused(client, file.fileno(), directory=fd)
    finally:
        os.close(fd)
    assert victim.read_text() == ""
    assert stat.S_ISREG(victim.stat().st_mode)


def test_directory_that_is_removed(client, image, tmp_path):
    """While it has a node it cannot be removed, but it can be moved."""
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    with client.device(image, directory=nodes):
        nodes.rename(tmp_path / "moved")
    assert os.listdir(tmp_path / "moved") == []


MOVER = """
import json, os, sys
import loopdev
socket, image = sys.argv[1:]
with loopdev.LoopClient(socket) as client:
    fd = os.open("/dev", os.O_RDONLY)
    with open(image, "r+b") as file, client.attach(file.fileno(), directory=fd) as device:
        name = device.name
        # Its own user namespace cannot unmount what was mounted from outside, or replace it.
        for act in (os.unlink, lambda path: os.rename(path, "/dev/other")):
            try:
                act("/dev/" + name)
                print("done", act)
            except OSError as exc:
                pass
print(json.dumps({"left": os.listdir("/dev")}))
"""


def test_client_that_plays_with_its_nodes(served, tmp_path):
    with in_namespaces(MOVER, served.path, user_image(tmp_path)) as process:
        assert outcome(process) == {"left": ["null2"]}


THIRD = """
import json, os, socket, sys
import loopdev
path, image, handed = sys.argv[1:]
# A directory of another mount namespace than ours comes over this socket.
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as giver:
    giver.connect(handed)
    _, fds, _, _ = socket.recv_fds(giver, 10, 1)
with loopdev.LoopClient(path) as client, open(image, "r+b") as file:
    with client.attach(file.fileno(), directory=fds[0]) as device:
        name = device.name
        held = os.open(name, os.O_PATH, dir_fd=fds[0])
        found = {"rdev": os.fstat(held).st_rdev, "uid": os.fstat(held).st_uid}
        os.close(os.open(name, os.O_RDWR, dir_fd=fds[0]))
        os.link(name, "hidden", src_dir_fd=fds[0], dst_dir_fd=fds[0])
    try:
        os.open("hidden", os.O_RDWR, dir_fd=fds[0])
        found["hidden"] = "opened"
    except PermissionError:
        found["hidden"] = "refused"
    found["left"] = os.listdir(fds[0])
print(json.dumps(found))
"""


def test_directory_of_a_third_namespace(served, tmp_path):
    """Where nothing can be mounted, a node is made; and taken away wherever the client hid it."""
    image = user_image(tmp_path)
    third = tmp_path / "third"
    third.mkdir()
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {third} && echo ready && read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        holder.stdout.readline()
        fd = os.open(f"/proc/{holder.pid}/root{third}", os.O_RDONLY)
        os.chown(fd, USER, USER)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as giver:
            giver.bind(str(tmp_path / "giver"))
            open_to(USER, tmp_path / "giver")
            giver.listen()
            with in_namespaces(THIRD, served.path, image, tmp_path / "giver") as process:
                other, _ = giver.accept()
                with other:
                    socket.send_fds(other, [b"x"], [fd])
                found = outcome(process)
        os.close(fd)
        holder.stdin.close()
    # Seen from the user namespace the owner is its root.
    assert found["uid"] == 0
    assert os.major(found["rdev"]) == 7
    assert (found["hidden"], found["left"]) == ("refused", ["hidden"])
