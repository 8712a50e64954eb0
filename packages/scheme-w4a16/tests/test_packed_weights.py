"""What `w4a16` and `w8a16` store, against compressed-tensors' own reading and against counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings, strategies as st

from bitpress.schemes import pipeline
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, Statistic, StoredLayer

SCHEMES = ("w4a16", "w8a16")
BITS = {"w4a16": 4, "w8a16": 8}


def make_step(name: str, **options: Any) -> Step:
    return discover().get(name).step({"algorithm": "rtn"} | options)


def numbers(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
    return (weight + 0.01).bfloat16().float()


def quantize(
    weight: torch.Tensor,
    step: Step,
    stats: dict[str, Statistic] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Layer:
    return pipeline.quantize(Layer("layer", weight, dtype), [step], [stats or {}])


def store(layer: Layer, step: Step) -> StoredLayer:
    return pipeline.serialize(pipeline.pack(layer, [step]), [step])


def decode_with_compressed_tensors(stored: StoredLayer) -> torch.Tensor:
    """The weight as compressed-tensors decodes it, in float32."""
    group = {
        "targets": ["Linear"],
        **{name: value for name, value in stored.config.items() if name != "format"},
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }
    parsed = QuantizationConfig.model_validate(
        config | {"quantization_status": "compressed"}
    ).config_groups["group_0"]
    tensors = {
        name: t.float() if name == "weight_scale" else t for name, t in stored.tensors.items()
    }
    return BaseCompressor.get_value_from_registry("pack-quantized").decompress(tensors, parsed)[
        "weight"
    ]


shapes = st.tuples(
    st.sampled_from(SCHEMES), st.sampled_from([32, 64, 128, "channel"]), st.booleans()
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(shapes, st.integers(1, 40), st.integers(1, 4), st.integers(1, 70), st.integers(0, 1000))
def test_restoring_what_is_packed_is_exact(
    case: Any, rows: int, groups: int, odd: int, seed: int
) -> None:
    name, group, symmetric = case
    width = odd if group == "channel" else group * groups
    step = make_step(name, group_size=group, symmetric=symmetric)
    layer = quantize(numbers(rows, width, seed), step)
    stored = store(layer, step)
    assert torch.equal(pipeline.dequantize(stored.tensors, stored.config, [step]), layer.weight)
    assert torch.equal(decode_with_compressed_tensors(stored), layer.weight)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_words_are_those_of_compressed_tensors_to_the_bit(name: str, symmetric: bool) -> None:
    step, bits = make_step(name, symmetric=symmetric), BITS[name]
    layer = quantize(numbers(24, 384), step)
    tensors = store(layer, step).tensors
    assert torch.equal(tensors["weight_packed"], pack_to_int32(layer.codes, bits))
    assert torch.equal(
        unpack_from_int32(tensors["weight_packed"], bits, torch.Size((24, 384))), layer.codes
    )
    if not symmetric:
        assert torch.equal(
            tensors["weight_zero_point"],
            pack_to_int32(layer.qparams["zero_point"], bits, packed_dim=0),
        )


INT = {"type": "int", "dynamic": False}
CASES: dict[
    str, tuple[str, dict[str, Any], dict[str, Any], dict[str, tuple[torch.dtype, tuple[int, ...]]]]
] = {
    "4 bits": (
        "w4a16",
        {},
        {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 128},
        {"weight_packed": (torch.int32, (16, 48)), "weight_scale": (torch.bfloat16, (16, 3))},
    ),
    "8 bits": (
        "w8a16",
        {},
        {"num_bits": 8, "symmetric": True, "strategy": "group", "group_size": 128},
        {"weight_packed": (torch.int32, (16, 96)), "weight_scale": (torch.bfloat16, (16, 3))},
    ),
    "small groups": (
        "w4a16",
        {"group_size": 32},
        {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32},
        {"weight_packed": (torch.int32, (16, 48)), "weight_scale": (torch.bfloat16, (16, 12))},
    ),
    "channel": (
        "w4a16",
        {"group_size": "channel"},
        {"num_bits": 4, "symmetric": True, "strategy": "channel"},
        {"weight_packed": (torch.int32, (16, 48)), "weight_scale": (torch.bfloat16, (16, 1))},
    ),
    "zero points": (
        "w4a16",
        {"symmetric": False},
        {
            "num_bits": 4,
            "symmetric": False,
            "zp_dtype": "torch.int8",
            "strategy": "group",
            "group_size": 128,
        },
        {
            "weight_packed": (torch.int32, (16, 48)),
            "weight_scale": (torch.bfloat16, (16, 3)),
            "weight_zero_point": (torch.int32, (2, 3)),
        },
    ),
    "8-bit zero points": (
        "w8a16",
        {"symmetric": False},
        {
            "num_bits": 8,
            "symmetric": False,
            "zp_dtype": "torch.int8",
            "strategy": "group",
            "group_size": 128,
        },
        {
            "weight_packed": (torch.int32, (16, 96)),
            "weight_scale": (torch.bfloat16, (16, 3)),
            "weight_zero_point": (torch.int32, (4, 3)),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_stored_layer_is_what_compressed_tensors_expects(case: str) -> None:
    name, options, weights, tensors = CASES[case]
    step = make_step(name, **options)
    stored = store(quantize(numbers(16, 384), step), step)
    result = {suffix: (t.dtype, tuple(t.shape)) for suffix, t in stored.tensors.items()}
    assert result == tensors | {"weight_shape": (torch.int64, (2,))}
    assert stored.tensors["weight_shape"].tolist() == [16, 384]
    assert stored.config == {
        "format": "pack-quantized",
        "weights": INT | weights,
        "input_activations": None,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_stored_in_the_model_s_own_dtype_and_codes_made_for_them(
    dtype: torch.dtype,
) -> None:
    step = make_step("w4a16")
    layer = quantize(numbers(8, 128), step, dtype=dtype)
    stored = store(layer, step)
    assert stored.tensors["weight_scale"].dtype == dtype
    scale = stored.tensors["weight_scale"].float()
    nearest = (numbers(8, 128) / scale).round().clamp(-8, 7)
    assert torch.equal(layer.weight, nearest * scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_searched_grid_costs_less_than_the_whole_range(symmetric: bool) -> None:
    weight = numbers(64, 256)
    grouped = weight.view(64, 2, 128)
    if symmetric:
        scale, zero = grouped.abs().amax(2, keepdim=True) / 7.5, 0.0
    else:
        low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
        scale = (high - low) / 15
        zero = (-8 - low / scale).round()
    plain = ((grouped / scale).round().add(zero).clamp(-8, 7) - zero) * scale
    result = quantize(weight, make_step("w4a16", symmetric=symmetric)).weight
    assert (result - weight).square().sum() < (plain.view(64, 256) - weight).square().sum()


def test_16_bit_activations_store_a_scale_from_the_largest_input() -> None:
    step = make_step("w8a16", activations="int16")
    assert step.calibrated
    x = torch.linspace(-3, 2, 256).view(2, 128)
    stats = step.call(
        "observe", inputs=x, reference=None, residual=None, output_gradient=None, weight=None
    )
    stored = store(quantize(numbers(8, 128), step, stats), step)
    assert stored.tensors["input_scale"].tolist() == pytest.approx([3 / 32767.5])
    assert stored.config["input_activations"] == INT | {
        "num_bits": 16,
        "symmetric": True,
        "strategy": "tensor",
    }
    assert decode_with_compressed_tensors(stored).shape == (8, 128)


def test_16_bit_activations_of_a_layer_without_data_have_scale_one() -> None:
    step = make_step("w8a16", activations="int16")
    assert store(quantize(numbers(8, 128), step), step).tensors["input_scale"].tolist() == [1.0]
