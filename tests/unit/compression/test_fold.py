"""Factors are folded into what makes a layer's input, and only where the names say what that is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitpress.compression.calibration.fold import (
    Producer,
    find_producer,
    fold_factors,
    round_to_powers_of_two,
)

# Of a block with four query heads of two channels, and two heads of keys and values.
SHAPES: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (6,),
    "post_attention_layernorm.weight": (6,),
    "self_attn.q_proj.weight": (8, 6),
    "self_attn.v_proj.weight": (4, 6),
    "self_attn.o_proj.weight": (6, 8),
    "mlp.gate_proj.weight": (10, 6),
    "mlp.up_proj.weight": (10, 6),
    "mlp.down_proj.weight": (6, 10),
}


@pytest.mark.parametrize(
    ("member", "producer"),
    [
        ("self_attn.q_proj", Producer("input_layernorm")),
        ("self_attn.o_proj", Producer("self_attn.v_proj", (2, 2))),
        ("mlp.gate_proj", Producer("post_attention_layernorm")),
        ("mlp.down_proj", Producer("mlp.up_proj")),
    ],
)
def test_a_layer_s_input_is_made_by_the_norm_or_layer_before_it(
    member: str, producer: Producer
) -> None:
    assert find_producer([member], SHAPES, 2) == producer


def test_a_norm_before_the_mlp_of_its_own_goes_before_the_one_after_attention() -> None:
    shapes = SHAPES | {"pre_feedforward_layernorm.weight": (6,)}
    assert find_producer(["mlp.gate_proj"], shapes, 2) == Producer("pre_feedforward_layernorm")


@pytest.mark.parametrize(
    ("member", "shapes", "head_dim"),
    [
        ("self_attn.o_proj", SHAPES, None),
        ("self_attn.o_proj", SHAPES | {"self_attn.v_proj.weight": (3, 6)}, 2),
        ("self_attn.q_proj", SHAPES | {"input_layernorm.weight": (5,)}, 2),
        ("mlp.gate_proj", SHAPES | {"mlp.experts.0.up_proj.weight": (10, 6)}, 2),
        ("mlp.other", SHAPES | {"mlp.other.weight": (6, 10)}, 2),
    ],
    ids=["unknown heads", "rows of no head", "another width", "experts", "an unknown name"],
)
def test_where_it_is_not_known_what_makes_the_input_there_is_no_producer(
    member: str, shapes: dict[str, tuple[int, ...]], head_dim: int | None
) -> None:
    assert find_producer([member], shapes, head_dim) is None


def test_factors_become_the_nearest_powers_of_two() -> None:
    factors = torch.tensor([1.0, 1.4, 1.5, 0.3, 1e9, 1e-9])
    expected = torch.tensor([1.0, 1.0, 2.0, 0.25, 2.0**14, 2.0**-14])
    assert torch.equal(round_to_powers_of_two(factors, None), expected)


def test_query_heads_that_share_a_head_of_values_get_one_factor() -> None:
    # two query heads of two channels share each of two heads of values
    factors = torch.tensor([1.0, 4.0, 4.0, 16.0, 1.0, 1.0, 1.0, 4.0])
    expected = torch.tensor([2.0, 8.0, 2.0, 8.0, 1.0, 2.0, 1.0, 2.0])
    assert torch.equal(round_to_powers_of_two(factors, (2, 2)), expected)


def test_a_fold_leaves_the_function_as_it_is_to_the_bit_and_its_inverse_undoes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    block = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    inputs = torch.randn(5, 3, generator=generator)
    expected, factors = block(inputs), torch.tensor([2.0, 0.5, 1.0, 8.0])

    rescalings = fold_factors(block, ["1"], Producer("0"), factors)
    assert torch.equal(block(inputs), expected)
    assert torch.equal(block[1].weight, before["1.weight"] * factors)
    assert {(r.tensor, r.axis): r.exponents for r in rescalings} == {
        ("1.weight", "columns"): [1, -1, 0, 3],
        ("0.weight", "rows"): [-1, 1, 0, -3],
        ("0.bias", "rows"): [-1, 1, 0, -3],
    }

    fold_factors(block, ["1"], Producer("0"), 1 / factors)
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
