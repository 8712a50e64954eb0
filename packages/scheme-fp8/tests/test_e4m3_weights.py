"""What `fp8` and `fp8-block` store, against arithmetic written out in NumPy and Python."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from bitpress import compress, decompress
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model
from bitpress.schemes import pipeline
from bitpress.schemes.registry import Step, discover
from bitpress.schemes.values import Layer, StoredLayer

# every finite E4M3 number by its code: sign, 4 bits of exponent with bias 7, 3 of mantissa
NUMBERS = {
    code: (-1.0) ** (code >> 7)
    * (
        ((code & 7) + 8) * 2.0 ** ((code >> 3 & 15) - 10)
        if code >> 3 & 15
        else (code & 7) * 2.0**-9
    )
    for code in range(256)
    if code & 127 != 127
}
MAGNITUDES = np.array([NUMBERS[code] for code in range(127)])


def make_step(name: str, **options: Any) -> Step:
    return discover().get(name).step(options)


def store(weight: torch.Tensor, step: Step) -> StoredLayer:
    layer = Layer("layer", weight, torch.bfloat16)
    stats = pipeline.observe_weights(lambda: iter([layer]), [step])
    return pipeline.serialize(
        pipeline.pack(pipeline.quantize(layer, [step], stats), [step]), [step]
    )


def nearest_codes(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The E4M3 code nearest to float32(weight / scale) by looking at all of them; a tie goes to the
    even code.
    """
    quotient = (weight.astype(np.float32) / scale.astype(np.float32)).astype(np.float64)
    distance = np.abs(np.abs(quotient)[..., None] - MAGNITUDES)  # (out, in, 127)
    tie_to_even = np.where(np.arange(127) % 2 == 0, 0.0, 0.25)
    best = np.where(distance == distance.min(-1, keepdims=True), tie_to_even, 1.0).argmin(-1)
    return (best + 128 * np.signbit(quotient)).astype(np.uint8)


def numbers(rows: int, columns: int, seed: int, spread: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (
        (weight * 10 ** (spread * torch.randn(rows, columns, generator=generator)))
        .bfloat16()
        .float()
    )


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(0, 1000), st.sampled_from([0.0, 1.0, 3.0])
)
def test_a_channel_has_the_scale_amax_over_448_and_the_nearest_codes(
    rows: int, columns: int, seed: int, spread: float
) -> None:
    weight = numbers(rows, columns, seed, spread)
    tensors = store(weight, make_step("fp8")).tensors
    scale = np.abs(weight.numpy()).max(1, keepdims=True) / np.float32(448)
    np.testing.assert_array_equal(tensors["weight_scale"].numpy(), scale)
    np.testing.assert_array_equal(
        tensors["weight"].view(torch.uint8).numpy(), nearest_codes(weight.numpy(), scale)
    )


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.integers(1, 300), st.integers(1, 2), st.integers(0, 1000))
def test_a_tile_of_a_block_has_the_scale_of_its_own_numbers(
    rows: int, wide: int, seed: int
) -> None:
    weight = numbers(rows, 128 * wide, seed, spread=1.0)
    tensors = store(weight, make_step("fp8-block")).tensors
    scale, codes = np.empty((-(-rows // 128), wide), np.float32), np.empty(weight.shape, np.uint8)
    for i, j in itertools.product(*map(range, scale.shape)):
        tile = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
        scale[i, j] = np.abs(weight.numpy()[tile]).max() / np.float32(448)
        codes[tile] = nearest_codes(weight.numpy()[tile], scale[i, j])
    np.testing.assert_array_equal(tensors["weight_scale"].numpy(), scale)
    np.testing.assert_array_equal(tensors["weight"].view(torch.uint8).numpy(), codes)


def test_ties_go_to_the_even_code_and_the_largest_number_is_kept() -> None:
    # scale 1: 448 in each row; 1.0625 lies between 1 and 1.125, 1.1875 between 1.125 and 1.25,
    # 2^-10 between 0 and 2^-9
    weight = torch.tensor([[448.0, 1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, -1.0625]])
    codes = store(weight, make_step("fp8")).tensors["weight"].view(torch.uint8)
    assert [NUMBERS[code] for code in codes[0].tolist()] == [448, 1.0, 1.25, 0.0, 2.0**-8, -1.0]


@pytest.mark.parametrize("shards", [1, 3], ids=["one file", "in different files"])
@pytest.mark.parametrize(
    "fused",
    [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ],
    ids=", ".join,
)
def test_fused_layers_share_one_scale_per_tensor(
    tmp_path: Path, shards: int, fused: tuple[str, ...]
) -> None:
    source = llama_tensors()
    compress(
        write_model(tmp_path / "m", source, shards=shards),
        tmp_path / "o",
        scheme="fp8",
        settings=["weights=tensor"],
    )
    tensors = tensors_of(tmp_path / "o")
    names = [f"model.layers.1.{member}" for member in fused]
    largest = max(source[f"{name}.weight"].float().abs().max() for name in names)
    for name in names:
        assert torch.equal(tensors[f"{name}.weight_scale"], (largest / 448).reshape(1))


COMMON = {"num_bits": 8, "type": "float", "symmetric": True}


@pytest.mark.parametrize(
    ("scheme", "weights", "activations", "scale_shape"),
    [
        (("fp8", {}), {"strategy": "channel"}, {"strategy": "token", "dynamic": True}, (256, 1)),
        (
            ("fp8", {"weights": "tensor"}),
            {"strategy": "tensor"},
            {"strategy": "token", "dynamic": True},
            (1,),
        ),
        (
            ("fp8-block", {}),
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128, "dynamic": True},
            (2, 3),
        ),
    ],
    ids=["channel", "tensor", "block"],
)
def test_the_stored_layer_is_what_compressed_tensors_expects(
    scheme: Any, weights: Any, activations: Any, scale_shape: tuple[int, ...]
) -> None:
    name, options = scheme
    stored = store(numbers(256, 384, 0), make_step(name, **options))
    assert {n: (t.dtype, tuple(t.shape)) for n, t in stored.tensors.items()} == {
        "weight": (torch.float8_e4m3fn, (256, 384)),
        "weight_scale": (torch.float32, scale_shape),
    }
    assert stored.config == {
        "format": "float-quantized",
        "weights": COMMON | {"dynamic": False} | weights,
        "input_activations": COMMON | activations,
    }


def test_restored_weights_are_codes_times_scales_in_float32(tmp_path: Path) -> None:
    compress(write_model(tmp_path / "m"), tmp_path / "o", scheme="fp8-block")
    tensors = tensors_of(tmp_path / "o")
    decompress(tmp_path / "o", tmp_path / "d")
    dense, name = tensors_of(tmp_path / "d"), "model.layers.0.mlp.down_proj"
    scale = tensors[f"{name}.weight_scale"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(
        dense[f"{name}.weight"], (tensors[f"{name}.weight"].float() * scale).bfloat16()
    )
    assert dense.keys() == llama_tensors().keys()
    assert LLAMA["hidden_size"] == scale.shape[0]


WAYS: list[tuple[str, dict[str, Any]]] = [
    ("fp8", {}),
    ("fp8", {"weights": "tensor"}),
    ("fp8-block", {}),
]


def quantize_with_data(
    name: str, options: dict[str, Any], x: torch.Tensor, gradient: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (out, in), and what becomes of it after tokens (tokens, in) were observed."""
    step, weight = make_step(name, **options), numbers(160, 256, 3) * 0.02
    stats = dict(pipeline.observe(step, weight, x) or {})
    if gradient is not None:
        stats |= pipeline.observe_gradient(step, weight, gradient) or {}
    layer = Layer("layer", weight, torch.bfloat16)
    return weight, pipeline.quantize_whole(layer, [step], [stats]).weight


def correlated(tokens: int, channels: int, directions: int, seed: int) -> torch.Tensor:
    """(tokens, channels), most of it along a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, directions, generator=generator)
    mixed = mixed @ torch.randn(directions, channels, generator=generator)
    return mixed + 0.3 * torch.randn(tokens, channels, generator=generator)


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_errors_fed_forward_cost_the_output_less_than_plain_rounding(
    name: str, options: dict[str, Any]
) -> None:
    x = correlated(2000, 256, 40, 1)
    losses = []
    for algorithm in ("rtn", "gptq"):
        weight, result = quantize_with_data(name, {**options, "algorithm": algorithm}, x)
        losses.append(float((x @ (result - weight).T).square().mean()))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_outputs_that_matter_together_make_up_for_each_other_s_errors(
    name: str, options: dict[str, Any]
) -> None:
    x, gradient = correlated(2000, 256, 40, 1), correlated(1000, 160, 4, 2)
    losses = []
    for known_gradient in (None, gradient):
        weight, result = quantize_with_data(
            name, {**options, "algorithm": "gptq"}, x, known_gradient
        )
        losses.append(float((gradient @ (result - weight) @ x.T).square().mean()))
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", ["fp8", "fp8-block"])
def test_plain_rounding_asks_for_no_data_and_takes_none(name: str) -> None:
    rounded, fed_forward = make_step(name), make_step(name, algorithm="gptq")
    assert (rounded.calibrated, fed_forward.calibrated) == (False, True)
    assert not pipeline.takes_gradient(rounded)
    assert pipeline.takes_gradient(fed_forward)
    assert not pipeline.observe(rounded, torch.ones(128, 128), torch.ones(4, 128))
