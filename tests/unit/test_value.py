# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Value keeps the contract of a frozen dataclass with keywords only."""

from __future__ import annotations

import copy
import pickle

import pytest

from loopdev._value import Value


class Point(Value):
    x: int
    y: int = 7


class Other(Value):
    x: int
    y: int = 7


def test_fields_are_as_given():
    point = Point(x=1, y=2)
    assert (point.x, point.y) == (1, 2)


def test_default_applies():
    assert Point(x=1).y == 7
    assert Point(x=1) == Point(x=1, y=7)
    assert hash(Point(x=1)) == hash(Point(x=1, y=7))


def test_default_can_be_overridden_with_none_and_zero():
    assert Point(x=1, y=0).y == 0
    assert Point(x=1, y=None).y is None


def test_missing_field_is_named():
    with pytest.raises(TypeError, match=r"Point\(\) needs 'x'"):
        Point(y=2)


def test_unknown_field_is_named():
    with pytest.raises(TypeError, match=r"Point\(\) has no field 'z'"):
        Point(x=1, y=2, z=3)


def test_unknown_field_is_refused_beside_a_default():
    with pytest.raises(TypeError, match="no field 'z'"):
        Point(x=1, z=3)


def test_positional_arguments_are_refused():
    with pytest.raises(TypeError):
        Point(1, 2)


@pytest.mark.parametrize("name", ["x", "y", "new"])
def test_setting_is_refused(name):
    point = Point(x=1)
    with pytest.raises(AttributeError, match=f"Point is frozen: cannot set '{name}'"):
        setattr(point, name, 5)
    assert point == Point(x=1)
    assert not hasattr(point, "new")


def test_deleting_is_refused():
    point = Point(x=1)
    with pytest.raises(AttributeError, match="Point is frozen: cannot delete 'x'"):
        del point.x
    assert point.x == 1


def test_equality_is_by_value():
    assert Point(x=1, y=2) == Point(y=2, x=1)
    assert Point(x=1, y=2) != Point(x=2, y=2)
    assert Point(x=1, y=2) != Point(x=1, y=1)


def test_another_class_with_the_same_fields_is_not_equal():
    assert Point(x=1, y=2) != Other(x=1, y=2)
    assert Point(x=1, y=2) != (1, 2)


def test_subclass_is_not_equal():
    class Same(Point):
        x: int
        y: int = 7

    assert Same(x=1) != Point(x=1)


def test_hash_goes_by_value():
    assert hash(Point(x=1, y=2)) == hash(Point(y=2, x=1))
    assert {Point(x=1), Point(x=1, y=7), Point(x=2)} == {Point(x=1), Point(x=2)}


def test_unhashable_field_makes_it_unhashable():
    with pytest.raises(TypeError, match="unhashable"):
        hash(Point(x=[]))


def test_repr_could_be_evaluated():
    assert repr(Point(y="b", x=1)) == "Point(x=1, y='b')"
    assert repr(Point(x=1)) == "Point(x=1, y=7)"


def test_as_dict_has_the_order_of_the_declaration():
    assert list(Point(y=2, x=1).as_dict().items()) == [("x", 1), ("y", 2)]
    assert list(Point(x=1).as_dict().items()) == [("x", 1), ("y", 7)]


def test_as_dict_is_a_copy():
    point = Point(x=1)
    point.as_dict()["x"] = 5
    assert point.x == 1


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))]
)
def test_copies_are_equal(clone):
    point = Point(x=(1, 2))
    assert clone(point) == point
