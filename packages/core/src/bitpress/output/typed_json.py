"""A stranger's JSON as frozen attrs classes: a value that is not of its field's type is an error
that names its place.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

import attrs

# A whole number must be smaller: what follows computes with 64-bit integers.
INTEGER_LIMIT = 2**63

TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def parse_typed(value: Any, hint: Any, path: str = "") -> Any:
    """A JSON value as the type that a hint names.

    >>> parse_typed({"a": [1, 2]}, Mapping[str, tuple[int, int]])
    {'a': (1, 2)}

    Args:
        value: what `json` has read.
        hint: an attrs class, a mapping, a tuple or sequence, a number, a text, a bool, `Any`, or
            one of those or None.
        path: the keys that lead to the value, for messages.

    Raises:
        ValueError: the value is of another type; the message begins with its path.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return parse_typed(value, next(a for a in arguments if a is not type(None)), path)
    if attrs.has(hint):
        return _parse_class(value, hint, path)
    if hint is Any:
        return value
    if origin is Mapping and isinstance(value, dict):
        return {
            key: parse_typed(item, arguments[1], _join(path, key)) for key, item in value.items()
        }

    if origin in (tuple, Sequence) and isinstance(value, list):
        is_homogeneous = origin is not tuple or arguments[-1] is ...
        hints = arguments[:1] * len(value) if is_homogeneous else arguments
        if len(hints) == len(value):
            pairs = zip(value, hints, strict=True)
            return tuple(parse_typed(item, h, _join(path, i)) for i, (item, h) in enumerate(pairs))

    # `type(...) is`: True is an int to isinstance, and not to a reader of JSON.
    if type(value) is int and hint in (int, float) and abs(value) < INTEGER_LIMIT:
        return hint(value)
    if type(value) is hint and hint is not int:
        return value
    raise ValueError(f"{path}: {TYPE_NAMES.get(hint, 'another table or list')} is expected")


def _parse_class(value: Any, cls: type, path: str) -> Any:
    subject = path or "it"
    if not isinstance(value, dict):
        raise ValueError(f"{subject}: a table is expected")
    hints, fields = get_type_hints(cls), attrs.fields_dict(cls)
    for key in value:
        if key not in fields:
            raise ValueError(f"{subject}: {key!r:.60} is not known")
    for key, attribute in fields.items():
        if key not in value and attribute.default is attrs.NOTHING:
            raise ValueError(f"{subject}: {key} is missing")

    arguments = {
        key: parse_typed(item, hints[key], _join(path, key)) for key, item in value.items()
    }
    try:
        return cls(**arguments)
    except ValueError as e:
        # attrs' validators put further arguments after the message.
        raise ValueError(f"{path}: {e.args[0] if e.args else e}") from None


def _join(path: str, key: object) -> str:
    return f"{path} {key}".strip()
