# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Who uses a block device: mounts in any namespace, processes, swap, and devices on top of it."""

from __future__ import annotations

import os
import stat

from loopdev._value import Value
from loopdev._within import each_within
from loopdev.kernel import sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

# Seconds for one stat() of what a process has open.
_STAT_TIMEOUT = 1.0


class Holder(Value):
    """One user of a device.

    Attributes:
        kind: "mount", "process", "swap", "device" (on top of it: dm, md, a loop device).
        name: The mount point, the process's name, or the device.
        device: What is held: the loop device or one of its partitions ("loop3p1").
        pid: The process; for a mount outside this namespace, one that sees it; else None.
    """

    kind: str
    name: str
    device: str
    pid: int | None = None

    def __str__(self) -> str:
        if self.kind == "process":
            text = f"{self.name} (pid {self.pid})"
        elif self.kind == "mount" and self.pid is not None:
            text = f"mount on {self.name} (namespace of pid {self.pid})"
        else:
            text = f"{self.kind} {'on ' if self.kind == 'mount' else ''}{self.name}"
        return text.encode("unicode_escape").decode() if not text.isprintable() else text


def holders_of(
    number: int, processes: bool = True, ours: Collection[int] = ()
) -> tuple[Holder, ...]:
    """Return who uses loop device *number* or a partition of it.

    Args:
        number: The device.
        processes: Look at what processes have open, and at other mount namespaces: tens of
            milliseconds. What belongs to processes of others is seen by root alone.
        ours: Descriptors of this process that do not count.
    """
    devices = _devices(number)
    found = [*_on_top(number, devices), *_swaps(devices)]
    found += _mounts("self", None, devices)
    if processes:
        found += _foreign_mounts(devices)
        found += _processes(devices, ours)
    return tuple(dict.fromkeys(found))


def _devices(number: int) -> dict[int, str]:
    """Return the device numbers of a loop device and its partitions, with their names."""
    whole = sysfs.rdev(number)
    devices = {} if whole is None else {whole: f"loop{number}"}
    for node in sysfs.partitions(number):
        devices[node.rdev] = f"loop{number}p{node.number}"
    return devices


def _on_top(number: int, devices: dict[int, str]) -> Iterator[Holder]:
    base = f"{sysfs.BLOCK}/loop{number}"
    for name in devices.values():
        place = base if name == f"loop{number}" else f"{base}/{name}"
        for holder in _list(f"{place}/holders"):
            yield Holder(kind="device", name=holder, device=name)
    names = {f"/dev/{name}": name for name in devices.values()}
    for other in sysfs.numbers():
        backing = sysfs.backing_file(other)
        if backing in names:
            yield Holder(kind="device", name=f"loop{other}", device=names[backing])


def _swaps(devices: dict[int, str]) -> Iterator[Holder]:
    for line in _lines("/proc/swaps")[1:]:
        path = _unescape(line.split()[0])
        device = devices.get(_rdev(path))
        if device is not None:
            yield Holder(kind="swap", name=path, device=device)


def _mounts(process: str, pid: int | None, devices: dict[int, str]) -> Iterator[Holder]:
    names = {f"/dev/{name}": name for name in devices.values()}
    for line in _lines(f"/proc/{process}/mountinfo"):
        fields = line.split()
        major, _, minor = fields[2].partition(":")
        source = _unescape(fields[fields.index("-") + 2])
        # btrfs and overlayfs show a device number of their own: go by the source's name there.
        device = devices.get(os.makedev(int(major), int(minor))) or names.get(source)
        if device is not None:
            yield Holder(kind="mount", name=_unescape(fields[4]), device=device, pid=pid)


def _foreign_mounts(devices: dict[int, str]) -> Iterator[Holder]:
    """Yield the mounts of every other mount namespace, each looked at once."""
    seen = {_link("/proc/self/ns/mnt")}
    for pid in _pids():
        namespace = _link(f"/proc/{pid}/ns/mnt")
        if namespace is not None and namespace not in seen:
            seen.add(namespace)
            yield from _mounts(str(pid), pid, devices)


def _processes(devices: dict[int, str], ours: Collection[int]) -> Iterator[Holder]:
    me = os.getpid()
    open_files = [
        (pid, f"/proc/{pid}/fd/{fd}")
        for pid in _pids()
        for fd in _list(f"/proc/{pid}/fd")
        if pid != me or int(fd) not in ours
        # Only what has a path can be a device node. Its name does not tell: nodes may be anywhere.
        if (_link(f"/proc/{pid}/fd/{fd}") or "").startswith("/")
    ]
    # The file of another process may be on a filesystem that is dead.
    numbers = each_within(lambda item: _rdev(item[1]), open_files, _STAT_TIMEOUT, _mount_of)
    for (pid, _), rdev in zip(open_files, numbers, strict=True):
        device = devices.get(rdev if rdev is not None else 0)
        if device is not None:
            name = (sysfs.read(f"/proc/{pid}/comm") or b"?").decode(errors="replace")
            yield Holder(kind="process", name=name, device=device, pid=pid)


def _rdev(path: str) -> int:
    """Return the device number of a block device node, 0 for anything else."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_rdev if stat.S_ISBLK(status.st_mode) else 0


def _mount_of(open_file: tuple[int, str]) -> str:
    """Return the number of the mount that an open file is on, from "mnt_id:" in its fdinfo."""
    pid, path = open_file
    lines = _lines(f"/proc/{pid}/fdinfo/{os.path.basename(path)}")
    return next((line for line in lines if line.startswith("mnt_id:")), path)


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def _list(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []  # the process or device is gone, or not ours to look at


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _lines(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read()).split("\n")[:-1]
    except OSError:
        return []


def _unescape(text: str) -> str:
    r"""Undo the \040 of /proc/mounts and its kin."""
    for code in (" ", "\t", "\n", "#"):
        text = text.replace(f"\\{ord(code):03o}", code)
    return text.replace("\\134", "\\")
