"""What `int8` stores, and how it smooths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bitpress.schemes import pipeline
from bitpress.schemes.hardware import find_device
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, StoredLayer
from bitpress_int8 import smoothing


def make_step(**options: Any) -> Step:
    return discover().get("int8").step(options)


def inputs(outlier: float = 1.0) -> torch.Tensor:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= outlier
    return x


def store(step: Step, x: torch.Tensor) -> tuple[Layer, StoredLayer]:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    stats = dict(
        step.call(
            "observe", inputs=x, reference=x, residual=None, output_gradient=None, weight=weight
        )
        or {}
    )
    layer = pipeline.quantize_whole(Layer("layer", weight, torch.bfloat16), [step], [stats])
    return layer, pipeline.serialize(pipeline.pack(layer, [step]), [step])


@pytest.mark.parametrize("outliers", ["max", "percentile", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_static_scales_cover_the_observed_range(symmetric: bool, outliers: str) -> None:
    x = inputs().abs() if not symmetric else inputs()
    _, stored = store(
        make_step(activations="static", symmetric_activations=symmetric, outliers=outliers), x
    )
    scale = stored.tensors["input_scale"].item()
    zero = stored.tensors["input_zero_point"].item() if not symmetric else 0
    low, high = (-128 - zero) * scale, (127 - zero) * scale
    share = ((x >= low - scale) & (x <= high + scale)).float().mean()
    assert share == 1 if outliers == "max" else share > 0.998
    codes = ((x / scale).round() + zero).clamp(-128, 127)
    assert ((codes - zero) * scale - x).square().mean().sqrt() < 0.02


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"weight", "weight_scale"}),
        ({"activations": "static"}, {"weight", "weight_scale", "input_scale"}),
        (
            {"activations": "static", "symmetric_activations": False},
            {"weight", "weight_scale", "input_scale", "input_zero_point"},
        ),
        ({"symmetric_activations": False}, {"weight", "weight_scale"}),
    ],
)
def test_only_what_a_loader_reads_is_stored(options: dict[str, Any], names: set[str]) -> None:
    _, stored = store(make_step(**options), inputs())
    assert set(stored.tensors) == names
    assert stored.config is not None
    assert stored.config["format"] == "int-quantized"
    assert stored.config["input_activations"]["dynamic"] is (options.get("activations") != "static")


def test_feedback_costs_the_output_less_than_rounding() -> None:
    x = inputs() @ torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    errors = {}
    for algorithm in ("gptq", "rtn"):
        layer, _ = store(make_step(algorithm=algorithm), x)
        weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.02
        errors[algorithm] = float((x @ (layer.weight - weight).T).norm())
    assert errors["gptq"] < 0.8 * errors["rtn"]


@pytest.mark.parametrize(
    ("device", "level"),
    [
        ("V100", "unsupported"),
        ("T4", "recommended"),
        ("A100", "recommended"),
        ("L40S", "supported"),
        ("H100", "supported"),
        ("B200", "degraded"),
        ("RTX 5090", "degraded"),
        ("MI250X", "supported"),
        ("CPU x86", "recommended"),
        ("CPU Arm", "recommended"),
        ("Google TPU", "supported"),
    ],
)
def test_hardware_is_judged_by_what_its_engine_runs(device: str, level: str) -> None:
    assert make_step().call("validate_hardware", hardware=find_device(device))[0].level == level


@pytest.mark.parametrize("static", [False, True])
def test_an_outlier_channel_is_smoothed_most(static: bool) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    stats = smoothing.observe_channels(inputs(outlier=60))
    factors = smoothing.factors(weight, stats, None, static)
    assert factors is not None
    assert factors.argmax() == 5
    assert factors[5] > 2 * factors[6:].max()


def test_an_even_input_is_left_alone_where_tokens_have_scales_of_their_own() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    assert smoothing.factors(weight, smoothing.observe_channels(inputs()), None, False) is None


def test_one_scale_for_all_tokens_smooths_an_even_input_only_as_far_as_its_largest_differ() -> None:
    weight, x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), inputs()
    factors = smoothing.factors(weight, smoothing.observe_channels(x), None, static=True)
    assert factors is not None
    largest = x.abs().amax(0)
    assert (x / factors).abs().amax() < 0.9 * largest.max()
    assert factors.max() / factors.min() < largest.max() / largest.min()


def test_two_thirds_is_the_strength_at_which_the_bound_of_the_inputs_error_is_least() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 64, generator=generator) * torch.rand(64, generator=generator).exp()
    x = inputs() * torch.randn(64, generator=generator).exp()
    stats = smoothing.observe_channels(x)
    powers, norms = x.double().pow(4).mean(0), weight.double().norm(dim=0)
    s = smoothing.factors(weight, stats, 2 / 3, static=False)
    assert s is not None
    assert s.min() > smoothing.MIN_FACTOR

    def bound(factors: torch.Tensor) -> float:
        return float((powers / factors**4).sum().sqrt() * (factors * norms).square().sum())

    least = bound(s.double())
    for _ in range(20):
        other = s.double() * (0.05 * torch.randn(64, generator=generator)).exp()
        assert bound(other) > least


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.9])
def test_a_strength_that_is_given_balances_inputs_against_columns(
    strength: float, static: bool
) -> None:
    weight, x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), inputs(outlier=60)
    x[:, 7] = 0
    s = smoothing.factors(weight, smoothing.observe_channels(x), strength, static)
    assert s is not None
    sizes = x.abs().amax(0) if static else x.double().pow(4).mean(0).pow(0.25).float()
    expected = sizes**strength / weight.norm(dim=0) ** (1 - strength)
    used = torch.arange(64) != 7
    ratios = s[used] / expected[used]
    assert torch.allclose(ratios, ratios[:1].expand_as(ratios), rtol=1e-4)
    assert s[7] == 1


def test_a_channel_that_was_hardly_used_is_not_made_large() -> None:
    weight, x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), inputs()
    x[:, 7] *= 1e-9
    s = smoothing.factors(weight, smoothing.observe_channels(x), 0.9, static=False)
    assert s is not None
    assert s[7] == s.min() == smoothing.MIN_FACTOR


def test_smoothing_lowers_the_true_error_of_integer_arithmetic() -> None:
    x, weight = (
        inputs(outlier=60),
        torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.02,
    )
    s = smoothing.factors(weight, smoothing.observe_channels(x), None, static=False)
    assert s is not None

    def quantize_int8(values: torch.Tensor) -> torch.Tensor:
        scale = values.abs().amax(1, keepdim=True) / 127.5
        return (values / scale).round().clamp(-128, 127) * scale

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((quantize_int8(a) @ quantize_int8(b).T - x @ weight.T).norm())

    assert error(x / s, weight * s) < 0.5 * error(x, weight)


@pytest.mark.parametrize(
    ("options", "is_calibrated"),
    [
        ({}, True),
        ({"algorithm": "rtn"}, False),
        ({"algorithm": "rtn", "activations": "static"}, True),
        ({"algorithm": "rtn", "smoothing": "0.5"}, True),
        ({"smoothing": "0"}, True),
    ],
)
def test_data_is_needed_exactly_where_something_looks_at_it(
    options: dict[str, Any], is_calibrated: bool
) -> None:
    assert make_step(**options).calibrated is is_calibrated
