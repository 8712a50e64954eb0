"""A stranger's JSON as frozen attrs classes: every value is of its field's type, or its place is
told.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import attrs

# of a whole number
MOST = 2**63

NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def typed(value: Any, hint: Any, place: str = "") -> Any:
    """A JSON value as what a hint describes: an attrs class, a mapping, a list, a number, a text,
    or one of those or None.

    >>> typed({"a": [1, 2]}, Mapping[str, tuple[int, int]])
    {'a': (1, 2)}

    Raises:
        ValueError: it is of another type; the message begins with its `place`.
    """
    origin, arms = get_origin(hint), get_args(hint)
    # of a type and None
    if origin in (Union, types.UnionType):
        return (
            None
            if value is None
            else typed(value, next(arm for arm in arms if arm is not type(None)), place)
        )
    if attrs.has(hint):
        return _object(value, hint, place)
    if hint is Any:
        return value
    if origin is Mapping and isinstance(value, dict):
        return {
            name: typed(item, arms[1], f"{place} {name}".strip()) for name, item in value.items()
        }
    if origin in (tuple, Sequence) and isinstance(value, list):
        kinds = arms if origin is tuple and arms[-1] is not ... else arms[:1] * len(value)
        if len(kinds) == len(value):
            return tuple(
                typed(item, kind, f"{place} {i}".strip())
                for i, (item, kind) in enumerate(zip(value, kinds, strict=True))
            )
    if type(value) is int and hint in (int, float) and abs(value) < MOST:
        return hint(value)
    if type(value) is hint and hint is not int:
        return value
    raise ValueError(f"{place}: {NAMES.get(hint, 'another table or list')} is expected")


def _object(value: Any, cls: type, place: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{place or 'it'}: a table is expected")
    hints, fields = get_type_hints(cls), attrs.fields_dict(cls)
    unknown = [name for name in value if name not in fields]
    missing = [
        name
        for name, field in fields.items()
        if name not in value and field.default is attrs.NOTHING
    ]
    if unknown or missing:
        raise ValueError(
            f"{place or 'it'}: "
            f"{f'{unknown[0]!r:.60} is not known' if unknown else f'{missing[0]} is missing'}"
        )
    found = {
        name: typed(item, hints[name], f"{place} {name}".strip()) for name, item in value.items()
    }
    try:
        return cls(**found)
    except ValueError as e:
        raise ValueError(f"{place}: {e.args[0] if e.args else e}") from None
