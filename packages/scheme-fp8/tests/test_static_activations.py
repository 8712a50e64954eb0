"""Activation scales that `fp8` finds beforehand: what is stored, what outliers do, and when nothing
was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bitpress.schemes import pipeline
from bitpress.schemes.hardware import find_device
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, StoredLayer

SCALES = ["max", "percentile", "mse"]


def make_step(**options: Any) -> Step:
    return discover().get("fp8").step({"activations": "static"} | options)


def inputs(outlier: float = 4.0, tokens: int = 4000) -> torch.Tensor:
    """(tokens, in) bfloat16, ordinary numbers and one that is larger."""
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(0)).clamp(-3.9, 3.9)
    x[17, 3] = -outlier
    return x.bfloat16()


def store(step: Step, batches: Sequence[torch.Tensor]) -> StoredLayer:
    weight, stats = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), {}
    for batch in batches:
        pipeline.merge(
            stats,
            step.call(
                "observe",
                inputs=batch,
                reference=None,
                residual=None,
                output_gradient=None,
                weight=weight,
            ),
        )
    layer = pipeline.quantize_whole(Layer("layer", weight, torch.bfloat16), [step], [stats])
    return pipeline.serialize(pipeline.pack(layer, [step]), [step])


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_the_scale_is_the_largest_input_over_448(weights: str) -> None:
    stored = store(make_step(weights=weights), inputs(outlier=10.0).split(1000))
    assert stored.tensors["input_scale"].tolist() == [torch.tensor(10.0 / 448).item()]
    assert stored.tensors["input_scale"].dtype == torch.float32
    assert stored.tensors["weight_scale"].shape == ((8, 1) if weights == "channel" else (1,))
    assert stored.config is not None
    assert stored.config["input_activations"] == {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_weights_are_those_of_dynamic_activations(weights: str) -> None:
    static, dynamic = (
        store(make_step(weights=weights), [inputs()]),
        store(make_step(weights=weights, activations="dynamic"), []),
    )
    assert static.tensors.keys() - dynamic.tensors.keys() == {"input_scale"}
    assert all(
        torch.equal(static.tensors[name].float(), tensor.float())
        for name, tensor in dynamic.tensors.items()
    )


@pytest.mark.parametrize("outliers", SCALES)
def test_a_layer_that_saw_nothing_has_scale_one(outliers: str) -> None:
    assert store(make_step(outliers=outliers), []).tensors["input_scale"].tolist() == [1.0]
    assert store(make_step(outliers=outliers), [torch.zeros(5, 16)]).tensors[
        "input_scale"
    ].tolist() == [1.0]


def test_percentile_leaves_one_in_ten_thousand_out() -> None:
    clip = (
        448
        * store(make_step(outliers="percentile"), [inputs(outlier=100)])
        .tensors["input_scale"]
        .item()
    )
    assert 3.5 < clip < 4.5


@pytest.mark.parametrize("outlier", [4.0, 100.0, 3000.0])
def test_the_scale_by_error_serves_no_worse_than_the_other_two(outlier: float) -> None:
    x, errors = inputs(outlier), {}
    for outliers in SCALES:
        scale = store(make_step(outliers=outliers), [x]).tensors["input_scale"]
        rounded = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        errors[outliers] = float((rounded - x.float()).square().mean())
    assert errors["mse"] <= 1.1 * min(errors.values())


def test_a_range_beyond_what_fp8_holds_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="activations=dynamic loses less"):
        store(make_step(), [inputs(outlier=20_000)])


def test_data_is_needed_for_static_scales_only() -> None:
    assert make_step().calibrated
    assert not make_step(activations="dynamic").calibrated


@pytest.mark.parametrize(("device", "level"), [("H100", "recommended"), ("CPU x86", "unsupported")])
def test_hardware_is_judged_by_what_its_engine_runs(device: str, level: str) -> None:
    assert make_step().call("validate_hardware", hardware=find_device(device))[0].level == level
