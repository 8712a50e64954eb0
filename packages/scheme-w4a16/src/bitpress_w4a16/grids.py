"""The scales, and zero points, that are tried for a group of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitpress import numerics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# in units of what reaches the largest weight; with few bits, a clipped weight may cost less than a
# coarse step. With 8 and a zero point, where both ends are reached, it never does. Of equals the
# first is taken, the one that clips least
SYMMETRIC = {
    4: tuple(1.08 - 0.02 * i for i in range(32)),
    8: tuple(1.02 - 0.02 * i for i in range(24)),
}
ASYMMETRIC = {4: tuple(1.05 - 0.025 * i for i in range(21)), 8: (1.0,)}


def fit(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group: int,
    symmetric: bool,
    dtype: torch.dtype,
) -> numerics.IntegerGrid:
    """The grid of the least Σ importance (w - q)², its scales numbers of `dtype`.

    Args:
        weight: (out, in) float32, the width a multiple of `group`.
        importance: (in,) what an error costs in each column; None where all cost the same.
    """
    if symmetric:
        return numerics.fit_symmetric(weight, importance, bits, group, SYMMETRIC[bits], dtype)
    return numerics.fit_asymmetric(weight, importance, bits, group, ASYMMETRIC[bits], dtype)
