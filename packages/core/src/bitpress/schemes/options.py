"""What a user may set of a scheme: a frozen attrs class in the plugin, built and checked here from
text or TOML values.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import frozen

from bitpress.errors import RecipeError, nearest


@frozen
class Options:
    """Base of every scheme's options. Fields are what users set; the properties below tell the core
    what follows from them.

    >>> @frozen
    ... class MyOptions(Options):
    ...     group_size: int = option(128, "columns that share a scale")
    """

    @property
    def bits(self) -> float | None:
        """Bits per code, scales not counted; None where nothing gets smaller."""
        return None

    @property
    def calibrated(self) -> bool | None:
        """Whether the model must be run on data; None: exactly when `observe` names `inputs`."""
        return None

    @property
    def rescales(self) -> bool | None:
        """Whether factors for columns are to be chosen; None: exactly when there is a `rescale`
        hook.
        """
        return None

    @property
    def row_block(self) -> int:
        """How many consecutive rows share numbers (a block scale, a packed word); every member of a
        stack must divide by it.
        """
        return 1


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of an options class: its default, and one line of help that `bitpress schemes NAME`
    prints.
    """
    return attrs.field(default=default, metadata={"help": help}, **kwargs)


def build(cls: type[Options], values: Mapping[str, Any], scheme: str) -> Options:
    """The options of a scheme from a recipe's values or a command line's texts.

    Raises:
        RecipeError: an unknown option, a value of the wrong kind, or one that the scheme's own
            validator refuses.
    """
    fields = {f.name: f for f in attrs.fields(cls)}
    hints = get_type_hints(cls)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise RecipeError(
                f"scheme {scheme}: no option {name!r}{nearest(name, fields)} (its options: {known})"
            )
        try:
            given[name] = convert(value, hints[name])
        except (ValueError, TypeError) as e:
            raise RecipeError(f"scheme {scheme}: option {name}: {e}") from None
    try:
        return cls(**given)
    except (ValueError, TypeError) as e:
        raise RecipeError(f"scheme {scheme}: {e.args[0] if e.args else e}") from None


def choices(hint: Any) -> str:
    """How a type reads in a table of options: `channel | tensor`, `number`, `[whole number,
    ...]`.
    """
    origin = get_origin(hint)
    if origin is Literal:
        return " | ".join(str(a) for a in get_args(hint))
    if origin in (Union, types.UnionType):
        return " | ".join(choices(a) for a in get_args(hint))
    if origin is tuple:
        return "[" + ", ".join(choices(a) for a in get_args(hint)) + "]"
    return {bool: "true | false", int: "whole number", float: "number", str: "text"}.get(
        hint, str(hint)
    )


def convert(value: Any, hint: Any) -> Any:
    """A TOML value or a command line's text as the annotated type; raises ValueError saying what
    would fit.
    """
    origin = get_origin(hint)
    if origin is Literal:
        for choice in get_args(hint):
            if type(value) in (type(choice), str) and str(value) == str(choice):
                return choice
        raise ValueError(f"{value!r} is not one of {', '.join(str(a) for a in get_args(hint))}")
    if origin in (Union, types.UnionType):
        for arm in get_args(hint):
            try:
                return convert(value, arm)
            except (ValueError, TypeError):
                continue
        raise ValueError(f"{value!r} is not {choices(hint)}")
    if origin is tuple:
        return _tuple(value, get_args(hint))
    if hint is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if hint is float or number == int(number):
                return hint(number)
        except (ValueError, TypeError, OverflowError):
            pass
    if hint is str and isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is not {choices(hint)}")


def _tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    # on a command line: 128,128 or [128, 128]
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.startswith("[") else value.split(",")
        except RecursionError:
            value = None
    if not isinstance(value, (list, tuple)) or len(value) != len(hints):
        raise ValueError(f"{value!r} is not a list of {len(hints)}")
    return tuple(convert(v, h) for v, h in zip(value, hints, strict=True))
