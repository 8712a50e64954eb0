"""The best weights under a mask, the others being zero."""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.numerics.hessian import Factor
from bitpress.numerics.rows import ROW_TILE

# Steps of conjugate gradients; more of them gain less than 1 %.
NUM_STEPS = 10


def masked_least_squares(weight: Tensor, target: Tensor, factor: Factor, mask: Tensor) -> Tensor:
    """The weight brought nearer to the least (target - q) H (target - q)ᵀ of each row, among the q
    that are zero where `mask` is False.

    Conjugate gradients on many rows at once, preconditioned by H's diagonal (Meng et al., "ALPS",
    arXiv 2406.07831, algorithm 2). No step makes a row worse; one whose numbers are too large to be
    squared stays as it was.

    Args:
        weight: (out, in) float32, where to begin; what lies outside `mask` is dropped.
        target: (out, in) float32.
        factor: of H.
        mask: (out, in) bool.

    Returns:
        (out, in) float32.
    """
    tiles = zip(*(torch.split(tensor, ROW_TILE) for tensor in (weight, target, mask)), strict=True)
    return torch.cat(
        [
            _conjugate_gradients(torch.where(mask_tile, start, 0.0), target_tile, factor, mask_tile)
            for start, target_tile, mask_tile in tiles
        ]
    )


def _conjugate_gradients(start: Tensor, target: Tensor, factor: Factor, mask: Tensor) -> Tensor:
    """Some rows after `NUM_STEPS` steps; all rows of a tile go their own step lengths at once."""
    solution, preconditioner = start.clone(), 1 / factor.diagonal
    # Half the negative gradient of the loss.
    residual = factor.multiply(target - start).mul_(mask)  # (rows, in)
    direction = residual * preconditioner
    squared_norm = (residual * direction).sum(1, keepdim=True)  # (rows, 1)

    for _ in range(NUM_STEPS):
        product = factor.multiply(direction).mul_(mask)
        curvature = (direction * product).sum(1, keepdim=True)
        # A row that has converged stays as it is: there both are 0.
        step_length = torch.where(curvature > 0, squared_norm / curvature, 0.0)
        solution.addcmul_(step_length, direction)
        residual.addcmul_(step_length, product, value=-1)

        preconditioned = residual * preconditioner
        previous_norm = squared_norm
        squared_norm = (residual * preconditioned).sum(1, keepdim=True)
        beta = torch.where(previous_norm > 0, squared_norm / previous_norm, 0.0)  # (rows, 1)
        direction = preconditioned.addcmul_(beta, direction)

    return torch.where(solution.isfinite().all(1, keepdim=True), solution, start)
