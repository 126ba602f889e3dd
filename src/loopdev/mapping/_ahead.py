# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""How far to read ahead of who reads in order. No I/O."""

from __future__ import annotations

# A process sees only some of the reads, so a block in between may be another one's.
_STEP = 2


class Window:
    """The blocks that are read ahead: it doubles with each step that was foreseen, up to a limit.

    It closes at the first one that was not, and opens again with two blocks in order.

    Args:
        blocks: How many the image has.
        first: How many blocks to begin with.
        most: How many at most.

    Attributes:
        block: Where the reader is.
        depth: How many blocks ahead it is; 0: it is closed.
    """

    def __init__(self, blocks: int, first: int, most: int) -> None:
        self._blocks, self._first, self._most = blocks, min(first, most), most
        self.block, self.depth = -2 * _STEP, 0
        self._end = 0  # all below is read ahead already, from the last jump on

    def move(self, block: int) -> range:
        """Be told that the reader is at another block; return those to read ahead now."""
        foreseen = 0 < block - self.block <= _STEP
        self.block = block
        if not foreseen:
            self.depth, self._end = 0, block + 1
            return range(0)
        self.depth = min(2 * self.depth, self._most) or self._first
        start = max(self._end, block + 1)
        self._end = max(start, min(block + self.depth + 1, self._blocks))
        return range(start, self._end)
