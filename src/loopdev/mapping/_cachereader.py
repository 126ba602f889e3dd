# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""How one thread reads from the cache. Why it is right is in :mod:`loopdev.mapping._cache`."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopdev.mapping._cachetable import Table

_PAGE = 4096


class Reader:
    """How one thread reads what is present."""

    __slots__ = (
        "_data",
        "_joined",
        "_mapped",
        "_mask",
        "_pins",
        "_places",
        "_shift",
        "_size",
        "_slot",
        "_used",
    )

    def __init__(self, table: Table, slot: int) -> None:
        self._size = table.geometry.block_size
        self._shift, self._mask = self._size.bit_length() - 1, self._size - 1
        self._places, self._pins, self._used = table.places, table.pins, table.used
        self._data, self._mapped, self._slot = table.data, table.mapped, slot
        # Kept: memory that is fresh for each read costs more than the copying does.
        self._joined = bytearray()

    def read(self, offset: int, length: int) -> memoryview | None:
        """Return a view of a range if all of it is present, else None.

        The view is good until :meth:`done`, which has to follow before the next read, as soon as
        can be: while it does not, the block cannot be evicted. A range in more than one block is
        copied.

        Args:
            offset: Bytes, within the image.
            length: Bytes; zeros follow the end of the image, up to the end of its last block.
        """
        block, start = offset >> self._shift, offset & self._mask
        if start + length > self._size:
            return self._read_across(offset, length)
        frame: int = self._places[block]
        if not frame:
            return None
        self._pins[self._slot] = frame
        # Here is where the barrier of who evicts the block stands; see the module's docstring.
        if self._places[block] != frame:
            self._pins[self._slot] = 0
            return None
        self._used[frame] = 1
        if not self._mapped[frame]:
            self._map(frame)
        start += frame << self._shift
        return self._data[start : start + length]

    def hold(self, block: int) -> None:
        """Keep a block that is present from being evicted, until :meth:`done`.

        Only for who has the lock of the block: who evicts it needs that, too, and so sees the pin.
        """
        self._pins[self._slot] = self._places[block]

    def join(self, length: int) -> memoryview:
        """Return memory for a range in more than one block; it is good until the next one."""
        if len(self._joined) < length:
            self._joined = bytearray(length)
        return memoryview(self._joined)[:length]

    def done(self) -> None:
        """Let go what the last read returned; harmless after one that returned None."""
        self._pins[self._slot] = 0

    def _map(self, frame: int) -> None:
        # The kernel reads from here what we send. Where it finds a page that this process has not
        # touched before, and the process is killed just then, the read fails (EIO) and goes to
        # nobody else: fuse_copy_fill() and fuse_dev_do_write() in linux/fs/fuse/dev.c.
        self._data[frame << self._shift : (frame + 1) << self._shift : _PAGE].tobytes()
        self._mapped[frame] = 1

    def _read_across(self, offset: int, length: int) -> memoryview | None:
        joined, at = self.join(length), 0
        while at < length:
            here = min(length - at, self._size - (offset + at & self._mask))
            view = self.read(offset + at, here)
            if view is None:
                return None
            joined[at : at + here] = view
            self.done()
            at += here
        return joined
