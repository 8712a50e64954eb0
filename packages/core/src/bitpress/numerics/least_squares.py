"""The best weights on given places, the others being zero."""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.numerics.columns import ROWS
from bitpress.numerics.hessian import Factor

# Steps of conjugate gradients; more of them gain less than 1 %.
STEPS = 10


def masked_least_squares(weight: Tensor, target: Tensor, factor: Factor, mask: Tensor) -> Tensor:
    """The weight brought nearer to the least (t - q) H (t - q)ᵀ of each row, among those that are
    zero where `mask` is False.

    Conjugate gradients on many rows at once, preconditioned by H's diagonal (Meng et al., "ALPS",
    arXiv 2406.07831, algorithm 2). No step makes a row worse; one whose numbers are too large to be
    squared stays as it was.

    Args:
        weight: (out, in) float32, where to begin; what lies outside `mask` is dropped.
        target: (out, in) float32.
        mask: (out, in) bool.
    """
    tiles = zip(*(torch.split(tensor, ROWS) for tensor in (weight, target, mask)), strict=True)
    return torch.cat([_solve(torch.where(m, w, 0.0), t, factor, m) for w, t, m in tiles])


def _solve(start: Tensor, target: Tensor, factor: Factor, mask: Tensor) -> Tensor:
    solution, inverse = start.clone(), 1 / factor.diagonal
    # Half of how the loss falls.
    residual = factor.multiply(target - start).mul_(mask)  # (rows, in)
    direction = residual * inverse
    size = (residual * direction).sum(1, keepdim=True)  # (rows, 1)
    for _ in range(STEPS):
        product = factor.multiply(direction).mul_(mask)
        curvature = (direction * product).sum(1, keepdim=True)
        # A row that has arrived stays.
        length = torch.where(curvature > 0, size / curvature, 0.0)
        solution.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        scaled = residual * inverse
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        direction = scaled.addcmul_(torch.where(before > 0, size / before, 0.0), direction)
    return torch.where(solution.isfinite().all(1, keepdim=True), solution, start)
