# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""How far to read ahead of who reads in order. No I/O."""

from __future__ import annotations

# Who reads in order may be seen to go back or to leave out so many blocks: what it asks for comes
# in any order, and the other workers get some of it.
_ASTRAY = 2


class Window:
    """The blocks that are read ahead.

    It doubles when a block that was foreseen is not there in time, up to a limit: so it is as deep
    as the way to the blocks is long, and no deeper, for what is read too early is not in the
    processor's caches any more. It closes at the first block that was not foreseen, and opens again
    with two in order: by half of its limit, since a connection that is new, or was idle, is slow at
    first, whatever is asked of it.

    Args:
        blocks: How many the image has.
        first: How many blocks to begin with, at least.

    Attributes:
        block: Where the reader is.
        depth: How many blocks ahead it is; 0: it is closed.
    """

    def __init__(self, blocks: int, first: int) -> None:
        self._blocks, self._first = blocks, first
        self.block, self.depth = -1 - _ASTRAY, 0
        self._end = 0  # all below is read ahead already, from the last jump on

    def move(self, block: int, late: bool, most: int) -> range:
        """Be told that the reader is at another block; return those to read ahead now.

        Args:
            block: Its number.
            late: Whether it is not there yet.
            most: How many blocks ahead at most.
        """
        foreseen = -_ASTRAY <= block - self.block <= _ASTRAY
        self.block = block
        if not foreseen:
            self.depth, self._end = 0, block + 1
            return range(0)
        self.depth = min(self.depth * (2 if late else 1) or max(self._first, most // 2), most)
        start = max(self._end, block + 1)
        self._end = max(start, min(block + self.depth + 1, self._blocks))
        return range(start, self._end)
