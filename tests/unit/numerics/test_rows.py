"""Rows that do not depend on each other are computed side by side, and become the same in any
number of lanes.
"""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from bitpress.numerics import IntegerGrid, fit_symmetric, gptq_quantize
from bitpress.numerics.gptq import gptq_statistics
from bitpress.numerics.output_hessian import output_statistics
from bitpress.numerics.rows import LOOP_ROWS, compute_rows
from bitpress.runtime.lanes import Lanes
from bitpress.schemes.values import Layer, Statistic

WIDTH, TOKENS = 48, 256


def inputs_like(seed: int, columns: int = WIDTH) -> Tensor:
    return torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(seed))


def fit(weight: Tensor, importance: Tensor | None) -> IntegerGrid:
    return fit_symmetric(weight, importance, 4, 16, (0.8, 1.0), dtype=torch.bfloat16)


@pytest.mark.parametrize("rest", ["all", "masked", "coupled", "masked and coupled"])
def test_any_number_of_lanes_rounds_a_weight_to_the_same_bits(rest: str) -> None:
    num_rows = 2 * LOOP_ROWS + 700
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(num_rows, WIDTH, generator=generator)
    mask = torch.rand(num_rows, WIDTH, generator=generator) < 0.5 if "masked" in rest else None
    inputs = inputs_like(2)
    stats: dict[str, Statistic] = gptq_statistics(inputs, weight, inputs + 0.1 * inputs_like(3))
    if "coupled" in rest:
        stats |= output_statistics(inputs_like(4, num_rows))

    def solve(num_lanes: int) -> tuple[Tensor, Tensor]:
        with Lanes(num_lanes) as lanes, lanes.offer():
            rounded, grid = gptq_quantize(Layer("l", weight, torch.float32, mask=mask), stats, fit)
        return rounded, grid.scale

    rounded, scale = solve(1)
    for num_lanes in (2, 3, 16):
        rounded_too, scale_too = solve(num_lanes)
        assert torch.equal(rounded, rounded_too)
        assert torch.equal(scale, scale_too)


def test_rows_are_computed_side_by_side_in_the_lanes_that_are_offered() -> None:
    # it breaks unless all of them come to it
    meeting = threading.Barrier(4, timeout=20)
    like = torch.arange(16.0).view(8, 2)

    def compute(rows: slice) -> Tensor:
        meeting.wait()
        return like[rows]

    with Lanes(4) as lanes, lanes.offer():
        assert torch.equal(compute_rows(like, compute, 2), like)
