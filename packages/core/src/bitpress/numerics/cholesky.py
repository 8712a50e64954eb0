"""Cholesky factors: of wide matrices their rows are computed side by side where lanes are offered,
and on a GPU those of several matrices with a batch axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.runtime.lanes import offered_lanes

# Up to this width a factor takes next to no time beside what is made with it.
MAX_WHOLE = 2048

# Columns that are factored one panel after the other, and rows of a panel that are computed
# together: as fast on one core as LAPACK's factor of the whole.
PANEL, ROWS = 256, 1024


def cholesky_(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The lower Cholesky factors in the memory of matrices, the same for any number of lanes.

    Args:
        matrices: (layers, n, n) float32, symmetric and contiguous; used up.

    Returns:
        (layers, n, n), and for each whether its matrix is positive definite, (layers,) bool; where
        it is not, the factor means nothing.
    """
    is_on_cpu, num_layers = matrices.device.type == "cpu", len(matrices)
    if is_on_cpu and matrices.shape[1] > MAX_WHOLE:
        is_definite = torch.tensor([_factorize_in_panels(matrix) for matrix in matrices])
        return matrices.tril_(), is_definite
    if not is_on_cpu and num_layers > 1:
        return _factorize_together(matrices)

    # Symmetric, it may be read as having contiguous columns: it is factored in place then.
    lowers = matrices.mT
    info = torch.empty(num_layers, dtype=torch.int32, device=matrices.device)
    for lower, own_info in zip(lowers, info, strict=True):
        torch.linalg.cholesky_ex(lower, out=(lower, own_info))
    return lowers, info == 0


def _factorize_together(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """What `cholesky_` returns: panel by panel for all matrices at once, since what a GPU has for
    many matrices is made for small ones.
    """
    width = matrices.shape[1]
    info = torch.zeros(len(matrices), dtype=torch.int32, device=matrices.device)
    for first in range(0, width, PANEL):
        panel = slice(first, min(first + PANEL, width))
        before, columns = matrices[:, first:, :first], matrices[:, first:, panel]
        columns.baddbmm_(before, matrices[:, panel, :first].mT, alpha=-1)
        diagonal, below = matrices[:, panel, panel], matrices[:, panel.stop :, panel]
        lower, own_info = torch.linalg.cholesky_ex(diagonal)
        info |= own_info
        diagonal.copy_(lower)
        below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
    return matrices.tril_(), info == 0


def _factorize_in_panels(matrix: Tensor) -> bool:
    """Put the lower factor where a matrix has it; false where it is not positive definite."""
    panels = (slice(i, min(i + PANEL, len(matrix))) for i in range(0, len(matrix), PANEL))
    return all(_factorize_panel(matrix, panel) for panel in panels)


def _factorize_panel(matrix: Tensor, panel: slice) -> bool:
    """Put columns of the factor where the matrix has them; false where it is not positive definite.

    Args:
        matrix: whose columns before the panel are those of the factor already.
    """
    own_rows = matrix[panel, : panel.start]  # (panel, columns before)
    diagonal = matrix[panel, panel].addmm_(own_rows, own_rows.T, alpha=-1)
    lower, info = torch.linalg.cholesky_ex(diagonal)
    if info:
        return False
    diagonal.copy_(lower)

    def fill(first_row: int) -> None:
        rows = slice(first_row, first_row + ROWS)
        remainder = matrix[rows, panel].addmm_(matrix[rows, : panel.start], own_rows.T, alpha=-1)
        remainder.copy_(torch.linalg.solve_triangular(lower.mT, remainder, upper=True, left=False))

    for _ in offered_lanes().map(fill, range(panel.stop, len(matrix), ROWS)):
        pass
    return True
