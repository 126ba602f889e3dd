# SPDX-FileCopyrightText: The loopdev authors
# SPDX-License-Identifier: Apache-2.0
"""Frozen records for the modules that every command loads.

The contract is that of ``@dataclass(frozen=True, kw_only=True)``, and type checkers see it as one.
It is not ``dataclasses`` because importing that costs more than the interpreter's own start-up.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Value:
    """A record: made from keywords, compared by its fields, never changed."""

    _fields: frozenset[str] = frozenset()

    def __init_subclass__(cls) -> None:
        cls._fields = frozenset(cls.__annotations__)

    def __init__(self, **fields: object) -> None:
        if fields.keys() != self._fields:
            self._check(fields)
        self.__dict__.update(fields)

    def _check(self, fields: dict[str, object]) -> None:
        for name in type(self).__annotations__:
            if name not in fields and not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__}() needs {name!r}")
        for name in fields:
            if name not in type(self).__annotations__:
                raise TypeError(f"{type(self).__name__}() has no field {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot delete {name!r}")

    def as_dict(self) -> dict[str, object]:
        """Return the fields by name, in the order of their declaration."""
        return {name: getattr(self, name) for name in type(self).__annotations__}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.as_dict().items()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.as_dict().items())
        return f"{type(self).__name__}({fields})"
