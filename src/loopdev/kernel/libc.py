# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Calls of the C library that Python has no function for: mount, umount2, prctl, membarrier.

It uses _ctypes, the C half of ctypes: importing that costs 0.4 ms, and ctypes itself 2.5 ms.
"""

from __future__ import annotations

import _ctypes
import os


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _UnsignedLong(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "L"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


_functions: dict[str, _Function] = {}


def call(name: str, *args: int | bytes | None) -> int:
    """Call a function that returns an int, -1 with errno set when it fails.

    Integers are passed as unsigned long: that is what mount(2) and prctl(2) take, and a function
    that takes an int looks at the lower half of the register only. The lock of the interpreter
    is not held during the call.

    Args:
        name: The function's name.
        args: Integers, strings that end where their first NUL is, and None for NULL.

    Returns:
        What the function returned.

    Raises:
        OSError: The function failed. It has an errno and no filename.
    """
    function = _functions.get(name)
    if function is None:
        # The handle of the program itself, which has the C library in it. It is never closed.
        address = _ctypes.dlsym(_ctypes.dlopen(None, 0), name)  # type: ignore[arg-type]
        function = _functions[name] = _Function(address)
    result: int = function(*(_UnsignedLong(arg) if isinstance(arg, int) else arg for arg in args))
    if result == -1:
        code = _ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
