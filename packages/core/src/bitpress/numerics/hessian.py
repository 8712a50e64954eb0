"""Second moments of a layer's inputs: damped, put in order, and factored for error feedback.

Letters: H = E[x xᵀ] (in, in), over calibration tokens. Sources: Frantar et al., "GPTQ", arXiv
2210.17323; Chee et al., "QuIP", arXiv 2307.13304 (the LDL form, and that both are the same method).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics.cholesky import cholesky_
from bitpress.numerics.exact import scalar_like
from bitpress.numerics.gram import stripes
from bitpress.runtime.batching import read_number

# What is added to the diagonal of H, in units of its mean over active columns.
MIN_DAMPING = 0.001


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

    @property
    def columns(self) -> Sequence[int]:
        """The numbers of `order`, as Python has them."""
        return self.order.tolist()

    def solve(self, right: Tensor) -> Tensor:
        """X with X H = right: (rows, in) -> (rows, in)."""
        # X U D Uᵀ = right: first by Uᵀ, then by D, then by U.
        solve = functools.partial(torch.linalg.solve_triangular, left=False, unitriangular=True)
        x = solve(self.unit.T, right.index_select(1, self.order), upper=False) / self.variance
        x = solve(self.unit, x, upper=True)
        return torch.empty_like(x).index_copy_(1, self.order, x)

    def multiply(self, left: Tensor) -> Tensor:
        """The product with H: (rows, in) -> (rows, in)."""
        x, product = left.index_select(1, self.order), torch.empty_like(left)
        # By stripes, since what lies below U's diagonal is zero.
        for columns in stripes(x.shape[1]):
            product[:, columns] = x[:, : columns.stop] @ self.unit[: columns.stop, columns]
        product *= self.variance
        for columns in stripes(x.shape[1]):
            x[:, columns] = product[:, columns.start :] @ self.unit[columns, columns.start :].T
        return torch.empty_like(x).index_copy_(1, self.order, x)

    def loss(self, error: Tensor) -> Tensor:
        """What an error costs each row: (rows, in) -> (rows,), the diagonal of error H errorᵀ."""
        error = error.index_select(1, self.order)
        cost = error.new_zeros(len(error))
        for columns in stripes(error.shape[1]):
            cost += self._stripe_cost(error, columns)
        return cost

    def covers(self, cost: Tensor, error: Tensor) -> Tensor:
        """Whether a cost is at most what an error costs its row.

        On a CPU, stripe by stripe a row is left out once enough of its error's cost is summed up.
        On a GPU it would take longer to wait for which rows these are.

        Args:
            cost: (rows,) float32.
            error: (rows, in) float32.

        Returns:
            (rows,) bool; False where either is NaN.
        """
        if error.device.type != "cpu":
            return cost <= self.loss(error)
        error = error.index_select(1, self.order)
        is_covered = torch.zeros_like(cost, dtype=torch.bool)
        partial_cost = torch.zeros_like(cost)
        # Rows whose partial cost does not cover theirs yet.
        open_rows = torch.arange(len(cost), device=cost.device)
        for columns in stripes(error.shape[1]):
            partial_cost += self._stripe_cost(error, columns)
            is_reached = cost[open_rows] <= partial_cost
            is_covered[open_rows] = is_reached
            open_rows, error = open_rows[~is_reached], error[~is_reached]
            partial_cost = partial_cost[~is_reached]
        return is_covered

    def _stripe_cost(self, error: Tensor, columns: slice) -> Tensor:
        """What a stripe of columns adds to the cost of each row; below U's diagonal all is zero."""
        transformed = error[:, : columns.stop] @ self.unit[: columns.stop, columns]
        return transformed.square_() @ self.variance[columns]


def factorize_hessian(
    hessian: Tensor, tokens: float, together: int = 1, *, damping: float = MIN_DAMPING
) -> Factor | None:
    """The factor of the damped H.

    More is added to the diagonal than asked where there are few tokens for the width, and it grows
    tenfold up to three times. A column that was never active is uncoupled by it
    and gets rounded to nearest: its weights stay, since a channel silent in calibration may speak
    in service.

    Args:
        hessian: (in, in) float32, the sum of x xᵀ over tokens.
        tokens: how many they are.
        together: so many neighbors stay side by side, in the order of the most active of each; the
            width is a multiple of it.
        damping: what is added to the diagonal, in units of its mean over active columns.

    Returns:
        The factor; None where H is not finite, or too near to singular for any damping tried.
    """
    num_tokens = max(tokens, 1.0)
    diagonal = hessian.diagonal() / scalar_like(hessian, num_tokens)
    # One sum over all entries is NaN or infinite where any of them is.
    if not math.isfinite(read_number(hessian.sum())):
        return None

    # GPTQ's act-order: the most active columns first, while most others can
    # still make up for their errors.
    activity = diagonal.view(-1, together).amax(1)
    group_starts = activity.argsort(descending=True, stable=True) * together
    neighbors = torch.arange(together, device=group_starts.device)
    order = (group_starts.unsqueeze(1) + neighbors).flatten()

    num_active = (diagonal > 0).sum().clamp_(min=1)
    mean = read_number(diagonal.clamp(min=0).sum() / num_active)
    share = min(max(0.1 * len(diagonal) / num_tokens, damping), 1.0)
    added = share * mean if mean else 1.0

    # From the last column backwards, so that a lower Cholesky factor read from the other end is
    # upper triangular: H = R Rᵀ, with R = U √D.
    backwards = order.flip(0)
    for _ in range(4):
        permuted = hessian.index_select(0, backwards).index_select(1, backwards)
        permuted.div_(scalar_like(hessian, num_tokens)).diagonal().add_(added)
        # A Cholesky factor is as large as H: it is computed in place.
        lower = cholesky_(permuted)
        if lower is not None and math.isfinite(read_number(lower.sum())):
            upper = lower.flip(0, 1)
            root = upper.diagonal().clone()
            return Factor(order, upper.div_(root), root.square(), diagonal + added)
        added *= 10
    return None
