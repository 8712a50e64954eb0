"""The factor of a matrix, made panel by panel, or with others on a GPU, is that of float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fixtures.fake_gpu import GPU, Pretended, bare
from torch import Tensor

from bitpress.numerics.cholesky import MAX_WHOLE, PANEL, ROWS, cholesky_
from bitpress.runtime.lanes import Lanes

# a narrow one, and two whose last panel and last rows are not full
WIDTHS = [70, MAX_WHOLE + 1, MAX_WHOLE + PANEL + ROWS // 2 + 7]


def moments(width: int) -> Tensor:
    inputs = torch.randn(width + 100, width, generator=torch.Generator().manual_seed(width))
    matrix = inputs.T @ inputs / len(inputs)
    matrix.diagonal().add_(0.1)
    return matrix


@pytest.mark.parametrize("width", WIDTHS)
def test_the_factor_is_that_of_float64_and_the_same_in_any_number_of_lanes(width: int) -> None:
    matrix = moments(width)
    factors = []
    for num_lanes in (1, 2, 16):
        with Lanes(num_lanes) as lanes, lanes.offer():
            (factor,), is_definite = cholesky_(matrix.clone().unsqueeze(0))
        assert is_definite
        factors.append(factor)
    expected = np.linalg.cholesky(matrix.double().numpy())
    np.testing.assert_allclose(factors[0].numpy(), expected, rtol=0, atol=2e-5)
    assert all(torch.equal(factor, factors[0]) for factor in factors)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("row", [0, -1])
def test_a_matrix_that_is_not_positive_definite_has_none(width: int, row: int) -> None:
    matrix = moments(width)
    matrix[row, row] = -1.0
    _, is_definite = cholesky_(torch.stack([moments(width), matrix]))
    assert is_definite.tolist() == [True, False]


@pytest.mark.parametrize("width", [1, PANEL - 3, PANEL, 3 * PANEL + 5])
def test_a_gpu_factors_matrices_together_of_which_one_is_not_positive_definite(width: int) -> None:
    matrices = torch.stack([moments(width), 3 * moments(width), -moments(width), moments(width)])
    with Pretended():
        factors, are_definite = cholesky_(matrices.to(GPU))
    assert bare(are_definite).tolist() == [True, True, False, True]
    definite = [0, 1, 3]
    expected = np.linalg.cholesky(matrices[definite].double().numpy())
    np.testing.assert_allclose(bare(factors)[definite].numpy(), expected, rtol=0, atol=2e-5)
