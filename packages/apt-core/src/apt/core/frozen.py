"""Mappings and lists that cannot be changed: what a profile holds beside its own fields, which are frozen by pydantic.

They are dicts and lists to everyone who reads them. A deep copy is a plain one, for whoever wants to change something.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn


def frozen(value: Any) -> Any:
    """A copy of `value` whose dicts and lists, down to the innermost, cannot be changed."""
    if isinstance(value, dict):
        return FrozenDict({key: frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return FrozenList(map(frozen, value))
    return value


def _refuse(self: object, *arguments: Any, **options: Any) -> NoReturn:
    raise TypeError("a profile cannot be changed; copy.deepcopy() of it can")


class FrozenDict(dict[str, Any]):
    """A dict for reading."""

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {key: copy.deepcopy(value, memo) for key, value in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class FrozenList(list[Any]):
    """A list for reading."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse
    append = clear = extend = insert = pop = remove = reverse = sort = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        return [copy.deepcopy(value, memo) for value in self]

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)
