"""Factors that a run has folded into a tensor give the same numbers everywhere."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from bitpress.errors import CheckpointError
from bitpress.output.rescaling import rescale


def nearest(value: Fraction, dtype: torch.dtype) -> float:
    """The number of a dtype that is nearest to an exact one, by way of float32."""
    return float(torch.tensor(float(value), dtype=torch.float64).float().to(dtype))


def factor(eighths: int) -> Fraction:
    """2^(eighths / 8) to 100 bits."""
    below, above = Fraction(0), Fraction(1 << 20)
    for _ in range(140):
        middle = (below + above) / 2
        below, above = (middle, above) if middle**8 <= Fraction(2) ** eighths else (below, middle)
    return below


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_exact_arithmetic_rounded_once_a_step(dtype: torch.dtype) -> None:
    eighths = list(range(-112, 113, 5))
    tensor = torch.linspace(0.4, 1.7, len(eighths)).to(dtype)
    result = rescale(tensor, {"rows": [e / 8 for e in eighths]})
    assert result.dtype == dtype
    for value, e, number in zip(tensor.tolist(), eighths, result.tolist(), strict=True):
        rounded = Fraction(nearest(factor(e), torch.float32))
        assert number == nearest(Fraction(value) * rounded, dtype)


@pytest.mark.parametrize("eighth", range(1, 8))
def test_no_device_can_round_a_factor_otherwise(eighth: int) -> None:
    # float64 may be a few of its last places off: 2^-50 of the number; float32 has 24 digits
    digits = factor(eighth) * 2**23
    distance_to_middle = abs(digits % 1 - Fraction(1, 2))
    assert distance_to_middle > Fraction(1, 2**20)


def test_powers_of_two_round_nothing() -> None:
    tensor = torch.randn(6, 4).bfloat16()
    rescaled = {"columns": [1, -2, 0, 5], "rows": [3, 0, -1, 2, 14, -14]}
    expected = tensor.double() * torch.tensor(rescaled["columns"]).double().exp2()
    expected *= torch.tensor(rescaled["rows"]).double().exp2().unsqueeze(1)
    assert torch.equal(rescale(tensor, rescaled).double(), expected)


def test_rows_of_a_tensor_become_what_they_become_within_it() -> None:
    tensor = torch.randn(7, 3).bfloat16()
    rescaled = {"columns": [0.125, -1.5, 2], "rows": [i / 8 for i in range(7)]}
    whole = rescale(tensor, rescaled)
    parts = [rescale(tensor[first : first + 3], rescaled, first) for first in (0, 3, 6)]
    assert torch.equal(torch.cat(parts), whole)


def test_each_axis_rounds_in_the_order_in_which_it_was_multiplied() -> None:
    tensor = torch.randn(64, 64).bfloat16()
    columns, rows = {"columns": [0.375] * 64}, {"rows": [-0.25] * 64}
    expected = rescale(rescale(tensor, columns), rows)
    assert torch.equal(rescale(tensor, columns | rows), expected)
    assert not torch.equal(rescale(tensor, rows | columns), expected)


@pytest.mark.parametrize(
    "rescaled",
    [{"columns": [0.5]}, {"columns": [0.5] * 5}, {"rows": [0.5] * 6}, {"rows": []}, {"heads": [0]}],
)
def test_factors_that_do_not_fit_a_tensor_are_refused(rescaled: dict[str, list[float]]) -> None:
    with pytest.raises(CheckpointError, match=r"rescales its \w+ by \d exponents"):
        rescale(torch.ones(7, 3), rescaled)
