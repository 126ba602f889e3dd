# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Cleaning up after a broker that was killed, by what it had written down.

The kernel has detached its devices already, since nobody holds them. What it leaves are numbers,
nodes, and the device of a client that still has it open or has switched autoclear off. A device is
ours only if it still is the attachment that was written down; every other is left alone.
"""

from __future__ import annotations

import errno
import os

from loopdev._control import LoopControl
from loopdev._detach import Detachment
from loopdev._device import LoopDevice
from loopdev.broker import _nodes
from loopdev.errors import DeviceBusyError, LoopdevError, NoSuchDeviceError
from loopdev.kernel import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.broker._jobs import Client, Device

# Seconds. Nobody is asked to wait for this.
_TIMEOUT = 2.0


def recover(
    number: int, record: Device | None, client: Client | None, private: str
) -> dict[str, object]:
    """End what one number of a broker was, and remove the device.

    Args:
        number: It was added by that broker.
        record: What was attached to it; None: nothing.
        client: To whom.
        private: Where that broker had its nodes.

    Returns:
        "left": Whether the device still is ours, and is in use by somebody.
        "problems": What could not be done.
    """
    problems: list[str] = []
    if record is not None and client is not None:
        _nodes.revoke(_nodes.reopenable(private, number))
        for name in [node["name"] for node in record["nodes"]]:
            _nodes.revoke(f"{private}/{name}")
        try:
            _clean_directory(record, client, private)
        except (OSError, LoopdevError) as exc:
            problems.append(f"nodes in {_path(record)}: {exc}")
        try:
            if not _let_go(number, record["diskseq"]):
                return {"left": True, "problems": problems}
        except LoopdevError as exc:
            problems.append(str(exc))
    elif sysfs.is_bound(number):
        # A worker that was killed with the broker may just be letting go of what it had not told.
        return {"left": True, "problems": problems}
    return {"left": not _remove(number), "problems": problems}


def _path(record: Device) -> object:
    return record["directory"][3] if "directory" in record else ""


def _let_go(number: int, diskseq: int | None) -> bool:
    """Detach a device if it is this attachment; False: it is, and goes with its last user."""
    if diskseq is None or not sysfs.is_bound(number) or sysfs.diskseq(number) != diskseq:
        return True
    try:
        device = LoopDevice.open(f"/dev/loop{number}", diskseq)
    except LoopdevError:
        return True  # it has just gone
    persistent = not device.autoclear
    from loopdev.kernel.fds import OwnedFd

    pin = OwnedFd(device.take_pin(), device.path)
    work = Detachment(pin, number, diskseq, persistent, partitioned=True)
    try:
        work.run(_TIMEOUT, keep=True)
    except DeviceBusyError:
        work.run_lazily()
        return False
    finally:
        work.pin.close()
    return True


def _remove(number: int) -> bool:
    """Remove an unbound device that nobody has open; False: it is open, or bound by somebody."""
    if sysfs.is_bound(number):
        return True  # not our attachment: not ours any more
    with LoopControl() as control:
        try:
            control.remove(number)
        except NoSuchDeviceError:
            pass
        except DeviceBusyError:
            return False
    return True


def _clean_directory(record: Device, client: Client, private: str) -> None:
    if "directory" not in record or not record["nodes"]:
        return
    inode, device, directory, path = record["directory"]
    namespace = _namespace(int(str(inode))) if inode else None
    if inode and namespace is None:
        return  # it is gone, and its mounts with it
    try:
        fd = _open_in(namespace, str(path))
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) != (device, directory):
                return  # another directory has the name
            place = _nodes.Place(fd, namespace, client, private)
            for node in record["nodes"]:
                place.find(node)
                place.remove(node)
        finally:
            os.close(fd)
    except FileNotFoundError:
        pass  # the client has removed it
    finally:
        if namespace is not None:
            os.close(namespace)


def _open_in(namespace: int | None, path: str) -> int:
    if namespace is None:
        return _nodes.open_directory(path)
    with _nodes.inside(namespace):
        return _nodes.open_directory(path)


def _namespace(inode: int) -> int | None:
    """Return a descriptor of a mount namespace that some process still is in."""
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            fd = os.open(f"/proc/{name}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        if os.fstat(fd).st_ino == inode:
            return fd
        os.close(fd)
    return None


def remove_private(path: str) -> None:
    """Remove the directory of a broker's nodes, with what is in it.

    Raises:
        OSError: It could not be done; that it is not there is no error.
    """
    try:
        for name in os.listdir(path):
            _nodes.revoke(f"{path}/{name}")
        os.rmdir(path)
    except FileNotFoundError:
        pass
    except NotADirectoryError as exc:
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from exc
