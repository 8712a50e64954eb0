"""Inputs of the conformance tests: variants of a scheme's options, and difficult weights. Helpers
take a weight to stored bytes and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import attrs
import torch
from safetensors.torch import load, save
from torch import Tensor

from bitpress.errors import RecipeError, ShapeError
from bitpress.planning.recipe import from_scheme
from bitpress.schemes import pipeline, stored_layout
from bitpress.schemes.activation_quantizer import input_rounding
from bitpress.schemes.registry import Registry, Scheme, Step
from bitpress.schemes.values import Layer, Statistic, StoredLayer

WIDTHS = (256, 128, 64, 16, 8, 4, 2, 1)


def variants(name: str, settings: Sequence[str], registry: Registry) -> dict[str, Step]:
    """The scheme with its default options, and with each other listed value of one option.

    Returns:
        Steps, by "defaults" or by the option that was set ("algorithm=rtn").
    """
    scheme = registry.get(name)
    base = attrs.asdict(from_scheme(name, registry, settings).all_steps[0].options)
    found = {"defaults": scheme.step(base)}
    hints = get_type_hints(scheme.options_type)
    for field in attrs.fields(scheme.options_type):
        fixed = any(
            setting.partition("=")[0].rpartition(".")[2] == field.name for setting in settings
        )
        for choice in () if fixed else _choices(hints[field.name]):
            if choice != base[field.name] and (step := _step(scheme, {**base, field.name: choice})):
                found[f"{field.name}={choice}"] = step
    return found


def width(step: Step) -> int:
    """A width that the scheme takes."""
    for candidate in WIDTHS:
        if takes(step, candidate):
            return candidate
    raise AssertionError(f"quantize must take one of the widths {WIDTHS}, and refused all of them")


def takes(step: Step, columns: int) -> bool:
    """Whether the scheme takes a layer of that width."""
    try:
        stored_layout.describe(rows(step), columns, torch.bfloat16, (step,))
    except ShapeError:
        return False
    return True


def rows(step: Step) -> int:
    """A height of several row blocks."""
    return 4 * step.options.row_block


def weights(step: Step) -> dict[str, Tensor]:
    """Difficult weights (out, in) by their property; bfloat16 holds all of their numbers."""
    shape = (rows(step), width(step))
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    spread = torch.logspace(-30, 30, shape[0]).unsqueeze(1)  # (out, 1)
    zeros = torch.zeros(shape)
    found = {
        "normal": normal,
        "zero": zeros,
        "one zero row": normal.clone(),
        "huge": normal.sign() * torch.finfo(torch.bfloat16).max,
        "smallest": normal.sign() * 2.0**-133,
        "rows of unlike size": normal * spread,
        "one outlier": normal.clone(),
        "half zeros": normal * (normal > 0),
    }
    found["one zero row"][0] = 0
    found["one outlier"][-1, -1] = 100
    return {name: weight.bfloat16().float() for name, weight in found.items()}


def inputs(step: Step) -> Tensor:
    """(tokens, in) bfloat16 activations, with one channel that is larger than the others."""
    x = torch.randn(96, width(step), generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 20
    return x.bfloat16()


def observe(step: Step, weight: Tensor, batches: Sequence[Tensor]) -> Mapping[str, Statistic]:
    """The scheme's statistics of a weight and of batches of its inputs, merged."""
    merged: dict[str, Statistic] = {}
    for batch in batches if step.calibrated else ():
        pipeline.merge(merged, pipeline.observe(step, weight, batch, reference=batch))
    pipeline.merge(merged, pipeline.observe(step, weight))
    return merged


def quantize(
    step: Step,
    weight: Tensor,
    keep: Tensor | None = None,
    stats: Mapping[str, Statistic] | None = None,
) -> Layer:
    """The layer after the scheme's `quantize`."""
    stats = observe(step, weight, [inputs(step)]) if stats is None else stats
    return pipeline.quantize(Layer("layer", weight, torch.bfloat16, keep), [step], [stats])


def tiles(step: Step, weight: Tensor, stats: Mapping[str, Statistic], block: int) -> list[Layer]:
    """The layers of so many rows each, quantized by themselves."""
    rows = [slice(first, first + block) for first in range(0, len(weight), block)]
    return [
        quantize(step, weight[tile], stats={name: stat.of(tile) for name, stat in stats.items()})
        for tile in rows
    ]


def stored(step: Step, layer: Layer) -> StoredLayer:
    """The stored layer of a quantized layer, written to safetensors and JSON and read back."""
    found = pipeline.serialize(
        pipeline.join([pipeline.pack(layer, [step])], tuple(layer.weight.shape)), [step]
    )
    tensors = load(save({name: tensor.contiguous() for name, tensor in found.tensors.items()}))
    return StoredLayer(tensors, json.loads(json.dumps(found.config)))


def rounded(step: Step, inputs: Tensor, record: StoredLayer) -> Tensor:
    """The inputs (tokens, in) as a loader quantizes them with the stored tensors of the layer."""
    rounding = input_rounding(record.tensors, record.config, [step])
    assert rounding is not None
    return rounding(inputs)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, but for the sign of zero."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def snapshot(
    step: Step, layer: Layer, stats: Mapping[str, Statistic]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that hooks get, with a description of it."""
    yield "the weight", layer.weight
    if layer.mask is not None:
        yield "the mask", layer.mask
    yield from ((f"the statistic {name!r}", stat.value) for name, stat in stats.items())


def _choices(hint: Any) -> tuple[Any, ...]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    return (True, False) if hint is bool else ()


def _step(scheme: Scheme, values: Mapping[str, Any]) -> Step | None:
    """The scheme with these options, or None where the scheme refuses the combination."""
    try:
        return scheme.step(values)
    except RecipeError:
        return None
