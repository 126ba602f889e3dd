# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""A datastore in a local directory: what is in it."""

from __future__ import annotations

import os
import stat

from loopdev.errors import (
    ImageFormatError,
    ImageNotFoundError,
    InvalidValueError,
    KernelError,
    kernel_error,
)
from loopdev.images.pbs import names
from loopdev.images.pbs.names import Group, Snapshot
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from loopdev.images.pbs.manifest import Manifest

CHUNKS = ".chunks"
_VARIABLE = "PBS_REPOSITORY"
_MANIFEST_MAX = 16 << 20
_PROTECTED = ".protected"
# A file that somebody replaced by a FIFO must not make us wait.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


def local_repository(given: str | None) -> str:
    """Return the directory that a repository is.

    Args:
        given: What the user said; None: PBS_REPOSITORY says it.

    Raises:
        InvalidValueError: There is none, or it is on a server.
    """
    text = given if given is not None else os.environ.get(_VARIABLE)
    if not text:
        reason = f"is missing: say which datastore, by --repository or {_VARIABLE}"
        raise InvalidValueError("repository", None, reason)
    if "/" not in text and not os.path.isdir(text):
        reason = "is no directory; one on a server cannot be used for this"
        raise InvalidValueError("repository", text, reason)
    return os.path.abspath(text)


class Datastore:
    """A datastore.

    Made by :meth:`open`. What is found in it is read anew each time.

    Attributes:
        root: Its directory.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    @classmethod
    def open(cls, repository: str | None = None) -> Datastore:
        """Return the datastore of a repository; None: that of PBS_REPOSITORY.

        Raises:
            ImageNotFoundError: There is none.
            InvalidValueError: It is none, or on a server.
        """
        root = local_repository(repository)
        try:
            os.stat(os.path.join(root, CHUNKS))
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise ImageNotFoundError("datastore", root) from exc
        except OSError as exc:
            raise kernel_error(exc, root, "open") from exc
        return cls(root)

    def namespaces(self, parent: str = "") -> list[str]:
        """Return the namespaces below *parent*, with all below them, each by its whole name."""
        found = []
        for name in sorted(self._directories(f"{names.namespace_path(parent)}/ns")):
            full = f"{parent}/{name}" if parent else name
            if names.is_namespace(full):
                found += [full, *self.namespaces(full)]
        return found

    def groups(self, namespace: str = "") -> list[Group]:
        """Return the groups of a namespace.

        Raises:
            ImageNotFoundError: There is no such namespace.
        """
        path = names.namespace_path(namespace)
        if not os.path.isdir(os.path.join(self.root, path)):
            raise ImageNotFoundError("namespace", namespace)
        return [
            Group(namespace=namespace, type=kind, id=name)
            for kind in names.TYPES
            for name in sorted(self._directories(f"{path}/{kind}"), key=names.as_number)
            if names.is_safe(name)
        ]

    def snapshots(self, group: Group) -> list[Snapshot]:
        """Return the complete snapshots of a group, the oldest first.

        Raises:
            ImageNotFoundError: There is no such group.
        """
        if not os.path.isdir(os.path.join(self.root, group.path)):
            raise ImageNotFoundError("group", _where(group.namespace, str(group)))
        times = map(names.parse_time, self._directories(group.path))
        return [
            snapshot
            for seconds in sorted(seconds for seconds in times if seconds is not None)
            if self._exists(snapshot := group.snapshot(seconds), names.MANIFEST)
        ]

    def latest(self, group: Group) -> Snapshot:
        """Return the newest snapshot of a group.

        Raises:
            ImageNotFoundError: There is none.
        """
        found = self.snapshots(group)
        if not found:
            raise ImageNotFoundError("snapshot", _where(group.namespace, f"{group}/latest"))
        return found[-1]

    def manifest(self, snapshot: Snapshot) -> Manifest:
        """Return the manifest of a snapshot; nothing but its form is checked.

        Raises:
            ImageNotFoundError: There is no such snapshot, or it is not complete.
            ImageFormatError: The manifest is damaged.
        """
        from loopdev.images.pbs.manifest import Manifest

        with self.open_file(snapshot, names.MANIFEST) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MANIFEST_MAX:
                raise ImageFormatError(file.name, 0, f"has more than {_MANIFEST_MAX} bytes")
            buffer = bytearray(size)
            count = read_all(file, memoryview(buffer))
            return Manifest.parse(bytes(buffer[:count]), file.name)

    def is_protected(self, snapshot: Snapshot) -> bool:
        """Return whether a snapshot must not be removed."""
        return self._exists(snapshot, _PROTECTED)

    def open_file(self, snapshot: Snapshot, filename: str) -> OwnedFd:
        """Open a file of a snapshot.

        Raises:
            ImageNotFoundError: There is none.
            KernelError: It cannot be opened (EACCES), or is no regular file (EINVAL).
        """
        path = os.path.join(self.root, snapshot.path, filename)
        try:
            return open_regular(path)
        except FileNotFoundError as exc:
            what = "snapshot" if filename == names.MANIFEST else "archive"
            name = "" if filename == names.MANIFEST else f"/{filename}"
            raise ImageNotFoundError(what, f"{snapshot.full_name}{name}") from exc
        except OSError as exc:
            raise kernel_error(exc, path, "open") from exc

    def open_chunks(self) -> OwnedFd:
        """Open the directory of chunks; see :func:`chunk_path`."""
        path = os.path.join(self.root, CHUNKS)
        try:
            return OwnedFd.open(path, os.O_PATH | os.O_DIRECTORY)
        except OSError as exc:
            raise kernel_error(exc, path, "open") from exc

    def _exists(self, snapshot: Snapshot, filename: str) -> bool:
        return os.path.exists(os.path.join(self.root, snapshot.path, filename))

    def _directories(self, path: str) -> Iterator[str]:
        path = os.path.join(self.root, path.lstrip("/"))
        try:
            with os.scandir(path) as entries:
                yield from (entry.name for entry in entries if entry.is_dir())
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise kernel_error(exc, path, "open") from exc


def chunk_path(digest: bytes) -> str:
    """Return the path of a chunk in the directory of chunks."""
    name = digest.hex()
    return f"{name[:4]}/{name}"


def open_regular(path: str, dir_fd: int | None = None) -> OwnedFd:
    """Open a regular file for reading; errors pass as they are.

    Raises:
        KernelError: It is something else (EINVAL).
    """
    import errno

    file = OwnedFd.open(path, _FLAGS, dir_fd)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise KernelError(errno.EINVAL, path, "open", "is no regular file")
    return file


def read_all(file: OwnedFd, buffer: memoryview) -> int:
    """Fill *buffer* from the start of a file, and return how much there was; errors pass."""
    fd, done = file.fileno(), 0
    while done < len(buffer) and (count := os.preadv(fd, [buffer[done:]], done)):
        done += count
    return done


def _where(namespace: str, name: str) -> str:
    return f"ns/{namespace}/{name}" if namespace else name
