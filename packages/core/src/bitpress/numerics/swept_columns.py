"""The columns of a weight while they are swept."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor


@frozen(eq=False)
class SweptColumns:
    """The columns of some rows, in the order in which they are decided.

    Attributes:
        order: (in,) which columns they are.
        original: (in, rows) float32, the weight.
        target: (in, rows), the original moved by the errors of the columns before.
        projected: (in, rows), what targets have become.
        error: (in, rows), original - projected.
    """

    order: Tensor
    original: Tensor
    target: Tensor
    projected: Tensor
    error: Tensor

    @classmethod
    def undecided(cls, weight: Tensor, order: Tensor) -> SweptColumns:
        """Those of a weight (rows, in), before a sweep."""
        # Transposed, a column is contiguous.
        original = weight.T.contiguous().index_select(0, order)
        projected, error = torch.empty_like(original), torch.empty_like(original)
        return cls(order, original, original.clone(), projected, error)
