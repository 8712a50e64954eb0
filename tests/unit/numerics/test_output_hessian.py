"""Rows that make up for each other's errors, held against a slow float64 reference that solves for
all rows and columns that are still free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray

from bitpress import numerics
from bitpress.numerics import block_sweep, output_hessian
from bitpress.numerics.output_hessian import FEW_ROW_GROUPS, ROW_BLOCK, block_size
from bitpress.numerics.wavefront import sweep_waves
from bitpress.schemes.values import Layer, Statistic

Array = NDArray[np.float64]

# (weight, factor, grid, factor of the rows) -> what the weight becomes, and what it costs each row
Sweep = Callable[
    [torch.Tensor, numerics.Factor, numerics.IntegerGrid, numerics.RowFactor | None],
    tuple[torch.Tensor, torch.Tensor],
]


def gradients(tokens: int, rows: int, seed: int) -> torch.Tensor:
    """(tokens, out) float32 of outputs that are alike in parts and unlike in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rows, rows, generator=generator) / rows**0.5
    size = torch.rand(rows, generator=generator) * 3 + 0.1
    return torch.randn(tokens, rows, generator=generator) @ mixing * size


def inputs(tokens: int, width: int, seed: int) -> torch.Tensor:
    return gradients(tokens, width, seed + 500)


def weights(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def factorize(x: torch.Tensor) -> numerics.Factor:
    factor = numerics.factorize_hessian(x.T @ x, len(x))
    assert factor is not None
    return factor


def row_factor(gradient: torch.Tensor) -> numerics.RowFactor | None:
    return numerics.factorize_output_hessian(numerics.output_statistics(gradient))


def dense_coupling(factor: numerics.RowFactor, rows: int) -> torch.Tensor:
    """(rows, rows) float64, what each row's target loses for the errors of the others."""
    order = torch.arange(factor.block).view(-1, factor.num_groups).T.reshape(-1)
    blocks = torch.empty_like(factor.coupling, dtype=torch.float64)
    blocks[:, order.unsqueeze(1), order] = factor.coupling.double()
    return torch.block_diag(*blocks)[:rows, :rows]


def three_bits(weight: torch.Tensor) -> numerics.IntegerGrid:
    return numerics.fit_symmetric(weight, None, 3, weight.shape[1], (0.9, 1.0))


def damped_input_hessian(factor: numerics.Factor) -> Array:
    unit, order = factor.unit.double().numpy(), factor.order.numpy()
    hessian = np.empty_like(unit)
    hessian[np.ix_(order, order)] = (unit * factor.variance.double().numpy()) @ unit.T
    return hessian


def damped_output_hessian(gradient: torch.Tensor) -> Array:
    """Of rows that are all in one block."""
    g = gradient.double().numpy()
    hessian: Array = g.T @ g
    mean = hessian.diagonal().mean()
    damping = output_hessian.DAMPING + block_size(len(hessian)) / len(g)
    return hessian / mean + damping * np.eye(len(hessian))


def best_free(hessian: Array, decided: list[int], error: Array, free: list[int]) -> Array:
    """The errors of what is free that cost least beside those of what is decided: (free, ...)."""
    among_free, coupling = hessian[np.ix_(free, free)], hessian[np.ix_(free, decided)]
    solution: Array = -np.linalg.solve(among_free, coupling @ error)
    return solution


def slow_two_sided(
    weight: torch.Tensor, h_in: Array, h_out: Array, order: list[int], grid: numerics.IntegerGrid
) -> Array:
    """Group after group of rows, and in each column after column: what is decided is made up for by
    all that is free.
    """
    rows, width = weight.shape
    w, error = weight.double().numpy(), np.zeros((rows, width))
    scale = grid.scale.double().numpy()[:, 0]
    for group in range(min(FEW_ROW_GROUPS, rows)):
        own = list(range(group, rows, FEW_ROW_GROUPS))
        decided = [i for g in range(group) for i in range(g, rows, FEW_ROW_GROUPS)]
        free = [i for g in range(group, FEW_ROW_GROUPS) for i in range(g, rows, FEW_ROW_GROUPS)]
        target = w[own].copy()
        if decided:
            target += best_free(h_out, decided, error[decided], free)[: len(own)]
        for row, wanted in zip(own, target, strict=True):
            decided_columns: list[int] = []
            row_error = np.zeros(width)
            for position, column in enumerate(order):
                number = wanted[column]
                if decided_columns:
                    columns = order[position:]
                    number += best_free(h_in, decided_columns, row_error[decided_columns], columns)[
                        0
                    ]
                quantized = np.clip(np.round(number / scale[row]), -4, 3) * scale[row]
                row_error[column] = quantized - wanted[column]
                decided_columns.append(column)
            error[row] = wanted + row_error - w[row]
    return w + error


@pytest.fixture(params=["group after group", "side by side"])
def sweep(request: pytest.FixtureRequest) -> Iterator[Sweep]:
    """A sweep whose groups of rows wait for the whole of the groups before them, and one in which
    they follow each other through small blocks of columns.
    """

    def sweep_columns(
        weight: torch.Tensor,
        factor: numerics.Factor,
        grid: numerics.IntegerGrid,
        factor_of_rows: numerics.RowFactor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rule = grid.rounding_rule if request.param == "side by side" else None
        return numerics.column_sweep(
            weight, factor, grid.nearest, row_factor=factor_of_rows, rule=rule
        )

    with patch.object(block_sweep, "BLOCK", 4), patch.object(block_sweep, "LEAF", 2):
        yield sweep_columns


@settings(
    derandomize=True,
    deadline=None,
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(1, 21), st.integers(2, 12), st.integers(0, 1000))
def test_rows_and_columns_make_up_for_what_is_decided_as_the_slow_reference_does(
    sweep: Sweep, rows: int, width: int, seed: int
) -> None:
    weight, x, g = weights(rows, width, seed), inputs(60, width, seed), gradients(90, rows, seed)
    factor, grid = factorize(x), three_bits(weight)
    quantized, _ = sweep(weight, factor, grid, row_factor(g))
    expected = slow_two_sided(
        weight,
        damped_input_hessian(factor),
        damped_output_hessian(g),
        factor.order.tolist(),
        grid,
    )
    np.testing.assert_allclose(quantized.numpy(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("rows", "width"), [(3, 7), (40, 32), (1030, 18)])
def test_a_row_costs_what_its_error_costs_beside_the_rows_before_it(
    sweep: Sweep, rows: int, width: int
) -> None:
    weight, factor = weights(rows, width, 9), factorize(inputs(200, width, 9))
    factor_of_rows = row_factor(gradients(300, rows, 9))
    assert factor_of_rows is not None
    quantized, cost = sweep(weight, factor, three_bits(weight), factor_of_rows)

    targets = weight.double() - dense_coupling(factor_of_rows, rows) @ (quantized - weight).double()
    missed = (targets - quantized.double()).numpy()
    expected = np.einsum("ri,ij,rj->r", missed, damped_input_hessian(factor), missed)
    np.testing.assert_allclose(cost.numpy(), expected, rtol=2e-4)
    moved = factor_of_rows.move(weight, quantized)
    torch.testing.assert_close(moved.double(), targets, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (40, 130), (1030, 18)])
def test_a_sweep_side_by_side_gives_the_targets_that_its_errors_have_moved(
    rows: int, width: int
) -> None:
    weight, factor = weights(rows, width, 9), factorize(inputs(200, width, 9))
    rule, factor_of_rows = three_bits(weight).rounding_rule, row_factor(gradients(300, rows, 9))
    swept = sweep_waves(weight, factor, rule, factor_of_rows)
    expected = weight if factor_of_rows is None else factor_of_rows.move(weight, swept.numbers)
    torch.testing.assert_close(swept.target, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 8, 13, 512, 700, 1030])
def test_the_statistic_is_the_blocks_of_the_gram_matrix_of_gradients(rows: int) -> None:
    gradient = gradients(40, rows, 3)
    parts = [numerics.output_statistics(part)["output_hessian"] for part in gradient.split(25)]
    statistic = parts[0] | parts[1]
    full = gradient.double().T @ gradient.double()
    assert statistic.rows
    assert statistic.value.shape == (rows, block_size(rows))
    for row in range(0, rows, 7):
        first = row // block_size(rows) * block_size(rows)
        expected = torch.zeros(block_size(rows), dtype=torch.float64)
        own = full[row, first : first + block_size(rows)]
        expected[: len(own)] = own
        torch.testing.assert_close(statistic.value[row].double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("rows", "width"), [(16, 24), (100, 32), (1100, 16)])
def test_outputs_that_are_unrelated_leave_the_sweep_as_it_is_to_the_bit(
    rows: int, width: int
) -> None:
    weight = weights(rows, width, 1)
    hessian = torch.zeros(rows, block_size(rows))
    for row in range(rows):
        hessian[row, row % block_size(rows)] = 1.0 + row % 5
    of_outputs = {
        "output_hessian": Statistic(hessian, "sum", rows=True),
        "gradient_tokens": Statistic(torch.tensor(100.0), "sum"),
    }
    assert numerics.factorize_output_hessian(of_outputs) is None

    stats = numerics.gptq_statistics(inputs(200, width, 1), weight)
    related = {**stats, **of_outputs}
    layer = Layer("layer", weight, torch.bfloat16)
    one_sided, two_sided = (
        numerics.gptq_quantize(layer, given_stats, lambda w, importance: three_bits(w))[0]
        for given_stats in (stats, related)
    )
    assert torch.equal(one_sided, two_sided)


@pytest.mark.parametrize(("rows", "width"), [(64, 48), (1030, 16), (9000, 8)])
def test_the_model_loses_less_where_rows_make_up_for_each_other(
    sweep: Sweep, rows: int, width: int
) -> None:
    weight, x = weights(rows, width, 2), inputs(400, width, 2)
    # outputs alike in blocks: a few directions of each matter
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(4, rows, generator=generator)
    g = torch.randn(300, 4, generator=generator) @ directions
    g += 0.3 * torch.randn(300, rows, generator=generator)
    factor, grid = factorize(x), three_bits(weight)
    h_in = damped_input_hessian(factor)

    losses = []
    for rows_factor in (None, row_factor(g)):
        quantized, _ = sweep(weight, factor, grid, rows_factor)
        error = (quantized - weight).double().numpy()
        of_gradients = g.double().numpy() @ error  # (gradients, in)
        losses.append(float(np.einsum("gi,ij,gj->", of_gradients, h_in, of_gradients)))
    assert losses[1] < 0.75 * losses[0]


def test_the_same_input_gives_the_same_bits(sweep: Sweep) -> None:
    weight, factor = weights(1100, 40, 4), factorize(inputs(200, 40, 4))
    grid, rows = three_bits(weight), row_factor(gradients(300, 1100, 4))
    first, second = (sweep(weight, factor, grid, rows)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_relate_nothing(bad: float) -> None:
    stats = numerics.output_statistics(gradients(30, 20, 5))
    stats["output_hessian"].value[3, 4] = bad
    assert numerics.factorize_output_hessian(stats) is None


def test_the_fewer_tokens_there_are_the_less_rows_are_taken_to_be_related() -> None:
    gradient = gradients(4000, 64, 8)
    norms = []
    for tokens in (4000, 100, 10):
        factor = row_factor(gradient[:tokens])
        assert factor is not None
        norms.append(float(factor.coupling.norm()))
    assert norms[0] > norms[1] > norms[2]


def test_without_gradients_no_rows_are_related() -> None:
    assert numerics.factorize_output_hessian({}) is None


def test_zeros_stay_zero_and_rows_of_huge_numbers_leave_others_finite() -> None:
    weight, x, g = weights(40, 32, 6), inputs(200, 32, 6), gradients(200, 40, 6)
    mask = torch.rand(40, 32, generator=torch.Generator().manual_seed(6)) < 0.5
    weight *= mask
    weight[5] = torch.where(mask[5], 1e38, 0.0)
    stats = numerics.gptq_statistics(x, weight) | numerics.output_statistics(g)
    layer = Layer("layer", weight, torch.bfloat16)
    quantized, _ = numerics.gptq_quantize(layer, stats, lambda w, importance: three_bits(w))
    assert not quantized[~mask].any()
    assert quantized.isfinite().all()


@pytest.mark.parametrize("rows", [*range(1, 20), ROW_BLOCK - 1, ROW_BLOCK, ROW_BLOCK + 1])
def test_every_row_is_decided_once(rows: int) -> None:
    weight, factor = weights(rows, 4, 7), factorize(inputs(60, 4, 7))
    decided: list[int] = []

    def project(target: torch.Tensor, which: slice, column: int) -> torch.Tensor:
        if column == factor.order[0]:
            decided.extend(range(*which.indices(rows)))
        return target

    factor_of_rows = row_factor(gradients(50, rows, 7))
    numerics.column_sweep(weight, factor, project, row_factor=factor_of_rows)
    assert sorted(decided) == list(range(rows))
