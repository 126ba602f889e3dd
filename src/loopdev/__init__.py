# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Any disk image as a Linux block device: in one call, without a race, and without a leak.

Names are loaded when they are first used, so that a program pays for what it uses.
"""

import sys

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev._attach import attach as attach
    from loopdev._device import LoopDevice as LoopDevice
    from loopdev._devices import DeviceInfo as DeviceInfo
    from loopdev._devices import Holder as Holder
    from loopdev._devices import Partition as Partition
    from loopdev._devices import devices as devices
    from loopdev._devices import find as find
    from loopdev._devices import holders as holders
    from loopdev._devices import info as info
    from loopdev.broker.aclient import AsyncLoopClient as AsyncLoopClient
    from loopdev.broker.client import LoopClient as LoopClient
    from loopdev.broker.policy import Policy as Policy
    from loopdev.broker.policy import Rule as Rule
    from loopdev.broker.server import LoopServer as LoopServer
    from loopdev.errors import AccessDeniedError as AccessDeniedError
    from loopdev.errors import BackingFileError as BackingFileError
    from loopdev.errors import BrokerError as BrokerError
    from loopdev.errors import CertificateError as CertificateError
    from loopdev.errors import ClosedError as ClosedError
    from loopdev.errors import DeviceBusyError as DeviceBusyError
    from loopdev.errors import EncryptionKeyError as EncryptionKeyError
    from loopdev.errors import ImageFormatError as ImageFormatError
    from loopdev.errors import ImageNotFoundError as ImageNotFoundError
    from loopdev.errors import ImageReadError as ImageReadError
    from loopdev.errors import InvalidValueError as InvalidValueError
    from loopdev.errors import KernelError as KernelError
    from loopdev.errors import LocalProtocolError as LocalProtocolError
    from loopdev.errors import LoopdevError as LoopdevError
    from loopdev.errors import MissingExtraError as MissingExtraError
    from loopdev.errors import NameTakenError as NameTakenError
    from loopdev.errors import NoFreeDeviceError as NoFreeDeviceError
    from loopdev.errors import NoSuchDeviceError as NoSuchDeviceError
    from loopdev.errors import NotBoundError as NotBoundError
    from loopdev.errors import NotMappedError as NotMappedError
    from loopdev.errors import NotPermittedError as NotPermittedError
    from loopdev.errors import PolicyError as PolicyError
    from loopdev.errors import ProtocolError as ProtocolError
    from loopdev.errors import RefusedError as RefusedError
    from loopdev.errors import RemoteProtocolError as RemoteProtocolError
    from loopdev.errors import ServerError as ServerError
    from loopdev.errors import VerificationError as VerificationError
    from loopdev.errors import WaitTimeoutError as WaitTimeoutError
    from loopdev.images import open_image as open_image
    from loopdev.images.pbs._pipeline import PackProgress as PackProgress
    from loopdev.images.pbs.keyfile import KeyInfo as KeyInfo
    from loopdev.images.pbs.keyfile import create_key as create_key
    from loopdev.images.pbs.keyfile import show_key as show_key
    from loopdev.images.pbs.pack import PackResult as PackResult
    from loopdev.images.pbs.pack import pack as pack
    from loopdev.mapping._map import Mapping as Mapping
    from loopdev.mapping._map import map_image as map_image
    from loopdev.mapping._maps import MapInfo as MapInfo
    from loopdev.mapping._maps import gc as gc
    from loopdev.mapping._maps import maps as maps
    from loopdev.mapping._maps import unmap as unmap

_HOMES = {
    "images": ("open_image",),
    "images.pbs.keyfile": ("KeyInfo", "create_key", "show_key"),
    "images.pbs._pipeline": ("PackProgress",),
    "images.pbs.pack": ("PackResult", "pack"),
    "mapping._map": ("Mapping", "map_image"),
    "mapping._maps": ("MapInfo", "gc", "maps", "unmap"),
    "_attach": ("attach",),
    "_device": ("LoopDevice",),
    "_devices": ("DeviceInfo", "Holder", "Partition", "devices", "find", "holders", "info"),
    "broker.aclient": ("AsyncLoopClient",),
    "broker.client": ("LoopClient",),
    "broker.policy": ("Policy", "Rule"),
    "broker.server": ("LoopServer",),
    "errors": (
        "AccessDeniedError",
        "BackingFileError",
        "CertificateError",
        "BrokerError",
        "ClosedError",
        "DeviceBusyError",
        "EncryptionKeyError",
        "ImageFormatError",
        "ImageNotFoundError",
        "ImageReadError",
        "InvalidValueError",
        "KernelError",
        "LocalProtocolError",
        "LoopdevError",
        "MissingExtraError",
        "NameTakenError",
        "NoFreeDeviceError",
        "NoSuchDeviceError",
        "NotBoundError",
        "NotMappedError",
        "NotPermittedError",
        "ServerError",
        "PolicyError",
        "ProtocolError",
        "RefusedError",
        "RemoteProtocolError",
        "VerificationError",
        "WaitTimeoutError",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in ("errors", "loop"):
        return _module(name)
    if name not in _HOME:
        raise AttributeError(f"module 'loopdev' has no attribute {name!r}")
    value: object = getattr(_module(_HOME[name]), name)
    globals()[name] = value
    return value


def _module(name: str) -> object:
    # importlib costs more to import than most of what it would be for.
    __import__(f"loopdev.{name}")
    return sys.modules[f"loopdev.{name}"]


def __dir__() -> list[str]:
    return __all__
