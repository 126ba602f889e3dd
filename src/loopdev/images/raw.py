# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Raw images: any local file or block device, byte for byte."""

from __future__ import annotations

import errno
import os
import stat

from loopdev._backing import Backing
from loopdev._value import Value
from loopdev.errors import BackingFileError, ImageReadError
from loopdev.images import map_name
from loopdev.kernel.fds import OwnedFd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK_SIZE = 128 << 10  # the kernel's readahead
_INDEX = "an index in a datastore (use --repository, and the name of the snapshot)"
# What an image of another format begins with, and where; mapped as it is, it would be nonsense.
_FORMATS = (
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"COWD", "a VMDK image"),
    (0, b"# Disk DescriptorFile", "a VMDK image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (64, b"\x7f\x10\xda\xbe", "a VDI image"),
    (0, b"\x1f\x8b\x08", "compressed with gzip"),
    (0, b"\xfd7zXZ\x00", "compressed with xz"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (0, b"BZh", "compressed with bzip2"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"\x2f\x7f\x41\xed\x91\xfd\x0f\xcd", _INDEX),
    (0, b"\x1c\x91\x4e\xa5\x19\xba\xb3\xcd", _INDEX),
)
_PROBE = 128


class RawImage:
    """A file or block device; see :class:`loopdev.images.Image`."""

    block_size = _BLOCK_SIZE
    cached = False
    ahead, streams = 0, 1

    def __init__(self, fd: OwnedFd, size: int) -> None:
        self._fd, self.size = fd, size

    def read(self, offset: int, length: int) -> bytes:
        """Return *length* bytes from *offset* on, fewer where the image ends."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with what is at *offset*."""
        fd, done = self._fd.fileno(), 0
        while done < len(buffer):
            try:
                count = os.preadv(fd, [buffer[done:]], offset + done)
            except OSError as exc:
                raise self._error(offset + done, len(buffer) - done, exc.strerror) from exc
            if count == 0:
                reason = "it has become shorter while it was in use"
                raise self._error(offset + done, len(buffer) - done, reason)
            done += count

    def _error(self, offset: int, length: int, reason: str | None) -> ImageReadError:
        return ImageReadError(self._fd.name, offset, length, reason or "cannot be read")

    def is_zero(self, offset: int, length: int) -> bool:  # noqa: ARG002
        """Return False: to know would take I/O."""
        return length == 0

    def fileno(self) -> int:
        """Return the descriptor, which stays owned here."""
        return self._fd.fileno()

    def serve(self, timeout: float, say: Callable[[str], None], first: bool) -> None:
        """Do nothing: it is all here."""

    def close(self) -> None:
        """Close the file."""
        self._fd.close()


class RawSource(Value):
    """An opened file; see :class:`loopdev.images.Source`."""

    description: str
    identity: str
    name: str
    size: int
    fd: OwnedFd

    def open(self) -> RawImage:
        """Return the image; it stays open when the source is closed."""
        return RawImage(OwnedFd(os.dup(self.fd.fileno()), self.fd.name), self.size)

    def filenos(self) -> tuple[int, ...]:
        """Return the descriptors that open() needs; they stay owned here."""
        return (self.fd.fileno(),)

    def close(self) -> None:
        """Close the file; images that were opened stay."""
        self.fd.close()


def resolve_raw(path: str, probe: bool = True) -> RawSource:
    """Open the file or block device at *path*.

    The descriptor is kept, so that what is opened later is the same file, whatever becomes of its
    name.

    Args:
        path: It.
        probe: Refuse what is of another format, since its bytes are not those of a disk.

    Raises:
        BackingFileError: It is missing, unreadable, empty, of another kind or of another format.
    """
    backing = Backing.open(path, read_only=True)
    try:
        if backing.size == 0:
            raise BackingFileError(errno.EINVAL, backing.name, "is empty")
        if probe:
            _refuse_other_formats(backing)
        return RawSource(
            description=backing.name,
            identity=_identity(backing.status),
            name=map_name(os.path.basename(backing.name)),
            size=backing.size,
            fd=OwnedFd(os.dup(backing.fileno()), backing.name),
        )
    finally:
        backing.close()


def _identity(status: os.stat_result) -> str:
    # A block device is the same one under each of its names.
    if stat.S_ISBLK(status.st_mode):
        return f"raw:device:{status.st_rdev}"
    return f"raw:{status.st_dev}:{status.st_ino}"


def _refuse_other_formats(backing: Backing) -> None:
    try:
        head = os.pread(backing.fileno(), _PROBE, 0)
    except OSError as exc:
        raise ImageReadError(backing.name, 0, _PROBE, exc.strerror or "?") from exc
    for offset, magic, what in _FORMATS:
        if head.startswith(magic, offset):
            path = backing.name
            reason = f"is {what}, not a raw image; to take its bytes as they are, say raw:{path}"
            raise BackingFileError(errno.EINVAL, path, reason)
