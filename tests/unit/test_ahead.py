# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""The window that is read ahead."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loopdev.mapping._ahead import Window


def test_it_grows_while_it_is_right_and_not_deep_enough():
    window = Window(1000, first=2)
    depths = []
    for block in range(8):
        window.move(block, late=True, most=18 if block > 2 else 5)
        depths.append(window.depth)
    assert depths == [0, 2, 4, 8, 16, 18, 18, 18]


def test_it_opens_by_half_of_what_there_can_be():
    window = Window(1000, first=2)
    window.move(0, late=True, most=16)
    assert list(window.move(1, late=True, most=16)) == [*range(2, 10)]
    assert window.depth == 8
    window.move(2, late=True, most=16)
    assert window.depth == 16


def test_it_is_no_deeper_than_is_needed():
    window = Window(1000, first=2)
    for block, late in enumerate((True, True, True, False, False, True, False)):
        window.move(block, late, 5 if block < 2 else 16)
    assert window.depth == 8


def test_it_closes_with_a_jump_and_opens_again():
    window = Window(1000, first=2)
    for block in range(6):
        window.move(block, late=True, most=16)
    assert list(window.move(500, late=True, most=16)) == []
    assert window.depth == 0
    assert list(window.move(501, late=True, most=4)) == [502, 503]


def test_random_blocks_are_not_read_ahead():
    window = Window(10_000, first=2)
    assert all(
        not window.move(block, late=True, most=16)
        for block in (17, 9000, 3, 412, 77, 5000, 4990, 20)
    )


def test_a_step_back_does_not_close_it():
    window = Window(1000, first=2)
    window.move(10, late=True, most=16)
    window.move(11, late=True, most=4)
    assert list(window.move(10, late=False, most=16)) == []
    assert window.depth == 2


def test_another_process_may_have_had_the_block_between():
    window = Window(1000, first=2)
    window.move(0, late=True, most=4)
    assert list(window.move(2, late=True, most=4)) == [3, 4]
    assert list(window.move(5, late=True, most=16)) == []  # but not two of them


@given(
    blocks=st.integers(1, 50),
    first=st.integers(1, 8),
    most=st.integers(1, 32),
    moves=st.lists(st.tuples(st.integers(0, 49), st.booleans()), max_size=60),
)
def test_whatever_is_read(blocks, first, most, moves):
    window = Window(blocks, first)
    asked: set[int] = set()
    for block, late in ((move % blocks, late) for move, late in moves):
        if block == window.block:
            continue
        jump = abs(block - window.block) > 2
        if jump:
            asked.clear()
        found = set(window.move(block, late, most))
        assert all(block < number < blocks for number in found)
        assert len(found) <= most
        assert all(number - block <= most for number in found)
        assert not found & asked, "asked for twice in one run"
        asked |= found


@given(blocks=st.integers(1, 200), most=st.integers(1, 32))
def test_in_order_each_block_is_asked_for_once_and_none_is_forgotten(blocks, most):
    window = Window(blocks, 2)
    asked = [number for block in range(blocks) for number in window.move(block, True, most)]
    assert asked == list(range(2, blocks))
