"""The best weights on given places, the others being zero."""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.numerics.columns import ROWS
from bitpress.numerics.hessian import Factor

# of conjugate gradients: more gain less than 1 %
STEPS = 10


def masked_least_squares(weight: Tensor, target: Tensor, factored: Factor, keep: Tensor) -> Tensor:
    """The weight brought nearer to the least (t - q) H (t - q)ᵀ of each row, among those that are
    zero where `keep` is False.

    Conjugate gradients on many rows at once, preconditioned by H's diagonal (Meng et al., "ALPS",
    arXiv 2406.07831, algorithm 2). No step makes a row worse; one whose numbers are too large to be
    squared stays as it was.

    Args:
        weight: (out, in) float32, where to begin; what lies outside `keep` is dropped.
        target: (out, in) float32.
        keep: (out, in) bool.
    """
    tiles = zip(*(torch.split(tensor, ROWS) for tensor in (weight, target, keep)), strict=True)
    return torch.cat([_solve(torch.where(k, w, 0.0), t, factored, k) for w, t, k in tiles])


def _solve(start: Tensor, target: Tensor, factored: Factor, keep: Tensor) -> Tensor:
    found, inverse = start.clone(), 1 / factored.diagonal
    residual = factored.multiply(target - start).mul_(
        keep
    )  # (rows, in): half of how the loss falls
    ahead = residual * inverse
    size = (residual * ahead).sum(1, keepdim=True)  # (rows, 1)
    for _ in range(STEPS):
        product = factored.multiply(ahead).mul_(keep)
        curvature = (ahead * product).sum(1, keepdim=True)
        # a row that has arrived stays
        length = torch.where(curvature > 0, size / curvature, 0.0)
        found.addcmul_(length, ahead)
        residual.addcmul_(length, product, value=-1)
        scaled = residual * inverse
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        ahead = scaled.addcmul_(torch.where(before > 0, size / before, 0.0), ahead)
    return torch.where(found.isfinite().all(1, keepdim=True), found, start)
