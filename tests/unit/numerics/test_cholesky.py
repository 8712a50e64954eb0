"""The factor of a wide matrix, made panel by panel, is the one that numpy finds in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
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
            factor = cholesky_(matrix.clone())
        assert factor is not None
        factors.append(factor)
    expected = np.linalg.cholesky(matrix.double().numpy())
    np.testing.assert_allclose(factors[0].numpy(), expected, rtol=0, atol=2e-5)
    assert all(torch.equal(factor, factors[0]) for factor in factors)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("row", [0, -1])
def test_a_matrix_that_is_not_positive_definite_has_none(width: int, row: int) -> None:
    matrix = moments(width)
    matrix[row, row] = -1.0
    assert cholesky_(matrix) is None
