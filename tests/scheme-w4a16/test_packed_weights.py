"""What `w4a16` and `w8a16` store, against compressed-tensors' own packing and decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings, strategies as st

from bitpress import ShapeError, chain, numerics
from bitpress.layer import Layer, Record
from bitpress.schemes import Step, discover


def step(scheme: str, **options: Any) -> Step:
    return discover().get(scheme).step({"algorithm": "rtn", **options})


def stored(weight: torch.Tensor, used: Step) -> tuple[Layer, Record]:
    layer = chain.quantize(Layer("layer", weight, torch.bfloat16), [used], [{}])
    return layer, chain.record(chain.pack(layer, [used]), [used])


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 99))
def test_words_are_those_of_compressed_tensors(rows: int, columns: int, bits: int, seed: int) -> None:
    low, high = numerics.limits(bits)
    codes = torch.randint(low, high + 1, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    words = numerics.pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(numerics.unpack_words(words, bits, columns), codes)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.sampled_from(["w4a16", "w8a16"]), st.integers(1, 4), st.integers(1, 3), st.sampled_from([32, 64, 128, "channel"]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_what_is_stored_decodes_to_the_effective_weight(
    scheme: str, high: int, wide: int, group: int | str, symmetric: bool, seed: int
) -> None:
    width = 40 * wide if group == "channel" else int(group) * wide
    weight = torch.randn(8 * high, width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    used = step(scheme, group_size=group, symmetric=symmetric)
    layer, record = stored(weight, used)
    tensors, bits = record.tensors, 4 if scheme == "w4a16" else 8
    codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size(weight.shape)).float()
    scale = tensors["weight_scale"].float().repeat_interleave(width // tensors["weight_scale"].shape[1], 1)
    if not symmetric:
        shape = torch.Size((len(weight), tensors["weight_scale"].shape[1]))
        zero = unpack_from_int32(tensors["weight_zero_point"], bits, shape, packed_dim=0).float()
        codes = codes - zero.repeat_interleave(width // zero.shape[1], 1)
    assert torch.equal(codes * scale, layer.weight)
    assert torch.equal(chain.restore(tensors, record.config, [used]), layer.weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_searched_grid_costs_no_more_than_the_whole_range(symmetric: bool) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    layer, _ = stored(weight, step("w4a16", symmetric=symmetric))
    grouped = weight.view(64, 2, 128)
    if symmetric:
        scale, zero = grouped.abs().amax(2, keepdim=True) / 7.5, 0.0
    else:
        low, high = grouped.amin(2, keepdim=True), grouped.amax(2, keepdim=True)
        scale = (high - low) / 15
        zero = (-8 - low / scale).round()
    plain = ((grouped / scale).round().add(zero).clamp(-8, 7) - zero) * scale
    assert (layer.weight - weight).square().sum() < (plain.view(64, 256) - weight).square().sum()


@pytest.mark.parametrize(
    ("width", "group", "advice"), [(192, 128, "group_size=64"), (96, 64, "group_size=32"), (40, 32, "group_size=channel")]
)
def test_a_width_that_does_not_divide_is_refused_naming_what_fits(width: int, group: int, advice: str) -> None:
    with pytest.raises(ShapeError, match=f"width {width} is not a multiple of group_size {group}; try {advice}"):
        stored(torch.zeros(8, width), step("w4a16", group_size=group))


@pytest.mark.parametrize(("width", "groups"), [(256, 2), (192, 3), (96, 3), (40, 1)])
def test_auto_takes_the_largest_group_that_divides(width: int, groups: int) -> None:
    _, record = stored(torch.ones(8, width), step("w4a16", group_size="auto"))
    assert record.tensors["weight_scale"].shape == (8, groups)


def test_the_config_is_what_compressed_tensors_calls_it() -> None:
    _, record = stored(torch.ones(8, 256), step("w4a16", symmetric=False))
    assert record.config == {
        "format": "pack-quantized",
        "weights": {
            "num_bits": 4, "type": "int", "symmetric": False, "dynamic": False, "strategy": "group", "group_size": 128,
            "zp_dtype": "torch.int8",
        },
    }  # fmt: skip
    assert {name: (t.dtype, tuple(t.shape)) for name, t in record.tensors.items()} == {
        "weight_packed": (torch.int32, (8, 32)), "weight_scale": (torch.bfloat16, (8, 2)), "weight_shape": (torch.int64, (2,)),
        "weight_zero_point": (torch.int32, (1, 2)),
    }  # fmt: skip
