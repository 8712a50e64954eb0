"""Second moments of a layer's inputs: damped, put in order, and factored for error feedback.

Letters: H = E[x xᵀ] (in, in), over calibration tokens. Sources: Frantar et al., "GPTQ", arXiv
2210.17323; Chee et al., "QuIP", arXiv 2307.13304 (the LDL form, and that both are the same method).
"""

from __future__ import annotations

import math

import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics.gram import stripes


@frozen(eq=False)
class Factor:
    """H = U D Uᵀ with columns in the order in which they are decided.

    Attributes:
        order: (in,) the columns, most active first.
        unit: (in, in) float32 U, upper triangular with ones on its diagonal, rows and columns in
            that order.
        variance: (in,) float32 D: what an error in a column costs once the columns after it make up
            for it as well as they can.
        diagonal: (in,) float32 of the damped H, in the columns' own order: what an error costs when
            nothing makes up for it.
    """

    order: Tensor
    unit: Tensor
    variance: Tensor
    diagonal: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """X with X H = right: (rows, in) -> (rows, in)."""
        x = right.index_select(1, self.order)
        x = (
            torch.linalg.solve_triangular(
                self.unit.T, x, upper=False, left=False, unitriangular=True
            )
            / self.variance
        )
        x = torch.linalg.solve_triangular(self.unit, x, upper=True, left=False, unitriangular=True)
        return torch.empty_like(x).index_copy_(1, self.order, x)

    def multiply(self, left: Tensor) -> Tensor:
        """The product with H: (rows, in) -> (rows, in)."""
        x, found = left.index_select(1, self.order), torch.empty_like(left)
        # what lies below U's diagonal is zero
        for columns in stripes(x.shape[1]):
            found[:, columns] = x[:, : columns.stop] @ self.unit[: columns.stop, columns]
        found *= self.variance
        for columns in stripes(x.shape[1]):
            x[:, columns] = found[:, columns.start :] @ self.unit[columns, columns.start :].T
        return torch.empty_like(x).index_copy_(1, self.order, x)

    def loss(self, error: Tensor) -> Tensor:
        """What an error costs each row: (rows, in) -> (rows,), the diagonal of error H errorᵀ."""
        error = error.index_select(1, self.order)
        cost = error.new_zeros(len(error))
        # what lies below U's diagonal is zero
        for columns in stripes(error.shape[1]):
            cost += self._cost_in(error, columns)
        return cost

    def covers(self, cost: Tensor, error: Tensor) -> Tensor:
        """Whether a cost (rows,) is at most what an error (rows, in) costs its row; of that no more
        is taken than tells.
        """
        error = error.index_select(1, self.order)
        found, so_far = torch.zeros_like(cost, dtype=torch.bool), torch.zeros_like(cost)
        # of which it is not known yet
        rows = torch.arange(len(cost), device=cost.device)
        for columns in stripes(error.shape[1]):
            so_far += self._cost_in(error, columns)
            known = cost[rows] <= so_far
            found[rows] = known
            rows, error, so_far = rows[~known], error[~known], so_far[~known]
        return found

    def _cost_in(self, error: Tensor, columns: slice) -> Tensor:
        return (
            error[:, : columns.stop] @ self.unit[: columns.stop, columns]
        ).square_() @ self.variance[columns]


def factorize_hessian(hessian: Tensor, tokens: float, together: int = 1) -> Factor | None:
    """The factor of the damped H; None where H is not finite, or too near to singular for any
    damping tried.

    The damping is 0.1 % of the mean over live columns, more where there are few tokens for the
    width, and grows tenfold up to three times. A column that was never active is uncoupled by it
    and gets rounded to nearest: its weights are kept, since a channel silent in calibration may
    speak in service.

    Args:
        hessian: (in, in) float32, the sum of x xᵀ over tokens.
        together: so many neighbors stay side by side, in the order of the most active of each; the
            width is a multiple of it.
    """
    diagonal = hessian.diagonal() / max(tokens, 1.0)
    if not math.isfinite(hessian.sum()):
        return None
    first = diagonal.view(-1, together).amax(1).argsort(descending=True, stable=True) * together
    order = (first.unsqueeze(1) + torch.arange(together, device=first.device)).flatten()
    live = diagonal[diagonal > 0]
    share = min(max(0.1 * len(diagonal) / max(tokens, 1.0), 0.001), 1.0)
    damp = share * live.mean().item() if len(live) else 1.0
    last_first = order.flip(0)
    for _ in range(4):
        lower = (
            hessian.index_select(0, last_first)
            .index_select(1, last_first)
            .div_(max(tokens, 1.0))
            .mT
        )
        lower.diagonal().add_(damp)
        failed = order.new_empty((), dtype=torch.int32)
        # in place, columns being contiguous: it is large
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed and math.isfinite(lower.sum()):
            # lower triangular from this end is upper triangular from the other
            upper = lower.flip(0, 1)
            root = upper.diagonal().clone()
            return Factor(order, upper.div_(root), root.square(), diagonal + damp)
        damp *= 10
    return None
