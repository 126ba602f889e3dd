# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""What is mapped: one directory for each map, below /run/loopdev/maps.

    NAME/image        the FUSE file is mounted here
    NAME/lock         locked, by flock, as long as any process of the map lives
    NAME/supervisor   locked as long as the supervisor lives
    NAME/state.json   what the map is; there once its device is
    NAME/counters     see _counters
    NAME/failed       why it serves no more, if it does not

Whether a map lives is asked of its lock, never of a process number.
"""

from __future__ import annotations

import errno
import fcntl
import os

from loopdev._value import Value
from loopdev.errors import (
    ImageFormatError,
    InvalidValueError,
    KernelError,
    NameTakenError,
    NotPermittedError,
    kernel_error,
)
from loopdev.kernel import mounts, sysfs
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = "/run/loopdev/maps"
_NAME_MAX = 64
# Directories of maps that are being made.
BEGUN = ".new-"


class State(Value):
    """What a map is, as its directory has it.

    Attributes:
        name: Its name.
        source: What is mapped, for people; no secrets.
        identity: The same for the same image.
        device: "/dev/loop3".
        number: 3.
        diskseq: That of the attachment; None before Linux 5.15.
        size: Of the device, in bytes.
        connection: The FUSE connection's number.
        supervisor: The process that looks after the workers.
        workers: How many there are.
        started: Seconds since 1970.
    """

    name: str
    source: str
    identity: str
    device: str
    number: int
    diskseq: int | None
    size: int
    connection: int
    supervisor: int
    workers: int
    started: int


def check_name(name: str) -> str:
    """Return a map's name if it can be one.

    Raises:
        InvalidValueError: It cannot.
    """
    ok = name.isascii() and all(c.isalnum() or c in "._-" for c in name)
    if not ok or not 1 <= len(name) <= _NAME_MAX or name[0] in ".-" or name.isdecimal():
        reason = f"must be 1 to {_NAME_MAX} of A-Z a-z 0-9 . _ - (first no . or -, no number)"
        raise InvalidValueError("name", name, reason)
    return name


class Entry:
    """The directory of one map, whether it lives or not."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = f"{ROOT}/{name}"
        self.image = f"{self.path}/image"
        self.counters = f"{self.path}/counters"

    @classmethod
    def create(cls, name: str) -> tuple[Entry, OwnedFd]:
        """Make the directory and what is mounted on; and return its lock, which is held.

        Raises:
            NameTakenError: There is one.
            KernelError: ENOSPC, EACCES and their like.
        """
        entry, begun = cls(name), cls(f"{BEGUN}{name}-{os.getpid()}-{os.urandom(4).hex()}")
        root, lock = _root_held(), None
        try:
            os.mkdir(begun.path, 0o700)
        except OSError as exc:
            root.close()
            raise kernel_error(exc, entry.path, "mkdir") from exc
        try:
            # Under its own name it is locked from the first moment on, so nobody takes it for dead.
            lock = begun.lock()
            os.close(os.open(begun.image, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            os.rename(begun.path, entry.path)
        except BaseException as exc:
            begun.discard()
            if lock is not None:
                lock.close()
            if isinstance(exc, KernelError) or not isinstance(exc, OSError):
                raise
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise NameTakenError(name) from exc
            raise kernel_error(exc, entry.path, "rename") from exc
        finally:
            root.close()
        lock.name = f"{entry.path}/lock"
        return entry, lock

    def lock(self, which: str = "lock") -> OwnedFd:
        """Return a lock that is held as long as any copy of the descriptor is open.

        It waits for those who just look whether it is held.

        Raises:
            KernelError: ENOSPC and its like.
        """
        path = f"{self.path}/{which}"
        try:
            fd = OwnedFd(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), path)
            try:
                fcntl.flock(fd.fileno(), fcntl.LOCK_EX)
            except BaseException:
                fd.close()
                raise
        except OSError as exc:
            raise kernel_error(exc, path, "flock") from exc
        return fd

    def is_locked(self, which: str = "lock") -> bool:
        """Return whether a process of this map lives ("supervisor": whether that does).

        Raises:
            NotPermittedError: It takes root to know.
            KernelError: EMFILE and its like: a map that cannot be looked at is not dead.
        """
        path = f"{self.path}/{which}"
        try:
            with OwnedFd.open(path, os.O_RDONLY) as fd:
                # Shared: who asks at the same time is not taken for the map.
                fcntl.flock(fd.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as exc:
            raise kernel_error(exc, path, "open") from exc
        return False

    @property
    def exists(self) -> bool:
        """Whether the directory is there.

        Raises:
            NotPermittedError: It takes root to know.
        """
        try:
            os.stat(f"{self.path}/")
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as exc:
            raise _refused(exc, "stat") from exc
        return True

    def state(self) -> State | None:
        """Return what the map is; None while it begins, or when its record is damaged."""
        from loopdev._json import parse_object

        data = sysfs.read(f"{self.path}/state.json")
        if data is None:
            return None
        try:
            return State(**{"diskseq": None, **parse_object(data)})
        except (ImageFormatError, TypeError):
            return None

    def write_state(self, state: State) -> None:
        """Record what the map is.

        Raises:
            KernelError: ENOSPC and its like.
        """
        from loopdev._json import canonical

        path = f"{self.path}/state.json"
        fields = {key: value for key, value in state.as_dict().items() if value is not None}
        try:
            fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with OwnedFd(fd, path) as file:
                os.write(file.fileno(), canonical(fields).encode())
            os.rename(f"{path}.new", path)
        except OSError as exc:
            raise kernel_error(exc, path, "write") from exc

    def failure(self) -> str | None:
        """Return why the map serves no more, if so."""
        text = sysfs.read(f"{self.path}/failed")
        return None if text is None else text.decode(errors="replace").strip()

    def fail(self, reason: str) -> None:
        """Record why the map serves no more."""
        try:
            with OwnedFd(
                os.open(f"{self.path}/failed", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), ""
            ) as file:
                os.write(file.fileno(), reason.encode())
        except OSError:
            pass  # the log has it

    def devices(self) -> list[int]:
        """Return the loop devices that are bound to this map's file."""
        found = [number for number in sysfs.numbers() if sysfs.backing_file(number) == self.image]
        state = self.state() if not found else None
        # Once the mount was taken away by force, the kernel calls the file "/".
        if state is not None and state.diskseq is not None:
            seen = sysfs.backing_file(state.number), sysfs.diskseq(state.number)
            if seen == ("/", state.diskseq):
                found.append(state.number)
        return found

    def is_mounted(self) -> bool:
        """Return whether the FUSE file is mounted."""
        found = mounts.mounted(self.image)
        return found is not None and found.fstype == "fuse.loopdev"

    def discard(self) -> None:
        """Remove the directory; what is not ours in it stays."""
        try:
            directory = OwnedFd.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return  # somebody else was quicker
        with directory:
            discard(directory.fileno(), self.path)


def discard(directory: int, path: str) -> None:
    """Remove a map's directory; what is not ours in it stays.

    Args:
        directory: A descriptor of it: by its name, one could meet its successor, as soon as it is
            empty.
        path: Its name.
    """
    names = ("image", "state.json", "state.json.new", "counters", "failed", "supervisor")
    # The lock is the last: without it, nobody would know that this map does not live.
    for name in (*names, "lock"):
        try:
            os.unlink(name, dir_fd=directory)
        except OSError:
            pass
    try:
        os.rmdir(path)  # not if it is a successor: there is something in that
    except OSError:
        pass


def entries() -> Iterator[Entry]:
    """Iterate over all maps, living or not, by name.

    Raises:
        NotPermittedError: It takes root to see them.
    """
    for name in _names():
        if not name.startswith("."):
            yield Entry(name)


def discard_begun() -> list[str]:
    """Remove the directories of maps whose maker died before they had a name; return their names.

    None is removed while another one is being made: the next time will do.
    """
    names = [name for name in _names() if name.startswith(BEGUN)]
    if not names:
        return []
    with OwnedFd.open(ROOT, os.O_RDONLY | os.O_DIRECTORY) as root:
        try:
            fcntl.flock(root.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return []
        for name in names:
            Entry(name).discard()
    return [name for name in names if not Entry(name).exists]


def _root_held() -> OwnedFd:
    """Return the directory of all maps, held so that none in it is taken for forsaken.

    Raises:
        NotPermittedError: It takes root.
    """
    try:
        os.makedirs(ROOT, 0o700, exist_ok=True)
        root = OwnedFd.open(ROOT, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise _refused(exc, "mkdir") from exc
    fcntl.flock(root.fileno(), fcntl.LOCK_SH)
    return root


def _names() -> list[str]:
    try:
        return sorted(os.listdir(ROOT))
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise _refused(exc, "open") from exc


def _refused(exc: OSError, request: str) -> KernelError:
    if exc.errno not in (errno.EACCES, errno.EPERM):
        return kernel_error(exc, ROOT, request)
    reason = "it takes root to map, and to see what is mapped"
    return NotPermittedError(exc.errno, ROOT, request, reason)


def entry_of(backing_file: str | None) -> Entry | None:
    """Return the map whose file this is."""
    if backing_file is None or not backing_file.startswith(ROOT + "/"):
        return None
    name, _, rest = backing_file[len(ROOT) + 1 :].partition("/")
    return Entry(name) if rest == "image" else None
