"""Laws of what a run does with a scheme: lists it, and gives it stacks, layers that saw no token,
and columns to rescale.
"""

from __future__ import annotations

import attrs
import pytest
import torch

from bitpress.conformance import trial
from bitpress.errors import RecipeError, SchemeError
from bitpress.schemes import pipeline, stored_layout
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Layer


def test_a_scheme_says_what_it_is_and_what_may_be_set(step: Step) -> None:
    assert step.scheme.summary, (
        "the plugin needs a docstring: its first line is what `bitpress schemes` shows"
    )
    for field in attrs.fields(step.scheme.options_type):
        assert field.metadata.get("help"), (
            f"the option {field.name!r} needs a line of help: bitpress.option(default, help)"
        )
    layer = trial.quantize(step, trial.weights(step)["normal"])
    # Weights in the model's own dtype are no codes.
    if layer.codes is not None and layer.codes.dtype != layer.dtype:
        assert step.options.bits, (
            "`Options.bits` must say how many bits a code takes, since codes are stored"
        )


def test_a_level_of_effort_changes_how_weights_are_found_and_not_how_they_are_stored(
    step: Step,
) -> None:
    defaults = step.scheme.step().options
    explicit = {
        name: value
        for name, value in attrs.asdict(step.options).items()
        if value != getattr(defaults, name)
    }
    expected = _describe_stored(step, step)
    for level, options in step.scheme.efforts.items():
        try:
            level_step = step.scheme.step({**options, **explicit})
        except RecipeError as e:
            pytest.fail(f"EFFORTS[{level!r}] must go with every option that a user may set ({e})")
        assert _describe_stored(level_step, step) == expected, (
            f"EFFORTS[{level!r}] changes what is stored: tensors, shapes and config must be those "
            "of the default options"
        )
        if level == "low" and level_step.calibrated:
            assert step.calibrated, "EFFORTS['low'] must not need data where the defaults need none"


def _describe_stored(step: Step, default_step: Step) -> tuple[object, object]:
    """Dtypes and shapes of what a step stores, and its config, of a layer that the default one
    takes.
    """
    rows, width = trial.height(default_step), trial.width(default_step)
    stored = stored_layout.describe(rows, width, torch.bfloat16, (step,))
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in stored.tensors.items()}
    return specs, stored.config


def test_members_of_a_stack_are_stored_as_their_rows_of_it(step: Step) -> None:
    trial.require_hook(step, "dequantize")
    layer = trial.quantize(step, trial.weights(step)["normal"])
    half = len(layer.weight) // 2
    members = pipeline.split(layer, [half, half])
    advice = (
        "the leading axis of `codes` and `qparams` must follow the rows: an entry for each row, or "
        "each `row_block` of them"
    )
    for member, rows in zip(members, layer.weight.chunk(2), strict=True):
        try:
            stored = trial.store(step, member)
            weight = pipeline.dequantize(stored.tensors, stored.config, [step])
        except SchemeError as e:
            pytest.fail(f"{advice} ({e})")
        assert trial.are_equal(weight, rows), advice


def test_a_layer_that_never_saw_a_token_is_rounded(step: Step) -> None:
    weight = trial.weights(step)["normal"]
    if not step.calibrated:
        pytest.skip("these options need no data")
    quantized = trial.quantize(step, weight, stats=trial.observe(step, weight, [])).weight
    assert quantized.isfinite().all(), (
        "`quantize` must round to nearest where `stats` holds nothing of inputs"
    )
    assert (quantized - weight).norm() < weight.norm(), (
        "`quantize` must round to nearest where `stats` holds nothing of inputs"
    )


@pytest.mark.parametrize("kind", ["normal", "zero"])
def test_factors_for_columns_are_positive(step: Step, kind: str) -> None:
    trial.require_hook(step, "rescale")
    if not step.rescales:
        pytest.skip("these options leave columns alone")
    weight, inputs = trial.weights(step)[kind], trial.inputs(step)
    # A channel that is never used.
    inputs[:, -1] = 0
    factors = step.call(
        "rescale",
        layer=Layer("layer", weight, torch.bfloat16),
        stats=trial.observe(step, weight, [inputs]),
    )
    if factors is None:
        pytest.skip("the scheme leaves these columns alone")
    assert factors.shape == weight.shape[1:], (
        "`rescale` must return one factor for each column, or None"
    )
    assert (factors.isfinite() & (factors > 0)).all(), (
        "`rescale` must return finite positive factors, for unused channels too"
    )
