"""The best weights under a mask, the others being zero."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bitpress.numerics.hessian import Factor
from bitpress.numerics.rows import ROW_TILE, compute_rows

# Rows that are multiplied at least, zeros among them: a product of fewer may round otherwise.
FEWEST_ROWS = 16

# Steps of conjugate gradients for rows that are alone; more of them gain less than 1 %.
NUM_STEPS = 10

# For rows that make up for each other's errors, which takes longer: 30 steps gain 1.8 times what 10
# do.
NUM_COUPLED_STEPS = 30


def masked_least_squares(
    weight: Tensor,
    target: Tensor,
    factor: Factor,
    mask: Tensor,
    output_hessian: Tensor | None = None,
) -> Tensor:
    """The weight brought nearer to the least tr(H_O E H Eᵀ), E = target - q, among the q that are
    zero where `mask` is False.

    Conjugate gradients on many rows at once, preconditioned by the diagonals of H and H_O (Meng et
    al., "ALPS", arXiv 2406.07831, algorithm 2). No step makes a block of rows worse; one whose
    numbers are too large to be squared stays as it was.

    Args:
        weight: (out, in) float32, where to begin; what lies outside `mask` is dropped.
        target: (out, in) float32.
        factor: of H.
        mask: (out, in) bool.
        output_hessian: (blocks, block, block) floating, H_O, one block for so many rows; None where
            rows are alone.

    Returns:
        (out, in) float32.
    """
    block = 1 if output_hessian is None else output_hessian.shape[1]
    width = weight.shape[1]

    def solve(rows: slice) -> Tensor:
        # rows of the last block that there are not are masked
        missing = -(rows.stop - rows.start) % max(block, FEWEST_ROWS)
        start, own_target, own_mask = (
            functional.pad(tensor[rows], (0, 0, 0, missing)).view(-1, block, width)
            for tensor in (weight, target, mask)
        )
        own_hessian = None
        if output_hessian is not None:
            first_block = rows.start // block
            blocks = slice(first_block, first_block + len(start))
            own_hessian = output_hessian[blocks].to(weight.dtype)
        system = _System(factor, own_mask, own_hessian)
        solution = system.descend(torch.where(own_mask, start, 0.0), own_target)
        return solution.view(-1, width)[: rows.stop - rows.start]

    return compute_rows(weight, solve, max(ROW_TILE // block, 1) * block)


class _System:
    """The equations of some blocks of rows, which are solved side by side: blocks, rows of a block
    and columns are the axes of all tensors.

    Args:
        factor: of H.
        mask: (blocks, block, in) bool.
        output_hessian: (blocks, block, block) float32; None where a block is a row.
    """

    def __init__(self, factor: Factor, mask: Tensor, output_hessian: Tensor | None) -> None:
        self._factor, self._mask, self._output_hessian = factor, mask, output_hessian
        self._preconditioner = 1 / factor.diagonal
        self._num_steps = NUM_STEPS
        if output_hessian is not None:
            output_diagonal = output_hessian.diagonal(dim1=1, dim2=2).unsqueeze(2)
            self._preconditioner = self._preconditioner / output_diagonal  # (blocks, block, in)
            self._num_steps = NUM_COUPLED_STEPS

    def descend(self, start: Tensor, target: Tensor) -> Tensor:
        """Conjugate gradients from a start that keeps to the mask."""
        solution = start.clone()
        # Half the negative gradient of the loss.
        residual = self._multiply(target - start)
        direction = residual * self._preconditioner
        squared_norm = _dot(residual, direction)  # (blocks, 1, 1)

        for _ in range(self._num_steps):
            product = self._multiply(direction)
            curvature = _dot(direction, product)
            # A block that has converged stays as it is: there both are 0.
            step_length = torch.where(curvature > 0, squared_norm / curvature, 0.0)
            solution.addcmul_(step_length, direction)
            residual.addcmul_(step_length, product, value=-1)

            preconditioned = residual * self._preconditioner
            previous_norm = squared_norm
            squared_norm = _dot(residual, preconditioned)
            beta = torch.where(previous_norm > 0, squared_norm / previous_norm, 0.0)
            direction = preconditioned.addcmul_(beta, direction)

        return torch.where(solution.isfinite().all(2, True).all(1, True), solution, start)

    def _multiply(self, error: Tensor) -> Tensor:
        """H_O E H, where the mask is True."""
        product = self._factor.multiply(error.flatten(0, 1)).view_as(error)
        if self._output_hessian is not None:
            product = self._output_hessian @ product
        return product.mul_(self._mask)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of blocks: (blocks, 1, 1)."""
    # first along rows: what a row alone gives does not depend on how many there are
    return (a * b).sum(2, keepdim=True).sum(1, keepdim=True)
