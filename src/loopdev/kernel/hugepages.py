# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Memory that processes share, in huge pages where the kernel can make them."""

from __future__ import annotations

import _ctypes
import mmap

from loopdev.errors import kernel_error
from loopdev.kernel import libc

# That of most machines. Where they are larger there are none, and all works with small ones.
HUGE_PAGE = 2 << 20
_MADV_COLLAPSE = 25  # <asm-generic/mman-common.h>, Linux 6.1
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000  # <asm-generic/mman.h>


class _Char(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class SharedMemory:
    """Zeros, shared with the processes that are forked; no memory is taken before it is written.

    It is of no file: Python would keep a descriptor of it that cannot be had. MAP_NORESERVE,
    because most of it may never be used.

    Args:
        length: Bytes.

    Attributes:
        data: All of it; it begins at a multiple of HUGE_PAGE.
        address: Where that is.
    """

    def __init__(self, length: int) -> None:
        # Python maps wherever the kernel likes. So it maps more than is needed, privately, and the
        # aligned part is replaced; it unmaps it all.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, length + HUGE_PAGE, flags)
        address = _ctypes.addressof(_Char.from_buffer(self._map))
        start = -address % HUGE_PAGE
        self.address = address + start
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        try:
            libc.call("mmap", self.address, length, protection, flags, -1, 0)
        except OSError as exc:
            raise kernel_error(exc, "shared memory", "mmap") from exc
        self.data = memoryview(self._map)[start : start + length]

    def make(self, offset: int, length: int) -> bool:
        """Take the memory of a range that is all zeros still; nobody else may use it meanwhile.

        Without this, a write takes it page by page: 1024 faults for 4 MiB, in each process, which
        cost four times as much as huge pages do, and as much as decoding half of it.

        Args:
            offset: A multiple of HUGE_PAGE.
            length: Likewise.

        Returns:
            Whether it is in huge pages: it is not where the kernel knows none, has none free, or
            is older than Linux 6.1.
        """
        for page in range(offset, offset + length, HUGE_PAGE):
            self.data[page] = 0  # what is not there cannot be collapsed
        try:
            # Nothing but this heeds no setting of the system's, most of which say "never".
            libc.call("madvise", self.address + offset, length, _MADV_COLLAPSE)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Unmap it, at the latest when no view of it is left."""
        self.data.release()
        try:
            self._map.close()
        except BufferError:
            pass  # somebody still has what was read; it goes when that does
