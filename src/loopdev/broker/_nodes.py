# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Device nodes in a client's directory, which may be in another mount and user namespace.

A node made by mknod(2) on a filesystem that a user namespace mounted cannot be opened, and one
anywhere could be kept: hard-linked, or reopened through an O_PATH descriptor, when its number is
another client's device. So what the client sees is a bind mount of a node in a directory of ours
(/dev/.loopdev-*, closed to all but root). At the end of the lease that node gets mode 0 and owner
root, whatever the client has kept of it, and is gone. The host's own /dev/loopN stays root's.

Where a bind mount cannot be had (a directory of a third mount namespace) the node is made by mknod,
and the broker holds it by an O_PATH descriptor, to take it away wherever the client has moved it.

Every change in the client's directory is made with the client's user and groups as the filesystem
sees them: what the client may not do there is refused by the kernel itself. In the client's mount
namespace nothing is done but two system calls; no path is looked up from its root.
"""

from __future__ import annotations

import errno
import os
import stat

from loopdev.errors import RefusedError, kernel_error
from loopdev.kernel import namespaces, sysfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from loopdev.broker._jobs import Client, Node

# How many mounts of its own a client may have piled on a node of ours before we give up.
_PILE = 16
# The last: written down before it was made, and it is not known how far that came.
BIND, MKNOD, FOUND, PLANNED = "bind", "mknod", "found", "planned"


class Place:
    """A client's directory.

    Args:
        fd: The directory, borrowed.
        namespace: The client's mount namespace, borrowed; None: it is ours, or not known.
        client: Whose rights count.
        private: The directory of our nodes.
    """

    def __init__(self, fd: int, namespace: int | None, client: Client, private: str) -> None:
        self.fd, self.namespace, self._client, self._private = fd, namespace, client, private
        # By node: descriptors of what was made by mknod, for the broker to keep.
        self.held: dict[str, int] = {}
        # There is one made by mknod that could not be closed to its owner.
        self.unrevoked = False

    def take_held(self) -> list[int]:
        """Return what is held, which is the caller's then."""
        held, self.held = [*self.held.values()], {}
        return held

    def let_go(self) -> None:
        """Close what is held."""
        for fd in self.take_held():
            os.close(fd)

    def offer(self, name: str, rdev: int, owner: tuple[int, int], mode: int) -> Node:
        """Make one node, and return what remove() needs.

        Raises:
            KernelError: The client may not write to its directory, or something is in the way.
            RefusedError: The filesystem takes no devices.
        """
        if _rdev_of(self.fd, name) == rdev:
            return {"name": name, "rdev": rdev, "how": FOUND, "inode": 0}
        path = f"{self._private}/{name}"
        make_private(path, rdev, owner, mode)
        try:
            mount = namespaces.clone_mount(path)
            try:
                return self._bind(name, rdev, mount)
            finally:
                os.close(mount)
        except BaseException:
            revoke(path)
            raise

    def _bind(self, name: str, rdev: int, mount: int) -> Node:
        with _as(self._client):
            target = self._placeholder(name)
        try:
            try:
                self._mount(mount, target)
            except OSError:
                with _as(self._client):
                    os.unlink(name, dir_fd=self.fd)
                return self._mknod(name, rdev)
            return {"name": name, "rdev": rdev, "how": BIND, "inode": os.fstat(target).st_ino}
        finally:
            os.close(target)

    def _placeholder(self, name: str) -> int:
        """Make the empty file that is mounted over; one that an earlier broker left is removed.

        With the client's rights: to have it there, and to mount over it, is the same to others.
        """
        flags = os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            try:
                return os.open(name, flags, 0o600, dir_fd=self.fd)
            except FileExistsError:
                found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
                if not stat.S_ISREG(found.st_mode) or found.st_size:
                    raise
                os.unlink(name, dir_fd=self.fd)
                return os.open(name, flags, 0o600, dir_fd=self.fd)
        except OSError as exc:
            raise kernel_error(exc, name, "creat") from exc

    def _mount(self, mount: int, target: int) -> None:
        if self.namespace is None:
            namespaces.move_mount(mount, target)
            return
        with inside(self.namespace):
            namespaces.move_mount(mount, target)

    def _mknod(self, name: str, rdev: int) -> Node:
        # Closed to everybody until it is held by us.
        try:
            os.mknod(name, stat.S_IFBLK, rdev, dir_fd=self.fd)
        except OSError as exc:
            raise kernel_error(exc, name, "mknod") from exc
        try:
            held = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
            self.held[name] = held
            found = os.fstat(held)
            if found.st_rdev != rdev or not stat.S_ISBLK(found.st_mode):
                reason = f"{name} was replaced while it was made"
                raise RefusedError(errno.EPERM, reason)
            source = os.stat(f"{self._private}/{name}")
            by_fd = f"/proc/self/fd/{held}"
            _check_opens(by_fd, name)
            os.chown(by_fd, source.st_uid, source.st_gid)
            os.chmod(by_fd, stat.S_IMODE(source.st_mode))
        except BaseException:
            if name in self.held:
                revoke_held(self.held.pop(name))
            with _as(self._client):
                os.unlink(name, dir_fd=self.fd)
            raise
        revoke(f"{self._private}/{name}")
        return {"name": name, "rdev": rdev, "how": MKNOD, "inode": found.st_ino}

    def suspend(self, nodes: list[Node]) -> None:
        """Make nodes open nothing. Before partitions go: their numbers are given away at once."""
        for node in nodes:
            self._change(node, (0, 0), 0)

    def resume(self, nodes: list[Node], owner: tuple[int, int], mode: int) -> None:
        """Undo suspend()."""
        for node in nodes:
            self._change(node, owner, mode)

    def _change(self, node: Node, owner: tuple[int, int], mode: int) -> None:
        if node["how"] == FOUND:
            return
        path = f"{self._private}/{node['name']}"
        if node["how"] == MKNOD:
            path = f"/proc/self/fd/{self.held[node['name']]}"
        try:
            # In this order: an owner may change the mode.
            os.chown(path, *owner)
            os.chmod(path, mode)
        except FileNotFoundError:
            pass  # revoked before, by a worker that did not come to its end

    def remove(self, node: Node) -> None:
        """Take one node away; what the client has done to it meanwhile is no error.

        Raises:
            OSError: Its name could not be removed. It opens nothing any more.
        """
        name = node["name"]
        if node["how"] == FOUND:
            return
        if node["how"] == PLANNED:
            self._remove_planned(name, node["rdev"])
            return
        # First of all, and however the rest goes.
        if node["how"] == MKNOD:
            self._revoke(name)
        else:
            revoke(f"{self._private}/{name}")
            self._unmount(name, node["rdev"])
        try:
            found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if found.st_ino == node["inode"]:
            with _as(self._client):
                os.unlink(name, dir_fd=self.fd)

    def _revoke(self, name: str) -> None:
        held = self.held.pop(name, None)
        if held is None:
            return
        try:
            revoke_held(held)
        except OSError:
            self.unrevoked = True  # EROFS, for one
            raise

    def _remove_planned(self, name: str, rdev: int) -> None:
        """Take away whatever there is of a node."""
        revoke(f"{self._private}/{name}")
        try:
            found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            if found.st_dev != os.fstat(self.fd).st_dev:
                self._unmount(name, rdev)
                found = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISBLK(found.st_mode) and found.st_rdev == rdev:
            self.find({"name": name, "rdev": rdev, "how": MKNOD, "inode": found.st_ino})
            self._revoke(name)
        elif not stat.S_ISREG(found.st_mode) or found.st_size:
            return
        with _as(self._client):
            os.unlink(name, dir_fd=self.fd)

    def find(self, node: Node) -> None:
        """Hold a node again that an earlier broker made by mknod."""
        if node["how"] != MKNOD:
            return
        try:
            held = os.open(node["name"], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return
        found = os.fstat(held)
        if stat.S_ISBLK(found.st_mode) and found.st_ino == node["inode"]:
            self.held[node["name"]] = held
        else:
            os.close(held)

    def _unmount(self, name: str, rdev: int) -> None:
        raw = os.fsencode(name)
        for _ in range(_PILE):
            if _rdev_of(self.fd, name) != rdev:
                return
            if self.namespace is None:
                with _working_in(self.fd):
                    namespaces.unmount(raw)
            else:
                with inside(self.namespace):
                    os.fchdir(self.fd)
                    namespaces.unmount(raw)


def open_directory(path: str) -> int:
    """Open a directory without doing anything to it; only system calls, for use inside()."""
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _check_opens(path: str, name: str) -> None:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError as exc:
        reason = f"{name} could not be opened there: the filesystem takes no devices (nodev)"
        raise RefusedError(errno.EPERM, reason) from exc


def _rdev_of(directory: int, name: str) -> int | None:
    """Return the device number of a block device node, None for anything else."""
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return None
    return found.st_rdev if stat.S_ISBLK(found.st_mode) else None


def make_private(path: str, rdev: int, owner: tuple[int, int], mode: int) -> None:
    """Make a node of ours that its owner could open, if it could reach it."""
    if os.path.lexists(path):
        revoke(path)  # left by a worker that was killed
    # mknod() masks the mode, and the owner must not have it before it is right.
    os.mknod(path, stat.S_IFBLK, rdev)
    os.chown(path, *owner)
    os.chmod(path, mode)


def reopenable(private: str, number: int) -> str:
    """Return the path of the node by which a client's descriptor was opened."""
    return f"{private}/loop{number}.fd"


def revoke(path: str) -> None:
    """Make a node of ours one that nobody can open, under whatever name it is held, and remove it.

    A node that is not there is no error.
    """
    try:
        os.chown(path, 0, 0, follow_symlinks=False)
        os.chmod(path, 0)
        os.unlink(path)
    except FileNotFoundError:
        pass


def revoke_held(fd: int) -> None:
    """Do the same to a node in a client's directory, by the descriptor; which is closed."""
    try:
        os.chown(f"/proc/self/fd/{fd}", 0, 0)
        os.chmod(f"/proc/self/fd/{fd}", 0)
    finally:
        os.close(fd)


def nodes_of(number: int) -> Iterator[tuple[str, int]]:
    """Yield name and device number of a loop device and of its partitions."""
    whole = sysfs.rdev(number)
    if whole is not None:
        yield f"loop{number}", whole
    for part in sysfs.partitions(number):
        yield f"loop{number}p{part.number}", part.rdev


def namespace_of(pid: int) -> int | None:
    """Return a descriptor of a process's mount namespace, None if it is ours or cannot be had."""
    if pid <= 0:
        return None
    try:
        fd = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(fd).st_ino == os.stat("/proc/self/ns/mnt").st_ino:
        os.close(fd)
        return None
    return fd


class _as:  # noqa: N801 - reads as a statement
    """Make file accesses with the client's rights; root's are those of its capabilities."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __enter__(self) -> None:
        self._groups = os.getgroups()
        uid, gid, groups = self._client["uid"], self._client["gid"], self._client["groups"]
        try:
            if not self._client["overrides"]:
                namespaces.override_files(allowed=False)
            namespaces.set_filesystem_ids(uid, gid, groups)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        namespaces.set_filesystem_ids(os.geteuid(), os.getegid(), self._groups)
        namespaces.override_files(allowed=True)


class _working_in:  # noqa: N801 - reads as a statement
    """Make a directory the working directory."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        self._back = os.open(".", os.O_PATH | os.O_CLOEXEC)
        os.fchdir(self._fd)

    def __exit__(self, *_: object) -> None:
        os.fchdir(self._back)
        os.close(self._back)


class inside:  # noqa: N801 - reads as a statement
    """Be in another mount namespace.

    Its files are its owner's: no import, and nothing else that opens a path, may happen within.
    """

    def __init__(self, namespace: int) -> None:
        self._namespace = namespace

    def __enter__(self) -> None:
        flags = os.O_RDONLY | os.O_CLOEXEC
        self._own = os.open("/proc/self/ns/mnt", flags)
        self._root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        namespaces.enter_mount_namespace(self._namespace)

    def __exit__(self, *_: object) -> None:
        namespaces.enter_mount_namespace(self._own)
        # Ours may have been another root than the namespace's.
        os.fchdir(self._root)
        os.chroot(".")
        os.close(self._own)
        os.close(self._root)
