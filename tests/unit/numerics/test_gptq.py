"""Error feedback, held against GPTQ as first published, in float64, and on tiny problems against
every choice there is.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from bitpress import numerics
from bitpress.numerics.gptq import Fit, Grid
from bitpress.schemes.values import Layer, Statistic

Array = NDArray[np.float64]
RATIOS = (0.7, 0.8, 0.9, 1.0)


def activations(tokens: int, width: int, seed: int, outlier: float = 8.0) -> torch.Tensor:
    """(tokens, in) float32, channels alike in parts and unlike in size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = (
        torch.randn(tokens, width, generator=generator)
        @ torch.randn(width, width, generator=generator)
        / width**0.5
    )
    mixed[:, :: max(width // 4, 1)] *= outlier
    return mixed + 0.3 * torch.randn(tokens, width, generator=generator)


def weights(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1000)) * 0.02


def four_bits(weight: torch.Tensor, importance: torch.Tensor | None) -> numerics.IntegerGrid:
    """Groups of 16 columns, or the whole width; scales as models store them."""
    width = weight.shape[1]
    group = width if width % 16 else 16
    return numerics.fit_symmetric(weight, importance, 4, group, RATIOS, dtype=torch.bfloat16)


def gptq_quantize(
    weight: torch.Tensor, stats: Mapping[str, Statistic], fit: Fit, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, Grid]:
    return numerics.gptq_quantize(Layer("layer", weight, torch.bfloat16, mask), stats, fit)


def factorize(x: torch.Tensor) -> numerics.Factor:
    factor = numerics.factorize_hessian(x.T @ x, len(x))
    assert factor is not None
    return factor


def round_to_nearest(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    return four_bits(weight, importance).rounded(weight)


def rounding_loss(error: torch.Tensor, hessian: Array) -> Array:
    """The diagonal of error H errorᵀ."""
    e = error.double().numpy()
    return np.einsum("oi,ij,oj->o", e, hessian, e)


def damped_hessian(factor: numerics.Factor) -> Array:
    """The H that was factored, in the columns' own order."""
    u, order = factor.unit.double().numpy(), factor.order.numpy()
    hessian = np.empty_like(u)
    hessian[np.ix_(order, order)] = (u * factor.variance.double().numpy()) @ u.T
    return hessian


def published_gptq(
    weight: torch.Tensor, hessian: Array, order: Array, grid: numerics.IntegerGrid
) -> Array:
    """Frantar et al., arXiv 2210.17323, algorithm 1: the Cholesky factor of the inverse, column by
    column.
    """
    inverse = np.linalg.inv(hessian[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    w, scale = weight.double().numpy()[:, order], grid.scale.double().numpy()
    quantized = np.empty_like(w)
    for k, column in enumerate(order):
        s = scale[:, column // grid.group]
        quantized[:, column] = np.clip(np.round(w[:, k] / s), -8, 7) * s
        error = (w[:, k] - quantized[:, column]) / upper[k, k]
        w[:, k:] -= np.outer(error, upper[k, k:])
    return quantized


@settings(derandomize=True, deadline=None, max_examples=12)
@given(st.integers(1, 70), st.integers(2, 90), st.integers(0, 1000))
def test_the_sweep_is_gptq_as_first_published(rows: int, width: int, seed: int) -> None:
    weight, x = weights(rows, width, seed), activations(4 * width, width, seed)
    factor = factorize(x)
    grid = four_bits(weight, factor.diagonal)
    quantized, loss = numerics.column_sweep(weight, factor, grid.nearest)
    hessian = (x.double().T @ x.double()).numpy() / len(x)
    hessian += (
        np.eye(width) * max(0.001, min(0.1 * width / len(x), 1.0)) * hessian.diagonal().mean()
    )
    expected = published_gptq(weight, hessian, factor.order.numpy(), grid)
    different = ~np.isclose(quantized.numpy(), expected, rtol=1e-5, atol=1e-9).all(1)
    # a tie broken the other way changes what follows it in the row
    assert different.sum() <= max(1, 0.001 * weight.numel())
    if not different.any():
        np.testing.assert_allclose(
            loss.sum(), rounding_loss(weight - torch.tensor(expected), hessian).sum(), rtol=1e-4
        )


@pytest.mark.parametrize(("rows", "width"), [(96, 256), (1100, 128), (24, 512)])
def test_large_sweeps_are_gptq_but_for_ties(rows: int, width: int) -> None:
    weight, x = weights(rows, width, 5), activations(4 * width, width, 5)
    factor = factorize(x)
    grid = four_bits(weight, factor.diagonal)
    quantized, loss = numerics.column_sweep(weight, factor, grid.nearest)
    expected = published_gptq(weight, damped_hessian(factor), factor.order.numpy(), grid)
    assert np.isclose(quantized.numpy(), expected, rtol=1e-5, atol=1e-9).mean() >= 0.999
    expected_loss = rounding_loss(weight - torch.tensor(expected), damped_hessian(factor))
    np.testing.assert_allclose(loss.sum(), expected_loss.sum(), rtol=1e-4)


@pytest.mark.parametrize("width", [2, 3])
def test_each_column_takes_the_best_number_there_is_if_later_ones_could_be_anything(
    width: int,
) -> None:
    weight, x = weights(20, width, 7), activations(50, width, 7)
    factor = factorize(x)
    hessian, order = damped_hessian(factor), factor.order.tolist()
    grid = numerics.fit_symmetric(weight, None, 2, width, (0.8, 1.0))
    quantized, _ = numerics.column_sweep(weight, factor, grid.nearest)
    for row in range(len(weight)):
        best: dict[int, float] = {}
        for k, column in enumerate(order):
            decided, free = order[: k + 1], order[k + 1 :]
            # what the best continuous choice of the later columns leaves: a Schur complement
            schur = hessian[np.ix_(decided, decided)]
            if free:
                cross = hessian[np.ix_(decided, free)]
                schur = schur - cross @ np.linalg.solve(hessian[np.ix_(free, free)], cross.T)
            costs = {}
            for number in (code * float(grid.scale[row, 0]) for code in range(-2, 2)):
                candidate = {**best, column: number}
                error = np.array([float(weight[row, c]) - candidate[c] for c in decided])
                costs[number] = error @ schur @ error
            best[column] = min(costs, key=costs.__getitem__)
        expected = [best[c] for c in range(width)]
        np.testing.assert_allclose(quantized[row].numpy(), expected, rtol=1e-6)


def test_no_choice_of_two_bits_beats_feedback_by_much() -> None:
    weight, x = weights(12, 3, 3), activations(40, 3, 3)
    factor = factorize(x)
    grid = numerics.fit_symmetric(weight, None, 2, 3, (1.0,))
    _, loss = numerics.column_sweep(weight, factor, grid.nearest)
    all_codes = torch.tensor(list(itertools.product(range(-2, 2), repeat=3))).float()  # (64, in)
    best = torch.stack(
        [factor.loss(row - all_codes * s).min() for row, s in zip(weight, grid.scale, strict=True)]
    )
    assert (loss >= best * (1 - 1e-4)).all()
    assert loss.sum() <= 2 * best.sum()


def test_the_loss_reported_is_that_of_the_error_under_the_damped_hessian() -> None:
    weight, x = weights(30, 64, 1), activations(256, 64, 1)
    factor = factorize(x)
    quantized, loss = numerics.column_sweep(weight, factor, four_bits(weight, None).nearest)
    expected = rounding_loss(weight - quantized, damped_hessian(factor))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(factor.loss(weight - quantized), expected, rtol=1e-4)


def test_a_cost_is_held_against_the_whole_of_what_an_error_costs() -> None:
    # wide enough for several stripes
    factor = factorize(activations(900, 600, 2))
    error = weights(40, 600, 2)
    # most of them below what the error costs, some above
    costs = factor.loss(error) * torch.logspace(-3, 0.3, 40)
    costs[7], error[9, 5] = torch.nan, torch.nan
    expected = costs <= factor.loss(error)
    assert expected.any()
    assert not expected.all()
    assert torch.equal(factor.covers(costs, error), expected)


@pytest.mark.parametrize("width", [1, 48])
def test_inputs_without_correlation_give_rounding_to_nearest(width: int) -> None:
    weight = weights(40, width, 2)
    stats = {
        "hessian": Statistic(100 * torch.eye(width), "sum"),
        "tokens": Statistic(torch.tensor(100.0), "sum"),
    }
    quantized, grid = gptq_quantize(weight, stats, four_bits)
    assert torch.equal(quantized, grid.rounded(weight))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(st.integers(2, 60), st.integers(1, 200), st.integers(0, 1000))
def test_no_row_does_worse_than_by_rounding_to_nearest(width: int, tokens: int, seed: int) -> None:
    weight, x = weights(30, width, seed) ** 3, activations(tokens, width, seed)
    stats = numerics.gptq_statistics(x, weight)
    factor = factorize(x)
    quantized, grid = gptq_quantize(weight, stats, four_bits)
    cost = factor.loss(weight - quantized)
    cost_of_rounding = factor.loss(weight - grid.rounded(weight))
    assert (cost <= cost_of_rounding * (1 + 1e-4)).all()


@pytest.mark.parametrize("size", [1e20, 1e30, 1e38])
def test_rows_too_large_for_their_loss_stay_finite_and_leave_others_alone(size: float) -> None:
    weight, stats = (
        weights(12, 48, 13),
        numerics.gptq_statistics(activations(300, 48, 13), torch.empty(0)),
    )
    expected, _ = gptq_quantize(weight, stats, four_bits)
    quantized, _ = gptq_quantize(
        torch.cat([weight[:4], weight[4:].sign() * size]), stats, four_bits
    )
    assert quantized.isfinite().all()
    assert torch.equal(quantized[:4], expected[:4])


@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_fewer_tokens_than_columns_still_give_numbers(tokens: int) -> None:
    quantized, _ = gptq_quantize(
        weights(20, 64, 4),
        numerics.gptq_statistics(activations(tokens, 64, 4), torch.empty(0)),
        four_bits,
    )
    assert quantized.isfinite().all()
    assert quantized.any()


def test_columns_that_were_never_active_are_rounded_to_nearest() -> None:
    weight, x = weights(20, 32, 6), activations(200, 32, 6)
    x[:, 5] = 0
    x[:, 31] = 0
    quantized, grid = gptq_quantize(weight, numerics.gptq_statistics(x, weight), four_bits)
    rounded = grid.rounded(weight)
    assert torch.equal(quantized[:, [5, 31]], rounded[:, [5, 31]])
    assert not torch.equal(quantized, rounded)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_statistics_that_are_not_finite_are_warned_of_and_the_layer_is_rounded(bad: float) -> None:
    weight, stats = (
        weights(8, 16, 0),
        numerics.gptq_statistics(activations(30, 16, 0), torch.empty(0)),
    )
    stats["hessian"].value[3, 2] = bad
    with pytest.warns(UserWarning, match="not finite"):
        quantized, _ = gptq_quantize(weight, stats, four_bits)
    assert torch.equal(quantized, round_to_nearest(weight))


def test_without_statistics_the_layer_is_rounded_and_nothing_is_said() -> None:
    weight = weights(8, 16, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized, _ = gptq_quantize(weight, {}, four_bits)
    assert torch.equal(quantized, round_to_nearest(weight))


def stacked_and_alone(heights: tuple[int, ...], drift: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows rounded as one weight, and each part of them by itself, where the float model's inputs
    are `drift` times as large.
    """
    x, weight = activations(500, 96, 8), weights(96, 96, 8)
    stats = numerics.gptq_statistics(x, weight, x * drift if drift != 1 else None)
    stacked, _ = gptq_quantize(weight, stats, four_bits)
    alone, first = [], 0
    for height in heights:
        tile = slice(first, first + height)
        stats_of_tile = {name: stat.of(tile) for name, stat in stats.items()}
        alone.append(gptq_quantize(weight[tile], stats_of_tile, four_bits)[0])
        first += height
    return stacked, torch.cat(alone)


@pytest.mark.parametrize(
    ("heights", "drift"), [((40, 8, 48), 1), ((1, 5, 90), 1), ((64, 32), 1), ((64, 32), 1.01)]
)
def test_stacked_rows_are_those_rows_alone_to_the_bit(
    heights: tuple[int, ...], drift: float
) -> None:
    stacked, alone = stacked_and_alone(heights, drift)
    assert torch.equal(alone, stacked)


# a product with a few rows may be summed in another order than one with many, which depends on the
# CPU
@pytest.mark.parametrize("heights", [(40, 8, 48), (1, 5, 90)])
def test_stacked_rows_make_up_for_drift_as_those_rows_alone_but_for_rounding(
    heights: tuple[int, ...],
) -> None:
    stacked, alone = stacked_and_alone(heights, 1.01)
    assert not torch.equal(stacked, stacked_and_alone(heights, 1)[0])
    torch.testing.assert_close(alone, stacked, rtol=1e-5, atol=0)


def test_zeros_and_masked_positions_stay_zero_and_the_others_make_up_for_it() -> None:
    weight, x = weights(24, 64, 9), activations(400, 64, 9)
    mask = torch.rand(24, 64, generator=torch.Generator().manual_seed(9)) < 0.5
    masked = weight * mask
    stats, factor = numerics.gptq_statistics(x, masked, x * 1.02), factorize(x)
    for layer_mask in (None, mask):
        quantized, grid = gptq_quantize(masked, stats, four_bits, layer_mask)
        assert not quantized[~mask].any()
        rounded = grid.rounded(masked)
        assert factor.loss(masked - quantized).sum() < factor.loss(masked - rounded).sum()
