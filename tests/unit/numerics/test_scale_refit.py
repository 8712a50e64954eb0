"""Scales fitted to codes, held against one-dimensional least squares in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from bitpress import numerics
from bitpress.numerics.scale_refit import DampedHessian, refit_scales
from bitpress.schemes.values import Layer

Array = NDArray[np.float64]


def draw(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian_of(width: int, seed: int) -> DampedHessian:
    """Of inputs that are related."""
    x = draw(3 * width, width, seed) @ draw(width, width, seed + 1)
    return DampedHessian(x.T @ x, torch.rand(width) * width)


def dense(hessian: DampedHessian) -> Array:
    matrix: Array = hessian.moment.double().numpy() + np.diag(hessian.damping.double().numpy())
    return matrix


def costs(error: Array, hessian: Array) -> Array:
    cost: Array = np.einsum("oi,ij,oj->o", error, hessian, error)
    return cost


def grid_of(weight: torch.Tensor, group: int, dtype: torch.dtype) -> numerics.IntegerGrid:
    return numerics.fit_symmetric(weight, None, 4, group, (0.8, 1.0), dtype=dtype)


def rescaled(rounded: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> Array:
    """The same codes with other scales."""
    size = rounded.shape[1] // before.shape[1]
    ratio: Array = (after.double() / before.double()).repeat_interleave(size, 1).numpy()
    return rounded.double().numpy() * ratio


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.integers(1, 20), st.integers(1, 6), st.sampled_from([1, 4, 16]), st.integers(0, 1000))
def test_each_group_takes_the_best_scale_beside_those_of_all_others(
    rows: int, groups: int, size: int, seed: int
) -> None:
    width = groups * size
    weight, hessian = draw(rows, width, seed), hessian_of(width, seed)
    grid = grid_of(weight, size, torch.float32)
    target, rounded = weight + 0.1 * draw(rows, width, seed + 2), grid.rounded(weight)
    scale = refit_scales(target, rounded, hessian, grid, slice(None))

    units = rounded.double().numpy() / grid.scale.repeat_interleave(size, 1).double().numpy()
    expected, h = grid.scale.double().numpy().copy(), dense(hessian)
    for group in range(groups):
        own = np.zeros((rows, width))
        own[:, group * size : (group + 1) * size] = units[:, group * size : (group + 1) * size]
        others = target.double().numpy() - units * expected.repeat(size, 1)
        others += own * expected[:, group : group + 1]
        curvature = costs(own, h)
        best = np.einsum("oi,ij,oj->o", own, h, others) / np.where(curvature > 0, curvature, 1)
        # a scale is positive
        best = np.maximum(best, float(numerics.integer.SMALLEST_SCALE))
        expected[:, group] = np.where(curvature > 0, best, expected[:, group])
    np.testing.assert_allclose(scale.numpy(), expected, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [16, 64])
def test_no_row_costs_more_and_every_scale_can_be_stored(size: int, dtype: torch.dtype) -> None:
    weight, hessian = draw(40, 64, 1), hessian_of(64, 2)
    grid = grid_of(weight, size, dtype)
    rounded = grid.rounded(weight)
    rows = slice(3, 40, 5)
    scale = refit_scales(weight[rows], rounded[rows], hessian, grid, rows)
    assert torch.equal(scale.to(dtype).float(), scale)

    before = costs((weight - rounded)[rows].double().numpy(), dense(hessian))
    q = rescaled(rounded[rows], grid.scale[rows], scale)
    after = costs(weight[rows].double().numpy() - q, dense(hessian))
    assert (after <= before * (1 + 1e-5)).all()
    assert after.sum() < 0.99 * before.sum()


def test_scales_that_are_best_stay_to_the_bit() -> None:
    weight, hessian = draw(12, 32, 3), hessian_of(32, 3)
    grid = grid_of(weight, 16, torch.bfloat16)
    rounded = grid.rounded(weight)
    # a target that the codes meet
    assert torch.equal(refit_scales(rounded, rounded, hessian, grid, slice(None)), grid.scale)


def test_codes_of_zero_and_numbers_too_large_leave_a_scale_as_it_is() -> None:
    weight, hessian = draw(4, 32, 4), hessian_of(32, 4)
    weight[0, :16], weight[1, 16:] = 0.0, 3e38
    grid = grid_of(weight, 16, torch.bfloat16)
    scale = refit_scales(weight, grid.rounded(weight), hessian, grid, slice(None))
    assert scale[0, 0] == grid.scale[0, 0]
    assert scale[1, 1] == grid.scale[1, 1]
    assert scale.isfinite().all()


def test_no_row_costs_more_than_without_a_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = draw(60, 64, 5) * 0.02, draw(300, 64, 6) @ draw(64, 64, 7)
    stats = numerics.gptq_statistics(x, weight)
    factor = numerics.factorize_hessian(stats["hessian"].value, len(x))
    assert factor is not None

    def loss() -> torch.Tensor:
        rounded, grid = numerics.gptq_quantize(
            Layer("layer", weight, torch.bfloat16),
            stats,
            lambda w, importance: grid_of(w, 16, torch.bfloat16),
        )
        # the grid that is returned is the one that it was rounded on
        torch.testing.assert_close(grid.rounded(rounded), rounded, rtol=0, atol=0)
        return factor.loss(weight - rounded)

    fitted = loss()
    monkeypatch.setattr(numerics.IntegerGrid, "refits", False)
    once = loss()
    assert (fitted <= once * (1 + 1e-4)).all()
    assert fitted.sum() < 0.98 * once.sum()


def test_scales_that_rows_share_are_not_fitted() -> None:
    weight, x = draw(20, 32, 8), draw(100, 32, 9)

    def shared(w: torch.Tensor, importance: torch.Tensor | None) -> numerics.IntegerGrid:
        scale = torch.full((1, 1), 0.25).expand(len(w), 1)
        return numerics.IntegerGrid(scale, None, 4, 32)

    layer = Layer("layer", weight, torch.bfloat16)
    _, grid = numerics.gptq_quantize(layer, numerics.gptq_statistics(x, weight), shared)
    assert (grid.scale == 0.25).all()
