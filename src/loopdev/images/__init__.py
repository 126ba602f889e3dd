# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Where bytes come from: one module for each kind of image, loaded when it is used."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Image(Protocol):
        """A disk's bytes, for any number of threads at once."""

        @property
        def size(self) -> int:
            """Bytes; any number above 0."""

        @property
        def block_size(self) -> int:
            """What is cheap to read at once, in bytes: a power of two."""

        @property
        def cached(self) -> bool:
            """Whether blocks are costly, so worth keeping; if not, the kernel keeps them."""

        @property
        def ahead(self) -> int:
            """How many blocks to have under way for who reads in order."""

        @property
        def streams(self) -> int:
            """How many blocks one process should fetch at the same time."""

        def serve(self, timeout: float, say: Callable[[str], None], first: bool) -> None:
            """Be told that this process is to serve reads for long.

            Args:
                timeout: How long one may take, in seconds.
                say: Whom to tell what happens.
                first: Whether it is the one of several that the first read should go to.
            """

        def read(self, offset: int, length: int) -> bytes:
            """Return *length* bytes from *offset* on, fewer where the image ends.

            Raises:
                ImageReadError: They cannot be read (EIO).
            """

        def read_into(self, offset: int, buffer: memoryview) -> None:
            """Fill a writable *buffer* with what is at *offset*; it must end within the image.

            A whole block at its place is put there without another copy. After an error, what is
            in the buffer is undefined.

            Raises:
                ImageReadError: Something of it cannot be read (EIO); the error says which range.
            """

        def is_zero(self, offset: int, length: int) -> bool:
            """Return whether a range is known, without I/O, to be zeros."""

        def fileno(self) -> int | None:
            """Return a descriptor that has these very bytes, or None; it stays owned here."""

        def close(self) -> None:
            """Let go of all that is open."""

    class Source(Protocol):
        """What a user named, found and unlocked; opened later, by another process for example.

        It holds descriptors and locks, so a process that is to open it must inherit them.
        """

        @property
        def description(self) -> str:
            """What people know it by; without secrets."""

        @property
        def identity(self) -> str:
            """The same for the same image."""

        @property
        def name(self) -> str:
            """For a map of it: 1 to 64 of [A-Za-z0-9._-]."""

        def filenos(self) -> tuple[int, ...]:
            """Return the descriptors that open() needs; they stay owned here."""

        def open(self) -> Image:
            """Return the image, which stays open when the source is closed."""

        def close(self) -> None:
            """Let go of all that is open."""


_NAME_MAX = 64
_RAW, _PBS = "raw:", "pbs:"


def resolve(
    source: str | os.PathLike[str],
    *,
    repository: str | None = None,
    namespace: str | None = None,
    keyfile: str | None = None,
    fingerprint: str | None = None,
) -> Source:
    """Find an image, and load what is needed to read it.

    Args:
        source: A raw image: ``disk.img``, ``/dev/sdb``, ``raw:disk.qcow2`` (its bytes as they are).
            Or one in a datastore: ``pbs:vm/100/2024-01-02T03:04:05Z/drive-scsi0.img``, where
            ``pbs:`` may be left out if *repository* is given or there is no such file.
            ``latest`` instead of the time is the newest snapshot; ``ns/a/b/`` may be in front.
            ``pbs://backup@pbs@host:8007/store/vm/100/...`` says the repository, too.
        repository: The datastore: a directory, or one on a server: ``backup@pbs@host:8007:store``,
            ``backup@pbs!token@host:store``, ``host:store``. None: PBS_REPOSITORY has it. The
            password, or the token's secret, comes from PBS_PASSWORD and its kin, or is asked for.
        namespace: Where in the datastore, such as "a/b".
        keyfile: The encryption key. Its password comes from PBS_ENCRYPTION_PASSWORD and its kin,
            or is asked for on the terminal.
        fingerprint: The SHA-256 of the server's certificate, for one that is not valid by itself.
            None: PBS_FINGERPRINT has it.

    Raises:
        ImageNotFoundError: There is no such datastore, snapshot or archive.
        BackingFileError: A raw image cannot be used, or is of another format.
        ImageFormatError: The snapshot is damaged.
        EncryptionKeyError: The key is missing, damaged or wrong.
        DeviceBusyError: The snapshot is being written or removed (EAGAIN).
        AccessDeniedError: The server refuses the password or token, or the privilege is missing.
        CertificateError: The server's certificate is not trusted.
        ServerError: The server cannot be reached, or does not do what it should.
        InvalidValueError: The source is no name of an image.
    """
    text = os.fspath(source)
    if text.startswith(_RAW):
        from loopdev.images.raw import resolve_raw

        return resolve_raw(text.removeprefix(_RAW), probe=False)
    if text.startswith(_PBS) or repository is not None or _is_snapshot(text):
        from loopdev.images.pbs.resolve import resolve_image

        return resolve_image(text, repository, namespace or "", keyfile, fingerprint)
    from loopdev.images.raw import resolve_raw

    return resolve_raw(text)


def _is_snapshot(text: str) -> bool:
    """Return whether this looks like an image in a datastore, and nothing else."""
    from loopdev.images.pbs.names import TYPES

    words = text.split("/")
    return len(words) >= 4 and words[-4] in TYPES and not os.path.lexists(text)


def open_image(
    source: str | os.PathLike[str],
    *,
    repository: str | None = None,
    namespace: str | None = None,
    keyfile: str | None = None,
    fingerprint: str | None = None,
) -> Image:
    """Open an image; the arguments and errors are those of :func:`resolve`."""
    found = resolve(
        source,
        repository=repository,
        namespace=namespace,
        keyfile=keyfile,
        fingerprint=fingerprint,
    )
    try:
        return found.open()
    finally:
        found.close()


def map_name(text: str) -> str:
    """Return a name for a map: *text* with what it must not have replaced by dashes."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in text)
    return safe.lstrip(".-")[:_NAME_MAX] or "image"
