# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Every error that loopdev raises, with its exit code.

All share the root :class:`LoopdevError`. What the kernel refused is also an :class:`OSError`
with ``errno`` and ``filename``; what the caller got wrong is also a :class:`ValueError`.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopdev._holders import Holder


class LoopdevError(Exception):
    """Root of all errors of this package."""

    exit_code = 1

    _call: tuple[object, ...]

    def __reduce__(self) -> tuple[object, ...]:
        """Let errors cross a process border: rebuild them from the arguments of their making."""
        return type(self), getattr(self, "_call", self.args)


class InvalidValueError(LoopdevError, ValueError):
    """An argument is out of its range or misaligned.

    Attributes:
        name: The argument's name.
        value: What was given; None: nothing.
        reason: What it must be.
    """

    exit_code = 2

    def __init__(self, name: str, value: object, reason: str) -> None:
        super().__init__(name, value, reason)
        self._call = (name, value, reason)
        self.name, self.value, self.reason = name, value, reason

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name} {self.reason}"
        return f"{self.name}={self.value}: {self.reason}"


class ClosedError(LoopdevError, RuntimeError):
    """A method was called on an object that was closed or detached.

    Attributes:
        what: The object, as its user knows it.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self._call = (what,)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what} is closed"


class ImageFormatError(LoopdevError, ValueError):
    """An image's bytes are not what its format demands.

    Attributes:
        path: The image, or None where only bytes were given.
        offset: Where in the image the fault is, in bytes.
        reason: What is wrong there.
    """

    exit_code = 6

    def __init__(self, path: str | None, offset: int, reason: str) -> None:
        super().__init__(path, offset, reason)
        self._call = (path, offset, reason)
        self.path, self.offset, self.reason = path, offset, reason

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path is not None else ""
        return f"{where}{self.reason} (at byte {self.offset})"


class ImageNotFoundError(LoopdevError):
    """A repository, or something in it, does not exist.

    Attributes:
        what: "repository", "namespace", "group", "snapshot", "archive".
        where: Its name.
    """

    exit_code = 3

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what, where)
        self._call = (what, where)
        self.what, self.where = what, where

    def __str__(self) -> str:
        return f"no such {self.what}: {self.where}"


class ImageReadError(LoopdevError, OSError):
    """A range of an image cannot be read; what is outside of it can.

    Attributes:
        errno: EIO.
        path: The image, or the file of it that is at fault.
        offset: Where the range starts in the image, in bytes.
        length: Of the range, in bytes.
        reason: What is wrong.
    """

    exit_code = 6

    def __init__(self, path: str, offset: int, length: int, reason: str) -> None:
        OSError.__init__(self, errno.EIO, os.strerror(errno.EIO), path)
        self._call = (path, offset, length, reason)
        self.path, self.offset, self.length, self.reason = path, offset, length, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} (bytes {self.offset} to {self.offset + self.length})"


class EncryptionKeyError(LoopdevError):
    """An encryption key is missing, damaged or not the right one, or its password is wrong.

    Attributes:
        path: The key file, or None.
        reason: What is wrong; never a secret.
    """

    exit_code = 8

    def __init__(self, path: str | None, reason: str) -> None:
        super().__init__(path, reason)
        self._call = (path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{self.path}: {self.reason}"


class ServerError(LoopdevError):
    """A server cannot be reached, or does not do what it was asked to.

    Attributes:
        server: Its name and port.
        reason: What happened, in the server's own words if it had any; never a secret.
        status: The HTTP status that it answered with, or None.
    """

    exit_code = 9

    def __init__(self, server: str, reason: str, status: int | None = None) -> None:
        super().__init__(server, reason, status)
        self._call = (server, reason, status)
        self.server, self.reason, self.status = server, reason, status

    def __str__(self) -> str:
        return f"{self.server}: {self.reason}"


class AccessDeniedError(ServerError):
    """A server refuses a password or token, or who has it lacks a privilege."""

    exit_code = 5


class CertificateError(ServerError):
    """A server's certificate is neither valid nor the one that was expected.

    Attributes:
        fingerprint: The certificate's: 32 pairs of digits with colons.
    """

    def __init__(self, server: str, reason: str, fingerprint: str) -> None:
        super().__init__(server, reason)
        self._call = (server, reason, fingerprint)
        self.fingerprint = fingerprint

    def __str__(self) -> str:
        return f"{self.server}: {self.reason}; its fingerprint is {self.fingerprint}"


class MissingExtraError(LoopdevError, ImportError):
    """A feature needs a library that is an extra of this package.

    Attributes:
        extra: Its name.
    """

    def __init__(self, extra: str) -> None:
        super().__init__(extra)
        self._call = (extra,)
        self.extra = extra

    def __str__(self) -> str:
        return f"this needs the extra {self.extra!r}: pip install 'loopdev[{self.extra}]'"


class NameTakenError(LoopdevError, FileExistsError):
    """There is a map of this name (EEXIST).

    Attributes:
        name: It.
    """

    exit_code = 4

    def __init__(self, name: str) -> None:
        OSError.__init__(self, errno.EEXIST, os.strerror(errno.EEXIST), name)
        self._call = (name,)
        self.name = name

    def __str__(self) -> str:
        return f"there is a map named {self.name} already"


class NotMappedError(LoopdevError):
    """There is no such map.

    Attributes:
        name: What was looked for.
        reason: What it is instead, if anything.
    """

    exit_code = 3

    def __init__(self, name: str, reason: str | None = None) -> None:
        super().__init__(name, reason)
        self._call = (name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason or 'nothing is mapped under this name'}"


class VerificationError(LoopdevError):
    """The kernel accepted a request but the device is not what was asked for.

    Attributes:
        path: The device.
        what: The property that differs.
        expected: Its value as asked for.
        found: Its value as read back.
    """

    def __init__(self, path: str, what: str, expected: object, found: object) -> None:
        super().__init__(path, what, expected, found)
        self._call = (path, what, expected, found)
        self.path, self.what, self.expected, self.found = path, what, expected, found

    def __str__(self) -> str:
        return (
            f"{self.path}: asked for {self.what} {self.expected}, the kernel made it {self.found}"
        )


class BackingFileError(LoopdevError, OSError):
    """A file cannot back a loop device.

    Attributes:
        errno: EISDIR, ENOENT, EACCES, ... as open() would say, else EINVAL.
        filename: The backing file.
        reason: What is wrong with it.
    """

    exit_code = 6

    def __init__(self, code: int, filename: str, reason: str) -> None:
        OSError.__init__(self, code, os.strerror(code), filename)
        self._call = (code, filename, reason)
        self.reason = reason
        if code in (errno.EACCES, errno.EPERM):
            self.exit_code = NotPermittedError.exit_code
        elif code == errno.ENOENT:
            self.exit_code = NoSuchDeviceError.exit_code

    def __str__(self) -> str:
        return f"{self.filename}: {self.reason}"


class NoFreeDeviceError(LoopdevError, TimeoutError):
    """No loop device could be had before the deadline.

    Attributes:
        timeout: How long was tried, in seconds.
        attempts: How many devices were tried.
    """

    exit_code = 7

    def __init__(self, timeout: float, attempts: int) -> None:
        OSError.__init__(self, errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        self._call = (timeout, attempts)
        self.timeout, self.attempts = timeout, attempts

    def __str__(self) -> str:
        return f"no free loop device in {self.timeout:g} s ({self.attempts} attempts)"


class WaitTimeoutError(LoopdevError, TimeoutError):
    """Something that was waited for did not happen in time.

    Attributes:
        path: The device.
        what: What was waited for.
        timeout: How long, in seconds.
    """

    exit_code = 7

    def __init__(self, path: str, what: str, timeout: float) -> None:
        OSError.__init__(self, errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), path)
        self._call = (path, what, timeout)
        self.path, self.what, self.timeout = path, what, timeout

    def __str__(self) -> str:
        return f"{self.path}: {self.what} after {self.timeout:g} s"


class KernelError(LoopdevError, OSError):
    """The kernel refused a request.

    Attributes:
        errno: The kernel's error.
        filename: The device, or /dev/loop-control.
        request: The system call or ioctl by its name in the headers.
    """

    def __init__(self, code: int, filename: str, request: str, reason: str | None = None) -> None:
        OSError.__init__(self, code, os.strerror(code), filename)
        self._call = (code, filename, request, reason)
        self.request, self.reason = request, reason

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.filename}: {self.reason}"
        code = errno.errorcode.get(self.errno or 0, str(self.errno))
        return f"{self.filename}: {self.request}: {self.strerror} ({code})"


class NotBoundError(KernelError):
    """The device has no backing file (ENXIO), or no longer the one it had."""

    exit_code = 3


class NoSuchDeviceError(KernelError):
    """There is no such loop device (ENXIO or ENODEV), or no node for it (ENOENT)."""

    exit_code = 3


class NotPermittedError(KernelError, PermissionError):
    """The caller lacks the right (EACCES, EPERM): root, or membership of the group disk."""

    exit_code = 5


class DeviceBusyError(KernelError):
    """The device is in use (EBUSY).

    Attributes:
        holders: Who uses it, as far as that was looked for.
    """

    exit_code = 4

    def __init__(
        self,
        code: int,
        filename: str,
        request: str,
        reason: str | None = None,
        holders: Sequence[Holder] = (),
    ) -> None:
        super().__init__(code, filename, request, reason)
        self._call = (code, filename, request, reason, tuple(holders))
        self.holders = tuple(holders)

    def __str__(self) -> str:
        if not self.holders:
            return super().__str__()
        return f"{self.filename}: in use by " + ", ".join(map(str, self.holders))


class ProtocolError(LoopdevError):
    """A message between the broker and its client is not what the protocol says.

    Attributes:
        reason: What is wrong with it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self._call = (reason,)
        self.reason = reason

    def __str__(self) -> str:
        return f"broker protocol: {self.reason}"


class LocalProtocolError(ProtocolError):
    """What we sent, or are about to send, is wrong."""


class RemoteProtocolError(ProtocolError):
    """What the other side sent is wrong."""


class RefusedError(LoopdevError, PermissionError):
    """The broker's policy does not allow it.

    Attributes:
        errno: EPERM; EDQUOT: a limit is reached; EAGAIN: too many requests, for now;
            EMFILE, ENOSPC: the broker is out of descriptors, numbers or room for its state file.
        reason: What is not allowed.
    """

    exit_code = 5

    def __init__(self, code: int, reason: str) -> None:
        OSError.__init__(self, code, os.strerror(code))
        self._call = (code, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"refused by the broker: {self.reason}"


class BrokerError(LoopdevError, ConnectionError):
    """The broker cannot be reached, or has gone; with it go the devices.

    Attributes:
        errno: ENOENT, ECONNREFUSED, ECONNRESET, ...
        filename: Its socket.
        reason: What happened.
    """

    def __init__(self, code: int, filename: str, reason: str) -> None:
        OSError.__init__(self, code, os.strerror(code), filename)
        self._call = (code, filename, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.filename}: {self.reason}"


class PolicyError(LoopdevError, ValueError):
    """A policy file is not one.

    Attributes:
        path: The file.
        reason: What is wrong in it, and where.
    """

    exit_code = 2

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self._call = (path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


_OPEN_ERRORS = {
    errno.ENXIO: NoSuchDeviceError,
    errno.ENODEV: NoSuchDeviceError,
    errno.ENOENT: NoSuchDeviceError,
    errno.EBUSY: DeviceBusyError,
    errno.EACCES: NotPermittedError,
    errno.EPERM: NotPermittedError,
}
_REQUEST_ERRORS = {
    errno.ENXIO: NotBoundError,
    errno.ENODEV: NoSuchDeviceError,
    errno.EBUSY: DeviceBusyError,
    errno.EACCES: NotPermittedError,
    errno.EPERM: NotPermittedError,
}


def kernel_error(exc: OSError, filename: str, request: str) -> KernelError:
    """Return the error of this package for what the kernel said of *request* on *filename*.

    ENXIO has two meanings: from open() there is no device, from an ioctl it is not bound.
    """
    code = exc.errno or 0
    table = _OPEN_ERRORS if request == "open" else _REQUEST_ERRORS
    kind: type[KernelError] = table.get(code, KernelError)
    return kind(code, filename, request)
