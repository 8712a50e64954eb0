"""Inputs of the conformance tests: variants of a scheme's options, and difficult weights. Helpers
take a weight to stored bytes and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import attrs
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from bitpress.errors import RecipeError, ShapeError
from bitpress.numerics import decode_e2m1
from bitpress.planning.recipe import RecipeChanges, from_scheme
from bitpress.schemes import hook_results, pipeline, stored_layout
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.registry import Registry, Scheme, Step
from bitpress.schemes.values import CodeForm, Layer, QuantizedTensor, Statistic, StoredLayer

# Widths of a layer, of which every scheme must take one.
WIDTHS = (256, 128, 64, 16, 8, 4, 2, 1)


def require_hook(step: Step, hook: str, reason: str | None = None) -> None:
    """Skip the test of a hook that the scheme lacks; fail it where there is a reason to have it."""
    if step.scheme.has(hook):
        return
    if reason is None:
        pytest.skip(f"the scheme has no `{hook}` hook")
    pytest.fail(f"the scheme has no `{hook}` hook: {reason}")


def variants(name: str, settings: Sequence[str], registry: Registry) -> dict[str, Step]:
    """The scheme with its default options, and with each other listed value of one option.

    Returns:
        Steps, by "defaults" or by the option that was set ("algorithm=rtn").
    """
    scheme = registry.get(name)
    defaults = attrs.asdict(
        from_scheme(name, registry, RecipeChanges(settings)).all_steps[0].options
    )
    steps = {"defaults": scheme.step(defaults)}
    types_by_name = get_type_hints(scheme.options_type)
    # "fp8.weights=tensor", or "weights=tensor"
    fixed = {setting.partition("=")[0].rpartition(".")[2] for setting in settings}
    for field in attrs.fields(scheme.options_type):
        if field.name in fixed:
            continue
        for choice in _choices(types_by_name[field.name]):
            if choice == defaults[field.name]:
                continue
            step = _make_step(scheme, {**defaults, field.name: choice})
            if step is not None:
                steps[f"{field.name}={choice}"] = step
    return steps


def width(step: Step) -> int:
    """A width that the scheme takes."""
    for candidate in WIDTHS:
        if takes_width(step, candidate):
            return candidate
    raise AssertionError(f"quantize must take one of the widths {WIDTHS}, and refused all of them")


def takes_width(step: Step, columns: int) -> bool:
    """Whether the scheme takes a layer of that width."""
    try:
        stored_layout.describe(height(step), columns, torch.bfloat16, (step,))
    except ShapeError:
        return False
    return True


def height(step: Step) -> int:
    """A number of rows of several row blocks."""
    return 4 * step.options.row_block


def weights(step: Step) -> dict[str, Tensor]:
    """Difficult weights (out, in) by their property; bfloat16 holds all of their numbers."""
    shape = (height(step), width(step))
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    spread = torch.logspace(-30, 30, shape[0]).unsqueeze(1)  # (out, 1)
    zeros = torch.zeros(shape)
    by_property = {
        "normal": normal,
        "zero": zeros,
        "one zero row": normal.clone(),
        "huge": normal.sign() * torch.finfo(torch.bfloat16).max,
        "smallest": normal.sign() * 2.0**-133,
        "rows of unlike size": normal * spread,
        "one outlier": normal.clone(),
        "half zeros": normal * (normal > 0),
    }
    by_property["one zero row"][0] = 0
    by_property["one outlier"][-1, -1] = 100
    return {name: weight.bfloat16().float() for name, weight in by_property.items()}


def code_forms(step: Step) -> Iterator[CodeForm]:
    """Forms in which sources hold codes, that a layer of the step's width may have."""
    columns = width(step)
    sizes = sorted({size for size in (16, 32, 64, 128, columns) if columns % size == 0})
    for size in sizes:
        for bits in (4, 8):
            for has_zero_points in (False, True):
                yield CodeForm("integer", bits, (1, size), torch.bfloat16, has_zero_points)
            yield CodeForm("float", bits, (1, size), torch.float8_e8m0fnu)
            yield CodeForm("float", bits, (1, size), torch.float32)
    yield CodeForm("float", 8, (128, 128), torch.float32)


def keep_codes(step: Step, form: CodeForm) -> Step | None:
    """The step with the options by which it keeps codes of a form; None where it does not."""
    shape = (height(step), width(step))
    result = step.call("keep_codes", form=form, shape=shape, dtype=torch.bfloat16)
    options = hook_results.check_options(step, result)
    return None if options is None else Step(step.scheme, options)


def coded_weight(step: Step, form: CodeForm) -> QuantizedTensor:
    """A weight of a form, all of whose codes are there."""
    rows, columns = height(step), width(step)
    generator = torch.Generator().manual_seed(3)

    def draw(count: int, *shape: int) -> Tensor:
        return torch.randint(0, count, shape, generator=generator)

    # tiles of rows share scales
    num_scales = -(-rows // form.group[0])
    scale = torch.exp2(draw(6, num_scales, columns // form.group[1]).float() - 10)
    if form.scale_dtype != torch.float8_e8m0fnu:
        scale *= 1 + draw(128, *scale.shape) / 128
    scale = scale.repeat_interleave(form.group[0], 0)[:rows]
    codes = draw(1 << form.bits, rows, columns)
    if form.numbers == "integer":
        half = 1 << form.bits - 1
        zeros = (draw(1 << form.bits, *scale.shape) - half).to(torch.int8)
        return QuantizedTensor(
            (codes - half).to(torch.int8), scale, zeros if form.has_zero_points else None
        )
    if form.bits == 4:
        return QuantizedTensor(decode_e2m1(codes.to(torch.uint8)), scale)
    # without the two codes that are no numbers
    numbers = codes.clamp(1, 254) - codes.eq(127).long()
    return QuantizedTensor(numbers.to(torch.uint8).view(torch.float8_e4m3fn), scale)


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
    mask: Tensor | None = None,
    stats: Mapping[str, Statistic] | None = None,
) -> Layer:
    """The layer after the scheme's `quantize`; without statistics, with those of `inputs`."""
    if stats is None:
        stats = observe(step, weight, [inputs(step)])
    return pipeline.quantize(Layer("layer", weight, torch.bfloat16, mask), [step], [stats])


def quantize_tiles(
    step: Step, weight: Tensor, stats: Mapping[str, Statistic], num_rows: int
) -> list[Layer]:
    """The row tiles of a weight, each with so many rows and quantized by itself."""
    tiles = []
    for first in range(0, len(weight), num_rows):
        rows = slice(first, first + num_rows)
        tile_stats = {name: stat.of(rows) for name, stat in stats.items()}
        tiles.append(quantize(step, weight[rows], stats=tile_stats))
    return tiles


def store(step: Step, layer: Layer) -> StoredLayer:
    """The stored layer of a quantized layer, written to safetensors and JSON and read back."""
    joined = pipeline.join([pipeline.pack(layer, [step])], tuple(layer.weight.shape))
    stored = pipeline.serialize(joined, [step])
    tensors = load(save({name: tensor.contiguous() for name, tensor in stored.tensors.items()}))
    return StoredLayer(tensors, json.loads(json.dumps(stored.config)))


def damages(step: Step, stored: StoredLayer) -> Iterator[tuple[str, StoredLayer]]:
    """A stored layer with its codes destroyed, or with a bit of a scale flipped, by what was done.

    Codes are what most bytes of it are.
    """
    codes = max(stored.tensors, key=lambda name: stored.tensors[name].nbytes)
    numbers = as_bytes(stored.tensors[codes])
    other = store(step, quantize(step, weights(step)["normal"].flip(0)))
    destroyed = {
        f"{codes} is zero": torch.zeros_like(numbers),
        f"{codes} is reversed": numbers.flip(0),
        f"{codes} is another layer's": as_bytes(other.tensors[codes]),
    }
    for name, damaged in destroyed.items():
        yield name, _with_bytes(stored, codes, damaged)
    yield "all of it is another layer's", other
    for suffix, tensor in stored.tensors.items():
        if "scale" not in suffix or suffix.startswith("input_"):
            continue
        for bit in range(8 * tensor.element_size()):
            flipped = as_bytes(tensor).clone()
            flipped[bit // 8] ^= 1 << bit % 8
            yield f"bit {bit} of {suffix} is flipped", _with_bytes(stored, suffix, flipped)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, as uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _with_bytes(stored: StoredLayer, suffix: str, numbers: Tensor) -> StoredLayer:
    """A stored layer with other bytes in one of its tensors."""
    tensor = stored.tensors[suffix]
    changed = numbers.view(tensor.dtype).reshape(tensor.shape)
    return StoredLayer({**stored.tensors, suffix: changed}, stored.config)


def quantize_activations(step: Step, inputs: Tensor, stored: StoredLayer) -> Tensor:
    """The inputs (tokens, in) as a loader quantizes them with the stored tensors of the layer."""
    quantizer = find_activation_quantizer(stored.tensors, stored.config, [step])
    assert quantizer is not None
    return quantizer(inputs)


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, but for the sign of zero."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


def hook_arguments(layer: Layer, stats: Mapping[str, Statistic]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that hooks get, with a description of it."""
    yield "the weight", layer.weight
    if layer.mask is not None:
        yield "the mask", layer.mask
    for name, stat in stats.items():
        yield f"the statistic {name!r}", stat.value


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return (True, False) if annotation is bool else ()


def _make_step(scheme: Scheme, values: Mapping[str, Any]) -> Step | None:
    """The scheme with these options, or None where the scheme refuses the combination."""
    try:
        return scheme.step(values)
    except RecipeError:
        return None
