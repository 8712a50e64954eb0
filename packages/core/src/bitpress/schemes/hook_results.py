"""Checks of what hooks return: a plugin's fault is reported with its name, and reaches no file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import SchemeError
from bitpress.schemes.options import Options
from bitpress.schemes.registry import Scheme, Step
from bitpress.schemes.values import Layer, Statistic, StoredLayer


def check_layer(step: Step, hook: str, result: Any, layer: Layer) -> Layer:
    """What `quantize` or `pack` made of a layer; the layer itself where it returned nothing.

    Raises:
        SchemeError: it is no layer, or not one of as many rows and columns.
    """
    if result is None:
        return layer
    if not isinstance(result, Layer):
        raise SchemeError(f"{step.scheme}: {hook} returned {type(result).__name__}, not a Layer")

    _check_weight(step, hook, result, layer)
    num_rows = _count_rows(layer)
    for name, qparam in result.qparams.items():
        _require_tensor(step.scheme, hook, name, qparam)
        # One entry for each row of the weight, or for several.
        if num_rows is not None and qparam.ndim and len(qparam) > num_rows:
            raise _wrong_shape(step, hook, name, qparam, num_rows)
    for name, tensor in (("mask", result.mask), ("codes", result.codes)):
        if tensor is None:
            continue
        _require_tensor(step.scheme, hook, name, tensor)
        if num_rows is not None and (not tensor.ndim or len(tensor) != num_rows):
            raise _wrong_shape(step, hook, name, tensor, num_rows)
    return result


def _check_weight(step: Step, hook: str, result: Layer, layer: Layer) -> None:
    # A weight that is not computed yet is not computed for this check: perhaps nobody reads it.
    before = layer._weight
    after: Any = result._weight
    if after is before or callable(after):
        return
    _require_tensor(step.scheme, hook, "weight", after)
    if not isinstance(before, Tensor):
        return
    if after.shape != before.shape or after.dtype != torch.float32:
        raise SchemeError(
            f"{step.scheme}: {hook} made a weight of {list(after.shape)} {after.dtype} of "
            f"{list(before.shape)} torch.float32"
        )


def _count_rows(layer: Layer) -> int | None:
    if isinstance(layer._weight, Tensor):
        return len(layer._weight)
    return None if layer.codes is None else len(layer.codes)


def check_statistics(step: Step, result: Any, num_rows: int) -> Mapping[str, Statistic] | None:
    """What `observe` returned of a weight of so many rows.

    Raises:
        SchemeError: it is no mapping of statistics, or one of them lacks the rows it claims.
    """
    if result is None:
        return None
    if not isinstance(result, Mapping) or not all(
        isinstance(stat, Statistic) for stat in result.values()
    ):
        raise SchemeError(
            f"{step.scheme}: observe returned {type(result).__name__}, not Statistics by name"
        )
    for name, stat in result.items():
        _require_tensor(step.scheme, "observe", name, stat.value)
        if stat.rows and (not stat.value.ndim or len(stat.value) != num_rows):
            raise _wrong_shape(step, "observe", name, stat.value, num_rows)
    return result


def check_options(step: Step, result: Any) -> Options | None:
    """What `keep_codes` returned; raises SchemeError where these are not the scheme's options."""
    if result is None:
        return None
    if not isinstance(result, step.scheme.options_type):
        raise SchemeError(
            f"{step.scheme}: keep_codes returned {type(result).__name__}, not its options"
        )
    return result


def check_factors(step: Step, result: Any, width: int) -> Tensor:
    """What `rescale` returned: (width,) positive numbers.

    Raises:
        SchemeError: there are not as many as columns, or some are not positive.
    """
    factors = torch.as_tensor(result)
    if tuple(factors.shape) != (width,) or not (factors.isfinite() & (factors > 0)).all():
        raise SchemeError(
            f"{step.scheme}: rescale returned factors of shape {list(factors.shape)}, not {width} "
            "positive numbers"
        )
    return factors


def check_stored_layer(step: Step, result: Any) -> StoredLayer:
    """What `serialize` returned.

    Raises:
        SchemeError: it holds no tensors, or a config that is not JSON.
    """
    if not isinstance(result, StoredLayer):
        raise SchemeError(
            f"{step.scheme}: serialize returned {type(result).__name__}, not a StoredLayer"
        )
    _require_tensors(step.scheme, "serialize", result.tensors)
    try:
        json.dumps(result.config)
    except (TypeError, ValueError, RecursionError) as e:
        raise SchemeError(
            f"{step.scheme}: serialize returned a config that is not JSON ({e})"
        ) from None
    return result


def check_expanded(scheme: Scheme, result: Any) -> Mapping[str, Tensor]:
    """What `expand` returned; raises SchemeError where it holds no tensors."""
    _require_tensors(scheme, "expand", result)
    tensors: Mapping[str, Tensor] = result
    return tensors


def check_tensor(
    scheme: Scheme, hook: str, result: Any, shape: tuple[int, ...] | None, broadcast: bool = False
) -> Tensor:
    """What `dequantize`, `error_bound` or `quantize_activations` returned.

    Args:
        scheme: whose hook it was.
        hook: its name.
        result: what it returned.
        shape: what the result must have; None for any.
        broadcast: whether it may also be a shape that broadcasts to it.

    Raises:
        SchemeError: it is no tensor, or one of another shape.
    """
    _require_tensor(scheme, hook, "its result", result)
    if shape is None:
        return torch.as_tensor(result)
    try:
        result_shape = result.expand(shape).shape if broadcast else result.shape
        fits = tuple(result_shape) == tuple(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise SchemeError(
            f"{scheme}: {hook} returned the shape {list(result.shape)}, expected was {list(shape)}"
        )
    return torch.as_tensor(result)


def _require_tensors(scheme: Scheme, hook: str, values: Any) -> None:
    if not isinstance(values, Mapping) or not values:
        raise SchemeError(f"{scheme}: {hook} returned no tensors by name")
    for name, value in values.items():
        _require_tensor(scheme, hook, str(name), value)


def _require_tensor(scheme: Scheme, hook: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise SchemeError(f"{scheme}: {hook} made {name} a {type(value).__name__}, not a tensor")


def _wrong_shape(step: Step, hook: str, name: str, tensor: Tensor, num_rows: int) -> SchemeError:
    return SchemeError(
        f"{step.scheme}: {hook} made {name} of shape {list(tensor.shape)} for {num_rows} rows"
    )
