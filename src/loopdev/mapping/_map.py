# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Mapping an image: everything that can go wrong does so here, in the caller's process."""

from __future__ import annotations

import errno
import os
import time

from loopdev.errors import (
    BackingFileError,
    ImageReadError,
    InvalidValueError,
    KernelError,
    NameTakenError,
    NotMappedError,
    kernel_error,
)
from loopdev.fuse.session import Session
from loopdev.images import resolve
from loopdev.kernel import mounts
from loopdev.kernel.fds import OwnedFd
from loopdev.mapping._cache import Cache
from loopdev.mapping._counters import Counters
from loopdev.mapping._log import open_log
from loopdev.mapping._plan import Plan
from loopdev.mapping._registry import Entry, State, check_name
from loopdev.mapping._supervisor import start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self, TypeVar

    from loopdev._device import LoopDevice
    from loopdev.images import Image, Source
    from loopdev.mapping._log import Log

    _Kept = TypeVar("_Kept", Session, Cache, Counters, Log, OwnedFd)

CACHE_LIMIT = 256 << 20
IO_TIMEOUT = 60.0
LOG_DIRECTORY = "/var/log/loopdev"
_SECTOR = 512
_LARGEST_PAD = 65536
_THREADS = 16
_MOST_WORKERS = 64
_NAME_MAX = 64


class Mapping:
    """An image as a loop device. Closing it unmaps, unless it is to stay (``persist``).

    Attributes:
        name: Its name, for ``loopdev maps`` and ``loopdev unmap``.
        device: The loop device; open, so that it stays this one.
        created: Whether it is new; with ``once`` it may have been there before.
    """

    def __init__(
        self, entry: Entry, device: LoopDevice, owner: OwnedFd | None, created: bool
    ) -> None:
        self._entry, self._owner = entry, owner
        self.name, self.device, self.created = entry.name, device, created

    def unmap(self, *, timeout: float = 10.0, lazy: bool = False, force: bool = False) -> None:
        """Detach the device and end all that served it.

        Args:
            timeout: How long to wait for users of the device to leave, in seconds.
            lazy: If it is in use, let it go when its last user leaves.
            force: Fail all its reads instead of asking its users to leave.

        Raises:
            DeviceBusyError: It is in use, and stays mapped. With its holders.
            NotMappedError: It was unmapped by somebody else.
        """
        from loopdev._device import LoopDevice
        from loopdev.mapping._end import end

        path, diskseq = self.device.path, self.device.diskseq
        self.device.close()
        try:
            end(self._entry, timeout=timeout, lazy=lazy, force=force)
        except NotMappedError:
            self.close()
            raise
        except BaseException:
            try:
                self.device = LoopDevice.open(path, diskseq)
            except OSError:
                pass  # it is somebody else's by now
            raise
        self.close()

    def wait(self) -> None:
        """Wait until the map has ended, whoever ends it."""
        import fcntl

        try:
            lock = os.open(f"{self._entry.path}/lock", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        with OwnedFd(lock, "lock") as fd:
            fcntl.flock(fd.fileno(), fcntl.LOCK_SH)

    def close(self) -> None:
        """Let go of the device. A map that was not to stay ends when this process does."""
        self.device.close()
        if self._owner is not None:
            self._owner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._owner is None or self._owner.closed:
            self.close()
            return
        try:
            self.unmap()
        except NotMappedError:
            pass  # somebody else unmapped it: so be it
        except BaseException:
            # Nobody keeps it any more: it goes with its last user. What went wrong here must not
            # hide what went wrong in the block.
            self.close()
            if exc is None:
                raise

    def __repr__(self) -> str:
        return f"<Mapping {self.name} on {self.device.path}>"


def map_image(
    source: str | os.PathLike[str],
    *,
    repository: str | None = None,
    namespace: str | None = None,
    keyfile: str | None = None,
    fingerprint: str | None = None,
    name: str | None = None,
    partscan: bool = False,
    sector_size: int | None = None,
    workers: int | None = None,
    cache_limit: int = CACHE_LIMIT,
    io_timeout: float = IO_TIMEOUT,
    log: str | None = None,
    persist: bool = False,
    once: bool = False,
) -> Mapping:
    """Make an image that is no local raw file a read-only loop device.

    Processes in the background serve it. They end with this one, unless *persist* is set, and the
    device with them.

    Args:
        source: What :func:`loopdev.open_image` takes.
        repository: The datastore that has it.
        namespace: Where in the datastore.
        keyfile: What it is encrypted with.
        fingerprint: That of the server's certificate; see :func:`loopdev.images.resolve`.
        name: The map's name; None: one that is made of the source's.
        partscan: Make a node for each partition.
        sector_size: Of the device, in bytes; None: 512, or that of the image's GPT. An image that
            is no multiple of it is padded with zeros.
        workers: How many processes serve it; None: one for each core.
        cache_limit: How much memory decoded blocks may take, in bytes.
        io_timeout: How long one read may take, in seconds; then it fails (EIO).
        log: Where the processes complain: "journal", "stderr" or a file; None: the journal where
            there is one, else a file below /var/log/loopdev.
        persist: Let the map outlive this process.
        once: If the image is mapped already, return that map; all else is as it was made then.

    Raises:
        ImageNotFoundError: There is no such image.
        EncryptionKeyError: Its key is missing, damaged or wrong.
        ImageFormatError: It is damaged.
        ServerError: The server cannot be reached, or refuses.
        NameTakenError: There is a map of this name.
        NoSuchDeviceError: There is no /dev/fuse.
        NotPermittedError: It needs root's rights.
    """
    workers = _check(name, workers, cache_limit, io_timeout)
    found = resolve(
        source,
        repository=repository,
        namespace=namespace,
        keyfile=keyfile,
        fingerprint=fingerprint,
    )
    try:
        if once:
            from loopdev.mapping._maps import find_same, only_one

            with only_one():
                same = find_same(found.identity)
                if same is not None:
                    return same
                made = _Making(found, workers, cache_limit, io_timeout, log)
                return made.run(name, partscan, sector_size, persist)
        made = _Making(found, workers, cache_limit, io_timeout, log)
        return made.run(name, partscan, sector_size, persist)
    finally:
        found.close()


def _check(name: str | None, workers: int | None, cache_limit: int, io_timeout: float) -> int:
    if name is not None:
        check_name(name)
    if workers is None:
        workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    if not 1 <= workers <= _MOST_WORKERS:
        raise InvalidValueError("workers", workers, f"must be 1 to {_MOST_WORKERS}")
    if cache_limit < 0:
        raise InvalidValueError("cache_limit", cache_limit, "must not be negative")
    if not 0 < io_timeout <= 86400:
        raise InvalidValueError("io_timeout", io_timeout, "must be above 0, and a day at most")
    return workers


class _Making:
    """One map while it is made; what was begun is undone when something fails."""

    def __init__(
        self, source: Source, workers: int, cache_limit: int, io_timeout: float, log: str | None
    ) -> None:
        self._source, self._workers, self._limit = source, workers, cache_limit
        self._timeout, self._log = io_timeout, log
        self._open: list[Session | Cache | Counters | Log | OwnedFd] = []

    def run(
        self, name: str | None, partscan: bool, sector_size: int | None, persist: bool
    ) -> Mapping:
        entry, lock = _create(name, self._source.name)
        self._open.append(lock)
        owner = device = None
        try:
            plan, owner = self._prepare(entry, lock, sector_size)
            supervisor = start(plan)
            self._close()
            device = _attach(entry.image, partscan, sector_size)
            _tell(owner, f"{device.number}:{device.diskseq or ''}\n")
            entry.write_state(self._state(entry, device, supervisor))
            if persist:
                _tell(owner, "stay\n")
                owner.close()
        except BaseException as exc:
            reason = entry.failure()
            if device is not None:
                device.close()
            self._undo(entry, owner)
            if reason is not None and isinstance(exc, OSError):
                raise KernelError(errno.EIO, self._source.description, "map", reason) from exc
            raise
        return Mapping(entry, device, owner if not persist else None, created=True)

    def _prepare(
        self, entry: Entry, lock: OwnedFd, sector_size: int | None
    ) -> tuple[Plan, OwnedFd]:
        image = self._source.open()
        try:
            sector = sector_size or _sector_size(image)
            size = -(-image.size // sector) * sector
            cache = self._cache(image)
        finally:
            image.close()
        log = self._keep(open_log(self._log, entry.name, f"{LOG_DIRECTORY}/{entry.name}.log"))
        counters = self._keep(Counters.create(entry.counters, self._workers))
        session = self._keep(Session.mount(entry.image, self._source.description))
        for _ in range(self._workers):
            session.clone()
        reading, writing = os.pipe()
        plan = Plan(
            entry=entry,
            lock=lock,
            supervising=self._keep(entry.lock("supervisor")),
            source=self._source,
            session=session,
            cache=cache,
            counters=counters,
            log=log,
            size=size,
            workers=self._workers,
            threads=_THREADS,
            timeout=self._timeout,
            owner=self._keep(OwnedFd(reading, "owner")),
        )
        return plan, OwnedFd(writing, "owner")

    def _cache(self, image: Image) -> Cache | None:
        if not image.cached:
            return None
        return self._keep(Cache.create(image.size, image.block_size, self._limit, self._workers))

    def _keep(self, what: _Kept) -> _Kept:
        self._open.append(what)
        return what

    def _state(self, entry: Entry, device: LoopDevice, supervisor: int) -> State:
        mount = mounts.mounted(entry.image)
        return State(
            name=entry.name,
            source=self._source.description,
            identity=self._source.identity,
            device=device.path,
            number=device.number,
            diskseq=device.diskseq,
            size=device.size,
            connection=os.minor(mount.device) if mount is not None else 0,
            supervisor=supervisor,
            workers=self._workers,
            started=int(time.time()),
        )

    def _close(self) -> None:
        """Close what the map's processes have by now."""
        while self._open:
            self._open.pop().close()

    def _undo(self, entry: Entry, owner: OwnedFd | None) -> None:
        from loopdev.mapping._end import end

        self._close()
        if owner is not None:
            owner.close()
        try:
            end(entry, force=True)
        except Exception:  # noqa: BLE001, S110 - what went wrong first is what is told
            pass


def _create(name: str | None, default: str) -> tuple[Entry, OwnedFd]:
    """Make a map's directory; a dead map of this name makes way."""
    if name is not None:
        try:
            return Entry.create(name)
        except NameTakenError:
            from loopdev.mapping._maps import collect

            if not collect(Entry(name)):
                raise
            return Entry.create(name)
    if default.isdecimal():
        default = f"image-{default}"[:_NAME_MAX]  # else it would be a device's number
    for number in range(1, 10000):
        suffix = f"-{number}" if number > 1 else ""
        try:
            return Entry.create(default[: _NAME_MAX - len(suffix)] + suffix)
        except NameTakenError:
            continue
    raise NameTakenError(default)


def _tell(owner: OwnedFd, what: str) -> None:
    try:
        os.write(owner.fileno(), what.encode())
    except OSError as exc:
        raise kernel_error(exc, "the supervisor", "write") from exc  # EPIPE: it is dead


def _sector_size(image: Image) -> int:
    """Return which sectors an image has to be padded to."""
    if image.size % _LARGEST_PAD == 0:
        return _SECTOR  # it ends with a sector in any case
    from loopdev.partitions import HEAD_SIZE, find_sector_size

    try:
        return find_sector_size(image.read(0, HEAD_SIZE)) or _SECTOR
    except ImageReadError:
        return _SECTOR


def _attach(path: str, partscan: bool, sector_size: int | None) -> LoopDevice:
    # Imported while the workers start.
    from loopdev._attach import attach

    try:
        return attach(
            path, read_only=True, partscan=partscan, sector_size=sector_size, persist=True
        )
    except BackingFileError as exc:
        if exc.errno != errno.EIO or partscan or sector_size is not None:
            raise
    # Where a GPT would be, the image is damaged. The rest of it may be all the more wanted.
    return attach(path, read_only=True, sector_size=_SECTOR, persist=True)
