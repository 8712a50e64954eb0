"""Cholesky factors of wide matrices, whose rows are computed side by side where lanes are
offered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.runtime.batching import read_number
from bitpress.runtime.lanes import offered_lanes

# Up to this width a factor takes next to no time beside what is made with it.
MAX_WHOLE = 2048

# Columns that are factored one panel after the other, and rows of a panel that are computed
# together: as fast on one core as LAPACK's factor of the whole.
PANEL, ROWS = 256, 1024


def cholesky_(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor in the memory of a matrix, the same for any number of lanes; None
    where the matrix is not positive definite.

    Args:
        matrix: (n, n) float32, symmetric and contiguous; used up.
    """
    if matrix.device.type != "cpu" or len(matrix) <= MAX_WHOLE:
        # Symmetric, it may be read as having contiguous columns: it is factored in place then.
        lower = matrix.mT
        info = torch.empty((), dtype=torch.int32, device=matrix.device)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        return None if read_number(info) else lower

    for first in range(0, len(matrix), PANEL):
        panel = slice(first, min(first + PANEL, len(matrix)))
        if not _factorize_panel(matrix, panel):
            return None
    return matrix.tril_()


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
