"""Factors are folded into what makes a layer's input, and only where the names say what that is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitpress.compression.calibration.fold import (
    Producer,
    find_producer,
    fold_into,
    plan_fold,
    read_rescalings,
    round_to_exponents,
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


def test_exponents_are_the_nearest_eighths_within_what_float16_holds() -> None:
    factors = torch.tensor([1.0, 1.04, 1.05, 2**0.5, 0.3, 1e9, 1e-9])
    assert round_to_exponents(factors, None) == [0, 0, 0.125, 0.5, -1.75, 14, -14]


def test_query_heads_that_share_a_head_of_values_get_one_exponent() -> None:
    # two query heads of two channels share each of two heads of values
    factors = torch.tensor([1.0, 4.0, 4.0, 16.0, 1.0, 1.0, 2**0.5, 4.0])
    assert round_to_exponents(factors, (2, 2)) == [1, 3, 1, 3, 0.25, 1, 0.25, 1]


def make_block() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False)


def test_columns_are_multiplied_by_the_exponents_and_rows_by_their_negatives() -> None:
    rescalings = plan_fold(make_block(), ["1"], Producer("0"), [1, -0.125, 0, 3])
    assert {(r.tensor, r.axis): r.exponents for r in rescalings} == {
        ("1.weight", "columns"): [1, -0.125, 0, 3],
        ("0.weight", "rows"): [-1, 0.125, 0, -3],
        ("0.bias", "rows"): [-1, 0.125, 0, -3],
    }
    # JSON has a -0.0
    assert "-0.0" not in str([r.exponents for r in rescalings])


def test_rows_that_query_heads_share_are_multiplied_once() -> None:
    block = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(8, 2))
    exponents = [1, 3, 1, 3, 0.25, 1, 0.25, 1]
    rescalings = plan_fold(block, ["1"], Producer("0", (2, 2)), exponents)
    assert rescalings[-1].exponents == [-1, -3, -0.25, -1]


def test_a_fold_changes_what_the_block_computes_by_roundings_alone() -> None:
    block, inputs = make_block(), torch.randn(5, 3)
    expected = block.double()(inputs.double())
    rescalings = plan_fold(block, ["1"], Producer("0"), [1, -0.125, 2.375, 3])
    fold_into(block.float(), rescalings)
    assert torch.allclose(block(inputs).double(), expected, rtol=0, atol=1e-6)


def test_folded_tensors_are_numbers_of_the_source_s_dtype() -> None:
    block = make_block().bfloat16().float()
    rescalings = plan_fold(block, ["1"], Producer("0"), [1, -0.125, 2.375, 3])
    fold_into(block, rescalings, lambda name: torch.bfloat16)
    for parameter in block.parameters():
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_a_fold_that_is_read_again_gives_the_same_bits() -> None:
    first, again = make_block(), make_block()
    rescalings = plan_fold(first, ["1"], Producer("0"), [1, -0.125, 2.375, 3])
    fold_into(first, rescalings)
    rescaled = {f"layers.7.{r.tensor}": {r.axis: r.exponents} for r in rescalings}
    fold_into(again, read_rescalings(rescaled, "layers.7."))
    for parameter, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)
