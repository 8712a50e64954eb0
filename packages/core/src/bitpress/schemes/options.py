"""What a user may set of a scheme: a frozen attrs class of the plugin, built and checked here from
text or TOML values.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import frozen

from bitpress.errors import RecipeError, did_you_mean


@frozen
class Options:
    """Base of every scheme's options.

    Fields are what users set; the properties below tell the core what follows from them.

    Examples:
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
    def uses_reference(self) -> bool:
        """Whether texts are run through the source model too, where a step takes a `reference` or
        gradients; otherwise it is given neither.
        """
        return True

    @property
    def full_reference(self) -> bool:
        """Whether all texts are run through the source model too, where a step takes a `reference`
        or gradients; otherwise as many are as the widest layer needs.
        """
        return False

    @property
    def rescales(self) -> bool | None:
        """Whether factors for columns are to be chosen; None: exactly when there is a `rescale`
        hook.
        """
        return None

    @property
    def rotates(self) -> bool:
        """Whether the hidden states of the whole model, and its heads' values, are to be rotated:
        R1 and R2 of SpinQuant, folded into the weights before anything else is done.

        Schemes call the option `rotate`: that is what the core's messages call it.
        """
        return False

    @property
    def row_block(self) -> int:
        """How many consecutive rows share numbers (a block scale, a packed word).

        The rows of every layer that is fused with others must be a multiple of it.
        """
        return 1

    @property
    def transformers_reason(self) -> str | None:
        """Why transformers does not load what is written with these options, as the model card has
        it; None where it does, which the conformance kit proves.
        """
        return None

    @property
    def vllm_plugin(self) -> str | None:
        """The package without which vLLM does not read what is written with these options; None
        where it needs none.
        """
        return None


def option(default: Any, help: str, **kwargs: Any) -> Any:
    """A field of an options class.

    Args:
        default: its value where the user sets none.
        help: one line, which `bitpress schemes NAME` prints.
        kwargs: what else `attrs.field` takes: `validator`, ...
    """
    return attrs.field(default=default, metadata={"help": help}, **kwargs)


@frozen
class ReferenceOptions(Options):
    """Base of the options of a scheme that takes a `reference`, or gradients."""

    reference: Literal["auto", "all", "none"] = option(
        "auto", "texts that run through the source model too: as many as widths need, all, or none"
    )

    @property
    def uses_reference(self) -> bool:
        """What the user says."""
        return self.reference != "none"

    @property
    def full_reference(self) -> bool:
        """What the user says."""
        return self.reference == "all"


def build_options(cls: type[Options], values: Mapping[str, Any], scheme: str) -> Options:
    """The options of a scheme from a recipe's values or a command line's texts.

    Raises:
        RecipeError: an unknown option, a value of the wrong kind, or one that the scheme's own
            validator refuses.
    """
    names = [field.name for field in attrs.fields(cls)]
    types_by_name = get_type_hints(cls)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise RecipeError(
                f"scheme {scheme}: no option {name!r}{did_you_mean(name, names)} (its options: "
                f"{', '.join(names) or 'none'})"
            )
        try:
            converted[name] = _convert(value, types_by_name[name])
        except (ValueError, TypeError) as e:
            raise RecipeError(f"scheme {scheme}: option {name}: {e}") from None
    try:
        return cls(**converted)
    except (ValueError, TypeError) as e:
        raise RecipeError(f"scheme {scheme}: {e.args[0] if e.args else e}") from None


def describe_type(annotation: Any) -> str:
    """How a type reads in a table of options: `channel | tensor`, `[number, whole number]`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(describe_type(member) for member in arguments)
    if origin is tuple:
        return "[" + ", ".join(describe_type(item) for item in arguments) + "]"
    names = {bool: "true | false", int: "whole number", float: "number", str: "text"}
    return names.get(annotation, str(annotation))


def format_value(value: object) -> str:
    """An option's value as a user would type it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(value: Any, annotation: Any) -> Any:
    """A TOML value or a command line's text as the annotated type; a ValueError says what would
    fit.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        for choice in arguments:
            if type(value) in (type(choice), str) and str(value) == str(choice):
                return choice
        raise ValueError(f"{value!r} is not one of {', '.join(str(a) for a in arguments)}")
    if origin in (Union, types.UnionType):
        for member in arguments:
            try:
                return _convert(value, member)
            except (ValueError, TypeError):
                continue
        raise ValueError(f"{value!r} is not {describe_type(annotation)}")
    if origin is tuple:
        return _convert_tuple(value, arguments)

    if annotation is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if annotation in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if annotation is float or number == int(number):
                return annotation(number)
        except (ValueError, TypeError, OverflowError):
            pass
    if annotation is str and isinstance(value, str):
        return value
    raise ValueError(f"{value!r} is not {describe_type(annotation)}")


def _convert_tuple(value: Any, annotations: tuple[Any, ...]) -> tuple[Any, ...]:
    # On a command line it is 128,128 or [128, 128].
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.startswith("[") else value.split(",")
        except RecursionError:
            value = None
    if not isinstance(value, (list, tuple)) or len(value) != len(annotations):
        raise ValueError(f"{value!r} is not a list of {len(annotations)}")
    items = zip(value, annotations, strict=True)
    return tuple(_convert(item, annotation) for item, annotation in items)
