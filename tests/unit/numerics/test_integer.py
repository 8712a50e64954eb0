"""Integer grids are the best of what is tried, and codes are exactly what they stand for, however
large or small the numbers.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from bitpress import numerics

RATIOS = tuple(0.5 + 0.05 * i for i in range(12))


def numbers(rows: int, width: int, seed: int, spread: float = 0.0) -> torch.Tensor:
    """(rows, width) float32; rows differ by factors of up to 10^spread either way."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * 10 ** (
        spread * (2 * torch.rand(rows, 1, generator=generator) - 1)
    )


def cost(
    weight: torch.Tensor, grid: numerics.IntegerGrid, importance: torch.Tensor | None
) -> torch.Tensor:
    """(rows, groups) float64: Σ importance (w - q)² of each group."""
    error = (weight.double() - grid.rounded(weight).double()).square()
    error = error if importance is None else error * importance.double()
    return error.view(len(weight), -1, grid.group).sum(2)


def search_exhaustively(
    weight: torch.Tensor, importance: torch.Tensor | None, bits: int, group: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, groups) float64 each: what the best of all candidates costs a group, and the largest
    error in it of any of them.
    """
    fit = numerics.fit_symmetric if symmetric else numerics.fit_asymmetric
    unscaled = fit(weight, None, bits, group, [1.0])
    costs, max_error = [], torch.zeros(len(weight), weight.shape[1] // group)
    for ratio, shift in itertools.product(RATIOS, (0,) if symmetric else (-1, 0, 1)):
        zero_point = None
        if unscaled.zero is not None:
            zero_point = (unscaled.zero + shift).clamp(*numerics.integer_range(bits))
        grid = numerics.IntegerGrid(unscaled.scale * ratio, zero_point, bits, group)
        costs.append(cost(weight, grid, importance))
        error = (weight - grid.rounded(weight)).abs().view(len(weight), -1, group)
        max_error = max_error.maximum(error.amax(2))
    return torch.stack(costs).amin(0), max_error.double()


@pytest.mark.parametrize("symmetric", [True, False])
@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([8, 24]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_grid_is_the_best_of_all_tried_but_for_how_finely_their_costs_are_known(
    symmetric: bool, bits: int, group: int, weighted: bool, seed: int
) -> None:
    weight = numbers(6, 48, seed, spread=2) + (0 if symmetric else 0.5)
    importance = torch.ones(48)
    if weighted:
        importance = torch.rand(48, generator=torch.Generator().manual_seed(seed))
    fit = numerics.fit_symmetric if symmetric else numerics.fit_asymmetric
    grid = fit(weight, importance if weighted else None, bits, group, RATIOS)
    best, max_error = search_exhaustively(weight, importance, bits, group, symmetric)
    groups = weight.view(6, -1, group)
    if symmetric:
        span = groups.abs().amax(2)
    else:
        span = groups.amax(2).clamp(min=0) - groups.amin(2).clamp(max=0)
    # a cost, e², rises by at most 2 e for each unit; so much it may differ from its mean in a
    # place, and two are compared
    step_size = 2 * span / (4096 if symmetric else 2048)
    tolerance = 2 * max_error * step_size * importance.view(-1, group).sum(1)
    assert (cost(weight, grid, importance) <= (best + tolerance) * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    ("bits", "symmetric", "tolerance"),
    [(2, True, 1e-4), (4, True, 1e-3), (8, True, 5e-3), (4, False, 3e-3)],
)
def test_over_many_groups_the_best_of_all_tried_is_all_but_reached(
    bits: int, symmetric: bool, tolerance: float
) -> None:
    weight, importance = numbers(256, 1024, 0), numbers(1, 1024, 1).square()[0]
    fit = numerics.fit_symmetric if symmetric else numerics.fit_asymmetric
    searched = cost(weight, fit(weight, importance, bits, 128, RATIOS), importance).sum()
    best, _ = search_exhaustively(weight, importance, bits, 128, symmetric)
    assert searched <= best.sum() * (1 + tolerance)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fit", [numerics.fit_symmetric, numerics.fit_asymmetric])
def test_where_there_is_one_scale_to_try_it_is_taken(fit, bits: int) -> None:
    weight = numbers(6, 64, 0)
    whole, half = (fit(weight, None, bits, 32, (ratio,)) for ratio in (1.0, 0.5))
    assert torch.equal(half.scale, whole.scale / 2)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    st.sampled_from([4, 8]),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_searched_scales_lose_no_more_than_the_largest_number_s(
    bits: int, seed: int, dtype: torch.dtype
) -> None:
    weight = numbers(64, 256, seed)
    for fit in (numerics.fit_symmetric, numerics.fit_asymmetric):
        searched, unsearched = (
            cost(weight, fit(weight, None, bits, 32, ratios, dtype=dtype), None)
            for ratios in ((*RATIOS, 1.0), (1.0,))
        )
        assert searched.sum() <= unsearched.sum()


@pytest.mark.parametrize(
    ("ratios", "error"),
    [((1.0,), 0.0126), (tuple(np.linspace(0.25, 1.10, 35)), 0.0101)],
    ids=["from the largest number", "searched"],
)
def test_four_bits_in_groups_of_128_of_normal_numbers_lose_what_is_computed_for_them(
    ratios: tuple[float, ...], error: float
) -> None:
    weight = numbers(512, 1024, 0)
    grid = numerics.fit_symmetric(weight, None, 4, 128, ratios)
    assert cost(weight, grid, None).sum().item() / weight.numel() == pytest.approx(
        error, abs=0.0004
    )


def test_eight_bits_in_groups_of_128_of_normal_numbers_lose_what_is_computed_for_them() -> None:
    weight = numbers(512, 1024, 0)
    grid = numerics.fit_symmetric(weight, None, 8, 128, (1.0,))
    assert cost(weight, grid, None).sum().item() / weight.numel() == pytest.approx(4.3e-5, rel=0.05)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([8, 32]),
    st.booleans(),
    st.integers(0, 1000),
    st.sampled_from([0.0, 5.0, 30.0]),
)
def test_codes_decode_to_what_was_rounded_to_the_bit(
    bits: int, group: int, symmetric: bool, seed: int, spread: float
) -> None:
    weight = numbers(7, 64, seed, spread)
    fit = numerics.fit_symmetric if symmetric else numerics.fit_asymmetric
    grid = fit(weight, None, bits, group, RATIOS, dtype=torch.bfloat16)
    rounded = grid.rounded(weight)
    codes = grid.codes(rounded)
    assert codes.dtype == torch.int8
    assert torch.equal(numerics.decode_integers(codes, grid.scale, grid.zero), rounded)
    columns = [grid.nearest(weight[:, k], slice(0, 7), k) for k in range(64)]
    assert torch.equal(torch.stack(columns, 1), rounded)


@pytest.mark.parametrize("fit", [numerics.fit_symmetric, numerics.fit_asymmetric])
@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e10, 1e25, 1e37])
def test_the_best_grid_does_not_depend_on_the_size_of_the_numbers(fit, size: float) -> None:
    weight, power = numbers(6, 32, 1), 2.0 ** round(np.log2(size))
    grid, scaled_grid = (fit(w, None, 4, 32, RATIOS) for w in (weight, weight * power))
    assert torch.equal(scaled_grid.scale, grid.scale * power)
    assert torch.equal(scaled_grid.rounded(weight * power), grid.rounded(weight) * power)


@pytest.mark.parametrize("fit", [numerics.fit_symmetric, numerics.fit_asymmetric])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extreme", [0.0, 2.0**-133, torch.finfo(torch.bfloat16).max])
def test_scales_are_positive_and_numbers_finite_at_the_ends_of_the_range(
    fit, bits: int, dtype: torch.dtype, extreme: float
) -> None:
    weight = numbers(4, 32, 2).sign() * extreme
    grid = fit(weight, None, bits, 16, RATIOS, dtype=dtype)
    assert (grid.scale > 0).all()
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    assert grid.rounded(weight).isfinite().all()
    assert extreme != 0 or not grid.rounded(weight).any()


def test_small_float16_scales_are_subnormal_numbers_rather_than_too_large() -> None:
    # scales near 6e-6; float16's least normal number is 6.1e-5
    weight = numbers(16, 32, 3) * 2e-5
    grid = numerics.fit_symmetric(weight, None, 4, 32, (1.0,), dtype=torch.float16)
    error = (grid.rounded(weight) - weight).norm() / weight.norm()
    assert error < 0.2


def test_an_integer_in_a_group_of_its_own_sign_keeps_zero_on_the_grid() -> None:
    weight = torch.linspace(0.2, 0.5, 32).view(1, 32)
    grid = numerics.fit_asymmetric(weight, None, 4, 32, (1.0,))
    assert torch.equal(grid.rounded(torch.zeros(1, 32)), torch.zeros(1, 32))
    assert grid.zero is not None
    assert grid.zero.item() == -8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-30, 3e38])
def test_a_weight_lies_within_the_bound_of_its_code(
    dtype: torch.dtype, bits: int, is_symmetric: bool, size: float
) -> None:
    # no weight is larger than its dtype holds
    size = min(size, torch.finfo(dtype).max)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).clamp_(-1, 1) * size
    fit = numerics.fit_symmetric if is_symmetric else numerics.fit_asymmetric
    ratios = (1.0, 0.8, 0.6)
    grid = fit(weight, None, bits, 32, ratios, dtype=dtype)
    codes = grid.codes(weight)
    bound = numerics.integer_bound(codes, grid.scale.to(dtype), grid.zero, bits, min(ratios))
    distance = numerics.decode_integers(codes, grid.scale, grid.zero) - weight
    assert (distance.abs() <= bound).all()
    # and it is no wider than half a step, but at the ends of the range
    inner = (codes > codes.new_tensor(-(1 << bits - 1))) & (codes < (1 << bits - 1) - 1)
    half_steps = (grid.scale / 2).repeat_interleave(32, 1)
    torch.testing.assert_close(bound[inner], half_steps[inner], rtol=1e-3, atol=0)
