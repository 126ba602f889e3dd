# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Calls that may hang in the kernel, made so that the caller never does."""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeVar

    Item = TypeVar("Item")
    Result = TypeVar("Result")


def each_within(
    call: Callable[[Item], Result | None],
    items: Sequence[Item],
    timeout: float,
    place: Callable[[Item], object] = lambda item: item,
) -> list[Result | None]:
    """Return call(item) for each item, None where it raised OSError or took too long.

    All calls are made by one thread. When one of them hangs, its thread is left behind with it,
    and another goes on with the next item.

    Args:
        call: What to do with each; must not touch what others use.
        items: In this order.
        timeout: Seconds for one call.
        place: Where an item is: what is in the same place as one that hung is not tried.
    """
    results: list[Result | None] = []
    hung: set[object] = set()

    def try_call(item: Item) -> Result | None:
        return None if hung and place(item) in hung else call(item)

    while len(results) < len(items):
        results += _run(try_call, items[len(results) :], timeout)
        if len(results) < len(items):
            hung.add(place(items[len(results)]))
            results.append(None)
    return results


def _run(
    call: Callable[[Item], Result | None], items: Sequence[Item], timeout: float
) -> list[Result | None]:
    """Return the results up to the first call that hangs."""
    results: list[Result | None] = []
    finished = _thread.allocate_lock()
    finished.acquire()

    def work() -> None:
        try:
            for item in items:
                try:
                    results.append(call(item))
                except OSError:
                    results.append(None)
        finally:
            finished.release()

    _thread.start_new_thread(work, ())
    seen = -1
    while not finished.acquire(timeout=timeout):
        if len(results) == seen:
            return results[:seen]
        seen = len(results)
    return results
