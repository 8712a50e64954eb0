"""What hooks give back, looked at where it comes in: a plugin's fault is told with its name, and
reaches no file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitpress.errors import SchemeError
from bitpress.schemes.registry import Scheme, Step
from bitpress.schemes.values import Layer, Statistic, StoredLayer


def layer(step: Step, hook: str, found: Any, before: Layer) -> Layer:
    """What `quantize` or `pack` returned; what it was given, if it returned nothing.

    Raises:
        SchemeError: it is no layer, or not one of as many rows and columns.
    """
    if found is None:
        return before
    if not isinstance(found, Layer):
        raise SchemeError(f"{step.scheme}: {hook} returned {type(found).__name__}, not a Layer")
    # one that is not computed yet stays so: nobody may want it
    given = before._weight
    rows = (
        len(given)
        if isinstance(given, Tensor)
        else None
        if before.codes is None
        else len(before.codes)
    )
    if found._weight is not given and not callable(found._weight):
        _tensor(step.scheme, hook, "weight", found._weight)
        if isinstance(given, Tensor) and (found._weight.shape, found._weight.dtype) != (
            given.shape,
            torch.float32,
        ):
            now = f"{list(found._weight.shape)} {found._weight.dtype}"
            raise SchemeError(
                f"{step.scheme}: {hook} made a weight of {now} of {list(given.shape)} torch.float32"
            )
    for name, part in found.qparams.items():
        _tensor(step.scheme, hook, name, part)
        # a row for each of the weight's, or for several
        if rows is not None and part.ndim and len(part) > rows:
            raise SchemeError(
                f"{step.scheme}: {hook} made {name} of shape {list(part.shape)} for {rows} rows"
            )
    for name, tensor in (("mask", found.mask), ("codes", found.codes)):
        if tensor is not None:
            _tensor(step.scheme, hook, name, tensor)
            if rows is not None and (not tensor.ndim or len(tensor) != rows):
                raise SchemeError(
                    f"{step.scheme}: {hook} made {name} of shape {list(tensor.shape)} for {rows} "
                    "rows"
                )
    return found


def stats(step: Step, found: Any, rows: int) -> Mapping[str, Statistic] | None:
    """What `observe` returned."""
    if found is None:
        return None
    if not isinstance(found, Mapping) or not all(
        isinstance(stat, Statistic) for stat in found.values()
    ):
        raise SchemeError(
            f"{step.scheme}: observe returned {type(found).__name__}, not Statistics by name"
        )
    for name, stat in found.items():
        _tensor(step.scheme, "observe", name, stat.value)
        if stat.rows and (not stat.value.ndim or len(stat.value) != rows):
            raise SchemeError(
                f"{step.scheme}: observe made {name} of shape {list(stat.value.shape)} for {rows} "
                "rows"
            )
    return found


def factors(step: Step, found: Any, width: int) -> Tensor:
    """What `rescale` returned."""
    tensor = torch.as_tensor(found)
    if tuple(tensor.shape) != (width,) or not (tensor.isfinite() & (tensor > 0)).all():
        raise SchemeError(
            f"{step.scheme}: rescale returned factors of shape {list(tensor.shape)}, not {width} "
            "positive numbers"
        )
    return tensor


def record(step: Step, found: Any) -> StoredLayer:
    """What `serialize` returned."""
    if not isinstance(found, StoredLayer):
        raise SchemeError(
            f"{step.scheme}: serialize returned {type(found).__name__}, not a StoredLayer"
        )
    if not isinstance(found.tensors, Mapping) or not found.tensors:
        raise SchemeError(f"{step.scheme}: serialize returned a StoredLayer without tensors")
    for name, tensor in found.tensors.items():
        _tensor(step.scheme, "serialize", str(name), tensor)
    try:
        json.dumps(found.config)
    except (TypeError, ValueError, RecursionError) as e:
        raise SchemeError(
            f"{step.scheme}: serialize returned a config that is not JSON ({e})"
        ) from None
    return found


def restored(
    scheme: Scheme, hook: str, found: Any, shape: tuple[int, ...] | None, broadcast: bool = False
) -> Tensor:
    """What `dequantize`, `error_bound` or `quantize_activations` returned: of a shape, if one is
    given, or of one that broadcasts to it.
    """
    _tensor(scheme, hook, "its result", found)
    try:
        fits = shape is None or tuple(
            found.expand(shape).shape if broadcast else found.shape
        ) == tuple(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise SchemeError(
            f"{scheme}: {hook} returned the shape {list(found.shape)}, expected was "
            f"{list(shape or ())}"
        )
    return torch.as_tensor(found)


def _tensor(scheme: Scheme, hook: str, name: str, found: Any) -> None:
    if not isinstance(found, Tensor):
        raise SchemeError(f"{scheme}: {hook} made {name} a {type(found).__name__}, not a tensor")
