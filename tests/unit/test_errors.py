# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Errors: their text, what else they are, their exit codes, and that they cross process borders."""

from __future__ import annotations

import errno
import os
import pickle
import stat

import pytest

import loopdev
from loopdev import errors
from loopdev._loop import UnexpectedDevice
from loopdev.errors import (
    AccessDeniedError,
    BackingFileError,
    CertificateError,
    ClosedError,
    DeviceBusyError,
    EncryptionKeyError,
    ImageFormatError,
    ImageNotFoundError,
    ImageReadError,
    InvalidValueError,
    KernelError,
    LoopdevError,
    MissingExtraError,
    NameTakenError,
    NoFreeDeviceError,
    NoSuchDeviceError,
    NotBoundError,
    NotMappedError,
    NotPermittedError,
    ServerError,
    VerificationError,
    WaitTimeoutError,
    kernel_error,
)

DEV = "/dev/loop3"


def refused(kind, code, request, text, exit_code):
    facts = {"errno": code, "filename": DEV, "request": request, "reason": None}
    facts["strerror"] = os.strerror(code)
    return kind, (code, DEV, request), text, exit_code, (OSError,), facts


# Class, arguments, text, exit code, what else it is, attributes.
SAMPLES = [
    (errors.ProtocolError, ("no object",), "broker protocol: no object", 1, (), {}),
    (
        errors.LocalProtocolError,
        ("no object",),
        "broker protocol: no object",
        1,
        (errors.ProtocolError,),
        {"reason": "no object"},
    ),
    (
        errors.RemoteProtocolError,
        ("no object",),
        "broker protocol: no object",
        1,
        (errors.ProtocolError,),
        {"reason": "no object"},
    ),
    (
        errors.RefusedError,
        (errno.EDQUOT, "no more than 2 devices"),
        "refused by the broker: no more than 2 devices",
        5,
        (OSError, PermissionError),
        {"errno": errno.EDQUOT, "reason": "no more than 2 devices"},
    ),
    (
        errors.BrokerError,
        (errno.ENOENT, "/run/s", "no broker"),
        "/run/s: no broker",
        1,
        (OSError, ConnectionError),
        {"errno": errno.ENOENT, "filename": "/run/s", "reason": "no broker"},
    ),
    (
        errors.PolicyError,
        ("/etc/p.toml", "is not TOML"),
        "/etc/p.toml: is not TOML",
        2,
        (ValueError,),
        {"path": "/etc/p.toml", "reason": "is not TOML"},
    ),
    (
        InvalidValueError,
        ("offset", 3, "must be a multiple of 512"),
        "offset=3: must be a multiple of 512",
        2,
        (ValueError,),
        {"name": "offset", "value": 3, "reason": "must be a multiple of 512"},
    ),
    (
        InvalidValueError,
        ("--id", None, "is missing"),
        "--id is missing",
        2,
        (ValueError,),
        {"name": "--id", "value": None, "reason": "is missing"},
    ),
    (ClosedError, (DEV,), "/dev/loop3 is closed", 1, (RuntimeError,), {"what": DEV}),
    (
        ImageFormatError,
        ("/a.img", 512, "bad checksum"),
        "/a.img: bad checksum (at byte 512)",
        6,
        (ValueError,),
        {"path": "/a.img", "offset": 512, "reason": "bad checksum"},
    ),
    (
        ImageFormatError,
        (None, 0, "too short"),
        "too short (at byte 0)",
        6,
        (ValueError,),
        {"path": None, "offset": 0, "reason": "too short"},
    ),
    (
        ServerError,
        ("host:8007", "does not answer"),
        "host:8007: does not answer",
        9,
        (),
        {"server": "host:8007", "reason": "does not answer", "status": None},
    ),
    (
        AccessDeniedError,
        ("host:8007", "authentication failed", 401),
        "host:8007: authentication failed",
        5,
        (ServerError,),
        {"server": "host:8007", "reason": "authentication failed", "status": 401},
    ),
    (
        CertificateError,
        ("host:8007", "its certificate is not trusted", "ab:cd"),
        "host:8007: its certificate is not trusted; its fingerprint is ab:cd",
        9,
        (ServerError,),
        {"server": "host:8007", "fingerprint": "ab:cd"},
    ),
    (
        ImageNotFoundError,
        ("snapshot", "vm/100/2024-01-02T03:04:05Z"),
        "no such snapshot: vm/100/2024-01-02T03:04:05Z",
        3,
        (),
        {"what": "snapshot", "where": "vm/100/2024-01-02T03:04:05Z"},
    ),
    (
        ImageReadError,
        ("/a.img", 512, 100, "ends too early"),
        "/a.img: ends too early (bytes 512 to 612)",
        6,
        (OSError,),
        {
            "path": "/a.img",
            "offset": 512,
            "length": 100,
            "reason": "ends too early",
            "errno": errno.EIO,
            "filename": "/a.img",
        },
    ),
    (
        EncryptionKeyError,
        ("/key", "wrong password?"),
        "/key: wrong password?",
        8,
        (),
        {"path": "/key", "reason": "wrong password?"},
    ),
    (EncryptionKeyError, (None, "no key"), "no key", 8, (), {"path": None}),
    (
        MissingExtraError,
        ("pbs",),
        "this needs the extra 'pbs': pip install 'loopdev[pbs]'",
        1,
        (ImportError,),
        {"extra": "pbs"},
    ),
    (
        NameTakenError,
        ("backup",),
        "there is a map named backup already",
        4,
        (FileExistsError,),
        {"name": "backup", "errno": errno.EEXIST, "filename": "backup"},
    ),
    (
        NotMappedError,
        ("backup",),
        "backup: nothing is mapped under this name",
        3,
        (),
        {"name": "backup", "reason": None},
    ),
    (
        NotMappedError,
        (DEV, "is no map of ours; it is attached to /disk.img"),
        "/dev/loop3: is no map of ours; it is attached to /disk.img",
        3,
        (),
        {"name": DEV, "reason": "is no map of ours; it is attached to /disk.img"},
    ),
    (
        VerificationError,
        (DEV, "sector size", 4096, 512),
        "/dev/loop3: asked for sector size 4096, the kernel made it 512",
        1,
        (),
        {"path": DEV, "what": "sector size", "expected": 4096, "found": 512},
    ),
    (
        BackingFileError,
        (errno.EISDIR, "/tmp", "is a directory"),
        "/tmp: is a directory",
        6,
        (OSError,),
        {"errno": errno.EISDIR, "filename": "/tmp", "reason": "is a directory"},
    ),
    (
        BackingFileError,
        (errno.EACCES, "/a", "no"),
        "/a: no",
        5,
        (OSError,),
        {"errno": errno.EACCES, "filename": "/a"},
    ),
    (BackingFileError, (errno.EPERM, "/a", "no"), "/a: no", 5, (OSError,), {}),
    (BackingFileError, (errno.ENOENT, "/a", "no"), "/a: no", 3, (OSError,), {}),
    (
        NoFreeDeviceError,
        (2.5, 17),
        "no free loop device in 2.5 s (17 attempts)",
        7,
        (OSError, TimeoutError),
        {"timeout": 2.5, "attempts": 17, "errno": errno.ETIMEDOUT},
    ),
    (
        WaitTimeoutError,
        (DEV, "still bound", 30.0),
        "/dev/loop3: still bound after 30 s",
        7,
        (OSError, TimeoutError),
        {
            "path": DEV,
            "what": "still bound",
            "timeout": 30.0,
            "errno": errno.ETIMEDOUT,
            "filename": DEV,
        },
    ),
    refused(
        *(KernelError, errno.EINVAL, "LOOP_CHANGE_FD"),
        *("/dev/loop3: LOOP_CHANGE_FD: Invalid argument (EINVAL)", 1),
    ),
    refused(
        *(NotBoundError, errno.ENXIO, "LOOP_GET_STATUS64"),
        *("/dev/loop3: LOOP_GET_STATUS64: No such device or address (ENXIO)", 3),
    ),
    refused(
        *(NoSuchDeviceError, errno.ENOENT, "open"),
        *("/dev/loop3: open: No such file or directory (ENOENT)", 3),
    ),
    (
        NotPermittedError,
        (errno.EACCES, DEV, "open"),
        "/dev/loop3: open: Permission denied (EACCES)",
        5,
        (OSError, PermissionError),
        {"errno": errno.EACCES, "filename": DEV, "request": "open"},
    ),
    refused(
        *(DeviceBusyError, errno.EBUSY, "LOOP_CONFIGURE"),
        *("/dev/loop3: LOOP_CONFIGURE: Device or resource busy (EBUSY)", 4),
    ),
    (
        KernelError,
        (errno.EBUSY, DEV, "LOOP_CONFIGURE", "is bound to /a"),
        "/dev/loop3: is bound to /a",
        1,
        (OSError,),
        {"reason": "is bound to /a", "request": "LOOP_CONFIGURE", "errno": errno.EBUSY},
    ),
    (
        DeviceBusyError,
        (errno.EBUSY, DEV, "detach", "by nobody that can be seen"),
        "/dev/loop3: by nobody that can be seen",
        4,
        (OSError,),
        {"holders": (), "reason": "by nobody that can be seen"},
    ),
    (
        DeviceBusyError,
        (errno.EBUSY, DEV, "detach", None, ["cp (12)", "dd (13)"]),
        "/dev/loop3: in use by cp (12), dd (13)",
        4,
        (OSError,),
        {"holders": ("cp (12)", "dd (13)"), "errno": errno.EBUSY},
    ),
    (
        UnexpectedDevice,
        (3, os.makedev(8, 1), stat.S_IFBLK | 0o600),
        "not a loop device: block device 8:1, expected 7:3",
        3,
        (),
        {"expected_minor": 3, "rdev": os.makedev(8, 1), "mode": stat.S_IFBLK | 0o600},
    ),
    (
        UnexpectedDevice,
        (3, os.makedev(1, 5), stat.S_IFCHR | 0o600),
        "not a loop device: no block device but 1:5, expected 7:3",
        3,
        (),
        {"mode": stat.S_IFCHR | 0o600},
    ),
]


def name_of(sample):
    return sample.__name__ if isinstance(sample, type) else None


samples = pytest.mark.parametrize(
    ("kind", "args", "text", "exit_code", "also", "facts"), SAMPLES, ids=name_of
)


@samples
def test_text_comes_from_the_facts(kind, args, text, exit_code, also, facts):
    assert str(kind(*args)) == text


@samples
def test_attributes(kind, args, text, exit_code, also, facts):
    error = kind(*args)
    assert {name: getattr(error, name) for name in facts} == facts


@samples
def test_is_also_a_builtin_error(kind, args, text, exit_code, also, facts):
    assert issubclass(kind, (LoopdevError, *also))
    for base in (LoopdevError, *also):
        assert isinstance(kind(*args), base)


@samples
def test_exit_code(kind, args, text, exit_code, also, facts):
    assert kind(*args).exit_code == exit_code


@samples
def test_survives_pickling(kind, args, text, exit_code, also, facts):
    error = kind(*args)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == text
    assert again.exit_code == exit_code
    assert {name: getattr(again, name) for name in facts} == facts
    for name in ("errno", "filename"):
        assert getattr(again, name, None) == getattr(error, name, None)


def test_the_root_survives_pickling():
    """A caller may raise the root, or derive from it."""
    again = pickle.loads(pickle.dumps(LoopdevError("text")))
    assert type(again) is LoopdevError
    assert str(again) == "text"


def test_every_class_has_a_sample():
    classes = {
        kind
        for kind in (*vars(errors).values(), UnexpectedDevice)
        if isinstance(kind, type) and issubclass(kind, LoopdevError)
    }
    assert classes - {sample[0] for sample in SAMPLES} == {LoopdevError}


def test_every_class_is_public():
    """What can be raised can be caught by a name of the package."""
    for kind in {sample[0] for sample in SAMPLES} - {UnexpectedDevice}:
        assert getattr(loopdev, kind.__name__) is kind


def test_what_is_no_os_error():
    """`except OSError` is for what the kernel said."""
    for kind in (InvalidValueError, ClosedError, ImageFormatError, VerificationError):
        assert not issubclass(kind, OSError)


def test_unknown_errno_is_printed_as_a_number():
    assert str(KernelError(9999, DEV, "open")).endswith("(9999)")


@pytest.mark.parametrize(
    ("request_name", "code", "kind"),
    [
        ("open", errno.ENXIO, NoSuchDeviceError),
        ("open", errno.ENODEV, NoSuchDeviceError),
        ("open", errno.ENOENT, NoSuchDeviceError),
        ("open", errno.EBUSY, DeviceBusyError),
        ("open", errno.EACCES, NotPermittedError),
        ("open", errno.EPERM, NotPermittedError),
        ("open", errno.EROFS, KernelError),
        ("LOOP_GET_STATUS64", errno.ENXIO, NotBoundError),
        ("LOOP_CLR_FD", errno.ENXIO, NotBoundError),
        ("LOOP_CTL_REMOVE", errno.ENODEV, NoSuchDeviceError),
        ("LOOP_CTL_REMOVE", errno.EBUSY, DeviceBusyError),
        ("BLKFLSBUF", errno.EACCES, NotPermittedError),
        ("LOOP_SET_STATUS64", errno.EPERM, NotPermittedError),
        ("LOOP_CTL_ADD", errno.EEXIST, KernelError),
        ("LOOP_CONFIGURE", errno.EINVAL, KernelError),
        # Only open() says by ENOENT that a device is missing.
        ("mknod", errno.ENOENT, KernelError),
    ],
)
def test_kernel_error_chooses_by_request_and_errno(request_name, code, kind):
    error = kernel_error(OSError(code, os.strerror(code)), DEV, request_name)
    assert type(error) is kind
    assert (error.errno, error.filename, error.request) == (code, DEV, request_name)


def test_kernel_error_without_errno():
    """Python code raises OSErrors that carry none."""
    error = kernel_error(OSError("just text"), DEV, "open")
    assert type(error) is KernelError
    assert error.errno == 0
