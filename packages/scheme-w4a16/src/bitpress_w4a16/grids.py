"""The scales, and zero points, that are tried for a group of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitpress import numerics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# in units of what reaches the largest weight; with few bits, a clipped weight may cost less than a coarse step. With 8, the
# largest come first: next to them it is soon seen that the others clip too much
SYMMETRIC = {4: tuple(0.475 + 0.05 * i for i in range(13)), 8: tuple(0.5 + 0.04 * i for i in reversed(range(14)))}
ASYMMETRIC = {4: tuple(0.6 + 0.05 * i for i in range(10)), 8: tuple(0.7 + 0.06 * i for i in reversed(range(6)))}
FINER = {4: 0.025, 8: None}  # with 8 bits what a scale costs depends on where it puts each weight: any may be best


def fit(
    weight: Tensor, importance: Tensor | None, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> numerics.IntegerGrid:
    """The grid of the least Σ importance (w - q)², its scales numbers of `dtype`.

    Args:
        weight: (out, in) float32, the width a multiple of `group`.
        importance: (in,) what an error costs in each column; None where all cost the same.
    """
    if symmetric:
        return numerics.fit_symmetric(weight, importance, bits, group, SYMMETRIC[bits], dtype, FINER[bits])
    return numerics.fit_asymmetric(weight, importance, bits, group, ASYMMETRIC[bits], dtype, FINER[bits])
