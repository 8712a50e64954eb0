"""The laws of one layer: what each hook promises for any weight and any inputs.

A failure's message says what the scheme's author must change.
"""

from __future__ import annotations

import functools
import json
import re
from typing import get_args, get_type_hints

import pytest
import torch

from bitpress.checkpoint.reader import NAMES
from bitpress.conformance import trial
from bitpress.errors import BitpressError, ShapeError
from bitpress.output.layer_proof import (
    find_error_faults,
    max_error,
    measure_stored,
    prove_stored,
)
from bitpress.schemes import pipeline, stored_layout
from bitpress.schemes.hardware import DEVICES, Hardware
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Finding, Layer, Statistic

LEVELS = get_args(get_type_hints(Finding)["level"])

# Difficult weights, as `trial.weights` draws them.
WEIGHTS = (
    "normal",
    "zero",
    "one zero row",
    "huge",
    "smallest",
    "rows of unlike size",
    "one outlier",
    "half zeros",
)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_stored_bytes_decode_to_the_effective_weight(step: Step, kind: str) -> None:
    trial.require_hook(step, "dequantize")
    layer = trial.quantize(step, trial.weights(step)[kind])
    stored = trial.store(step, layer)
    weight = pipeline.dequantize(stored.tensors, stored.config, [step])
    assert weight.dtype == torch.float32, "`dequantize` must return float32"
    assert trial.are_equal(weight, layer.weight), (
        "`dequantize` of what is stored must be the weight that `quantize` returned, exactly"
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_effective_weight_is_finite_and_keeps_its_shape(step: Step, kind: str) -> None:
    weight = trial.weights(step)[kind]
    quantized = trial.quantize(step, weight).weight
    assert quantized.shape == weight.shape, "`quantize` must not change the weight's shape"
    assert quantized.dtype == torch.float32, "`quantize` must return a float32 weight"
    assert quantized.isfinite().all(), (
        f"`quantize` made NaN or infinity of the finite weight {kind!r}: bound its scales"
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_scales_are_finite_and_not_zero(step: Step, kind: str) -> None:
    stored = trial.store(step, trial.quantize(step, trial.weights(step)[kind]))
    for name, tensor in stored.tensors.items():
        if "scale" in name and tensor.is_floating_point():
            scale = tensor.float()
            assert (scale.isfinite() & (scale > 0)).all(), (
                f"{name} must be finite and positive for the weight {kind!r}"
            )


def test_packing_changes_bits_and_not_the_weight(step: Step) -> None:
    layer = trial.quantize(step, trial.weights(step)["normal"])
    assert trial.are_equal(pipeline.pack(layer, [step]).weight, layer.weight), (
        "`pack` must leave `weight` as it is"
    )


def test_zeros_stay_zero(step: Step) -> None:
    weight = trial.weights(step)["half zeros"]
    assert (trial.quantize(step, weight).weight[weight == 0] == 0).all(), (
        "`quantize` must leave zeros zero"
    )


def test_masked_positions_stay_masked(step: Step) -> None:
    weight = trial.weights(step)["normal"]
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    quantized = trial.quantize(step, weight * mask, mask)
    assert (quantized.weight[~mask] == 0).all(), (
        "`quantize` must leave the weight zero where `layer.mask` is False"
    )
    assert quantized.mask is not None, (
        "`quantize` must hand `mask` on: return attrs.evolve(layer, ...)"
    )
    assert not (quantized.mask & ~mask).any(), (
        "`quantize` must not allow again what `layer.mask` forbids"
    )


def test_codes_of_a_source_that_are_kept_are_stored_to_the_bit(step: Step) -> None:
    trial.require_hook(step, "keep_codes")
    for form in trial.code_forms(step):
        kept = trial.keep_codes(step, form)
        if kept is None:
            continue
        coded = trial.coded_weight(step, form)
        weight = coded.dequantize()
        shape = tuple(weight.shape)
        assert stored_layout.describe(*shape, torch.bfloat16, (kept,)).tensors.keys() == (
            stored_layout.describe(*shape, torch.bfloat16, (step,)).tensors.keys()
        ), "`keep_codes` must return options with which the same is stored"
        stats = trial.observe(kept, weight, [trial.inputs(kept)])
        layer = Layer("layer", weight, torch.bfloat16, quantized=coded)
        assert trial.are_equal(pipeline.quantize(layer, [kept], [stats]).weight, weight), (
            f"`quantize` with the options of `keep_codes` must keep the weight of {form}: take "
            "`layer.quantized`, or return None"
        )


def test_rows_do_not_know_their_neighbors(step: Step) -> None:
    weight, row_block = trial.weights(step)["rows of unlike size"], step.options.row_block
    stats = trial.observe(step, weight, [trial.inputs(step)])
    whole = trial.quantize(step, weight, stats=stats)
    tiles = trial.quantize_tiles(step, weight, stats, row_block)
    advice = (
        f"declare how many rows share numbers in `Options.row_block` (now {row_block}), or gather "
        "them in `observe`"
    )
    assert trial.are_equal(torch.cat([tile.weight for tile in tiles]), whole.weight), (
        f"rows depend on other rows: {advice}"
    )
    packed = [pipeline.pack(tile, [step]) for tile in tiles]
    tiled = pipeline.serialize(pipeline.join(packed, tuple(weight.shape)), [step])
    for name, tensor in trial.store(step, whole).tensors.items():
        assert torch.equal(trial.as_bytes(tiled.tensors[name]), trial.as_bytes(tensor)), (
            f"{name} depends on how rows are tiled: {advice}"
        )


def test_hooks_leave_their_arguments_untouched(step: Step) -> None:
    weight, inputs = trial.weights(step)["one outlier"], trial.inputs(step)
    stats = trial.observe(step, weight, [inputs])
    layer = Layer("layer", weight, torch.bfloat16, torch.ones_like(weight, dtype=torch.bool))
    before = {what: tensor.clone() for what, tensor in trial.hook_arguments(layer, stats)}
    quantized = pipeline.quantize(layer, [step], [stats])
    quantized_before = quantized.weight.clone()
    trial.store(step, quantized)
    assert torch.equal(inputs, trial.inputs(step)), "`observe` changed its inputs: copy them first"
    for what, tensor in trial.hook_arguments(layer, stats):
        assert torch.equal(tensor, before[what]), (
            f"a hook changed {what} it was given: return new tensors"
        )
    assert torch.equal(quantized.weight, quantized_before), (
        "`pack` or `serialize` changed the layer it was given: return new tensors"
    )


def test_the_same_input_gives_the_same_bits(step: Step) -> None:
    weight = trial.weights(step)["normal"]
    first, second = (trial.store(step, trial.quantize(step, weight)) for _ in range(2))
    assert first.config == second.config, (
        "the config fragment differs between two runs on one input: hooks must be pure functions"
    )
    for name, tensor in first.tensors.items():
        assert torch.equal(trial.as_bytes(tensor), trial.as_bytes(second.tensors[name])), (
            f"{name} differs between two runs on one input: hooks must be pure functions"
        )


def test_two_half_batches_observed_equal_the_whole(step: Step) -> None:
    trial.require_hook(step, "observe")
    weight, inputs = trial.weights(step)["normal"], trial.inputs(step)
    whole = trial.observe(step, weight, [inputs])
    halves = trial.observe(step, weight, list(inputs.chunk(2)))
    if not whole:
        pytest.skip("these options need no statistics")
    for name, stat in whole.items():
        advice = f"the statistic {name!r} must be a raw sum or maximum over tokens, never a mean"
        torch.testing.assert_close(halves[name].value, stat.value, rtol=1e-5, atol=1e-6, msg=advice)
        assert stat.value.dtype == torch.float32, f"the statistic {name!r} must be float32"


def test_two_half_batches_of_gradients_observed_equal_the_whole(step: Step) -> None:
    if not pipeline.takes_gradient(step):
        pytest.skip("these options take no statistics of gradients")
    weight = trial.weights(step)["normal"]
    gradient = torch.randn(64, len(weight), generator=torch.Generator().manual_seed(0))
    whole = pipeline.observe_gradient(step, weight, gradient) or {}
    halves: dict[str, Statistic] = {}
    for half in gradient.chunk(2):
        pipeline.merge(halves, pipeline.observe_gradient(step, weight, half))
    for name, stat in whole.items():
        advice = f"the statistic {name!r} must be a raw sum or maximum over tokens, never a mean"
        torch.testing.assert_close(halves[name].value, stat.value, rtol=1e-4, atol=1e-4, msg=advice)
        assert stat.value.dtype == torch.float32, f"the statistic {name!r} must be float32"


def test_a_width_that_does_not_divide_is_refused_naming_one_that_does(step: Step) -> None:
    refused = [width for width in (1, 3, 17, 100, 130) if not trial.takes_width(step, width)]
    if not refused:
        pytest.skip("the scheme takes any width")
    for width in refused:
        with pytest.raises(ShapeError) as refusal:
            stored_layout.describe(trial.height(step), width, torch.bfloat16, (step,))
        named = {int(digits) for digits in re.findall(r"\d+", str(refusal.value))} - {width}
        fits = any(0 < n <= 1 << 16 and trial.takes_width(step, n) for n in named)
        assert fits, f"the refusal of width {width} must name a width that fits: {refusal.value}"


def test_shapes_and_dtypes_follow_from_shapes_and_options(step: Step) -> None:
    weight = trial.weights(step)["one zero row"]
    stored = trial.store(step, trial.quantize(step, weight))
    planned = stored_layout.describe(*weight.shape, torch.bfloat16, (step,))
    assert stored.config == json.loads(json.dumps(planned.config)), (
        "the config fragment must not depend on numbers"
    )
    stored_specs, planned_specs = (
        {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        for tensors in (stored.tensors, planned.tensors)
    )
    assert stored_specs == planned_specs, (
        "what is stored must follow from shapes and options, not from numbers"
    )


def test_the_config_is_json(step: Step) -> None:
    weight = trial.weights(step)["normal"]
    config = stored_layout.describe(*weight.shape, torch.bfloat16, (step,)).config
    if config is None:
        pytest.skip("the scheme stores plain weights")
    assert json.loads(json.dumps(config)) == config, (
        "the config fragment must hold JSON values only (lists, not tuples)"
    )
    of_zeros = config.get("sparsity_config", {})
    if of_zeros:
        assert isinstance(of_zeros.get("sparsity_structure"), str), (
            "the `sparsity_config` of a fragment must name its `sparsity_structure`"
        )
    described = config if "weights" in config else of_zeros
    assert isinstance(described.get("format"), str), "the config fragment must name its `format`"
    assert isinstance(config.get("weights"), dict) or of_zeros, (
        "the config fragment must describe its `weights`, or have a `sparsity_config`"
    )


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_known_device_gets_an_answer(step: Step, device: Hardware) -> None:
    findings = step.call("validate_hardware", hardware=device)
    assert findings, f"`validate_hardware` must say something of {device.name}"
    for finding in findings:
        assert isinstance(finding, Finding), "`validate_hardware` must return Findings"
        assert finding.level in LEVELS, (
            f"the level {finding.level!r} is not one of {', '.join(LEVELS)}"
        )
        assert finding.text, "a Finding needs a text"
        assert "\n" not in finding.text, "a Finding's text is one line"


@pytest.mark.parametrize("cut", [None, "rows", "columns"])
def test_shapes_that_divide_by_everything_are_not_refused(step: Step, cut: str | None) -> None:
    trial.require_hook(step, "validate_shape")
    ask = functools.partial(step.call, "validate_shape", shape=(4096, 4096), cut=cut)
    findings = [finding for device in DEVICES for finding in ask(hardware=device) or ()]
    assert all(isinstance(finding, Finding) for finding in findings), (
        "`validate_shape` must return Findings"
    )
    assert not [f for f in findings if f.level == "unsupported"], (
        "`validate_shape` refuses 4096 x 4096, which divides by everything"
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_its_own_check_passes_what_quantize_returned(step: Step, kind: str) -> None:
    trial.require_hook(step, "validate_weight")
    quantized = trial.quantize(step, trial.weights(step)[kind])
    faults = list(pipeline.validate_weight(quantized.weight, [step]))
    assert not faults, (
        f"`validate_weight` finds fault with what `quantize` returned for the weight {kind!r}: "
        f"{faults[0]}"
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_lie_within_the_bound_of_the_source(step: Step, kind: str) -> None:
    trial.require_hook(step, "error_bound")
    weight = trial.weights(step)[kind]
    layer = trial.quantize(step, weight)
    stored = trial.store(step, layer)
    bound = pipeline.error_bound(stored, [step], layer.weight)
    if bound is None:
        pytest.skip("no bound for these options")
    assert ((layer.weight - weight).abs() <= bound).all(), (
        "`error_bound` is smaller than what `quantize` moved a weight by: return more, or None"
    )


def test_a_damage_to_what_is_stored_is_found(step: Step) -> None:
    trial.require_hook(step, "dequantize")
    weight, steps = trial.weights(step)["normal"], (step,)
    layer = trial.quantize(step, weight)
    stored = trial.store(step, layer)
    plain = trial.quantize(step, weight, stats=trial.observe(step, weight, []))
    sound = prove_stored(stored, steps, layer.weight, weight)
    rounding = prove_stored(trial.store(step, plain), steps, plain.weight, weight)
    assert not sound.faults
    # without data, plain rounding is all that a scheme does
    rounding_error = rounding.error if step.calibrated else None
    assert sound.error <= max_error(rounding_error), (
        f"`quantize` moves weights by {sound.error:.3f} of their norm, and plain rounding by "
        f"{rounding.error:.3f}: a run would take that for damage"
    )
    for damage, damaged in trial.damages(step, stored):
        try:
            measured = measure_stored(damaged, steps, (weight.shape[0], weight.shape[1]), weight)
        except BitpressError:
            continue
        is_found = measured.faults or any(find_error_faults(measured, sound.error, rounding_error))
        # a bit may stand for nothing, or for so little that the error stays what it was
        decoded = pipeline.dequantize(damaged.tensors, damaged.config, steps)
        is_small = (decoded - layer.weight).norm() <= 1e-4 * layer.weight.norm()
        assert is_found or is_small, (
            f"where {damage}, no check finds it: `dequantize` must compute with all that is stored"
        )


@pytest.mark.parametrize("attack", ["zero", "reversed", "another layer's"])
def test_destroyed_codes_are_found_without_a_record_of_the_error(step: Step, attack: str) -> None:
    trial.require_hook(step, "dequantize")
    weight = trial.weights(step)["normal"]
    stored = trial.store(step, trial.quantize(step, weight))
    for damage, damaged in trial.damages(step, stored):
        if not damage.endswith(attack):
            continue
        try:
            measured = measure_stored(damaged, (step,), (weight.shape[0], weight.shape[1]), weight)
        except BitpressError:
            continue
        assert measured.faults or any(find_error_faults(measured, None, None)), (
            f"where {damage}, nothing finds it: `dequantize` must compute with every code"
        )


def test_what_the_config_says_of_activations_can_be_computed(step: Step) -> None:
    layer = trial.quantize(step, trial.weights(step)["normal"])
    stored = trial.store(step, layer)
    if not (stored.config or {}).get("input_activations"):
        pytest.skip("activations stay as they are")
    trial.require_hook(
        step,
        "quantize_activations",
        "the config names `input_activations`, and `eval` must know what they become",
    )
    inputs = trial.inputs(step).float()
    inputs[5] = 0
    before, quantized = inputs.clone(), trial.quantize_activations(step, inputs, stored)
    assert torch.equal(inputs, before), (
        "`quantize_activations` changed the inputs it was given: return a new tensor"
    )
    assert (quantized.dtype, quantized.shape) == (torch.float32, inputs.shape), (
        "`quantize_activations` must return float32 of the inputs' shape"
    )
    assert quantized.isfinite().all(), (
        "`quantize_activations` made NaN or infinity of finite inputs"
    )
    assert (quantized[5] == 0).all(), "`quantize_activations` must leave a token of zeros zero"
    assert (quantized - inputs).norm() < inputs.norm() / 2, (
        "`quantize_activations` must return numbers near to the inputs"
    )
    by_token = [trial.quantize_activations(step, token, stored) for token in torch.split(inputs, 1)]
    assert torch.equal(torch.cat(by_token), quantized), (
        "`quantize_activations` must not mix tokens: an engine batches them as it likes"
    )
