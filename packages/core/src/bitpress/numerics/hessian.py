"""Second moments of a layer's inputs: damped, put in order, and factored for error feedback.

Letters: H = E[x xᵀ] (in, in), over calibration tokens. Sources: Frantar et al., "GPTQ", arXiv
2210.17323; Chee et al., "QuIP", arXiv 2307.13304 (the LDL form, and that both are the same method).
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence

import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics.cholesky import cholesky_
from bitpress.numerics.exact import scalar_like
from bitpress.numerics.gram import stripes
from bitpress.runtime.batching import batched, stack

# What is added to the diagonal of H, in units of its mean over active columns; ten times as much
# where that is too little, and so on.
MIN_DAMPING, MAX_DAMPINGS = 0.001, 4


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
    in service. Moments of layers that are solved side by side are factored together.

    Args:
        hessian: (in, in) float32, the sum of x xᵀ over tokens.
        tokens: how many they are.
        together: so many neighbors stay side by side, in the order of the most active of each; the
            width is a multiple of it.
        damping: what is added to the diagonal, in units of its mean over active columns.

    Returns:
        The factor; None where H is not finite, or too near to singular for any damping tried.
    """
    moments = _Moments(hessian, max(tokens, 1.0), together, damping)
    return batched(_factorize_layers, moments, moments.form)


@frozen(eq=False)
class _Moments:
    """Arguments of `factorize_hessian`."""

    hessian: Tensor
    num_tokens: float
    together: int
    damping: float

    @property
    def form(self) -> Hashable:
        """What moments have in common that are factored together."""
        return self.hessian.shape, self.hessian.device, self.together, self.damping

    @property
    def share(self) -> float:
        """What is added to the diagonal, in units of its mean over active columns."""
        return min(max(0.1 * len(self.hessian) / self.num_tokens, self.damping), 1.0)


def _factorize_layers(layers: Sequence[_Moments]) -> list[Factor | None]:
    """The factors of moments that have the same form; more is added where one has none."""
    factors: list[Factor | None] = [None] * len(layers)
    remaining = list(range(len(layers)))
    for attempt in range(MAX_DAMPINGS):
        damped = _factorize_damped([layers[number] for number in remaining], 10**attempt)
        for number, factor in zip(remaining, damped, strict=True):
            factors[number] = factor
        remaining = [number for number in remaining if factors[number] is None]
        if not remaining:
            break
    return factors


def _factorize_damped(layers: Sequence[_Moments], times: int) -> list[Factor | None]:
    """The factors of moments, damped by so many times as much as they ask for; None for those that
    are not finite, or too near to singular.
    """
    num_tokens, share = (
        stack([scalar_like(layer.hessian, getattr(layer, name)) for layer in layers]).unsqueeze(1)
        for name in ("num_tokens", "share")
    )  # (layers, 1)
    diagonal = stack([layer.hessian.diagonal() for layer in layers]) / num_tokens  # (layers, in)
    num_active = (diagonal > 0).sum(1, keepdim=True).clamp_(min=1)
    mean = diagonal.clamp(min=0).sum(1, keepdim=True) / num_active
    damping = torch.where(mean == 0, 1.0, share * mean) * times

    order = _most_active_first(diagonal, layers[0].together)
    # From the last column backwards, so that a lower Cholesky factor read from the other end is
    # upper triangular: H = R Rᵀ, with R = U √D.
    permuted = diagonal.new_empty(*diagonal.shape, diagonal.shape[1])
    for own, layer, columns in zip(permuted, layers, order.flip(1), strict=True):
        torch.index_select(layer.hessian.index_select(0, columns), 1, columns, out=own)
    permuted.div_(num_tokens.unsqueeze(2)).diagonal(dim1=1, dim2=2).add_(damping)

    # One sum over all entries is NaN or infinite where any of them is.
    total = permuted.sum((1, 2))
    # A Cholesky factor is as large as H: it is computed in place.
    lower, is_definite = cholesky_(permuted)
    are_usable = (is_definite & (total + lower.sum((1, 2))).isfinite()).tolist()
    unit = lower.flip(1, 2)
    root = unit.diagonal(dim1=1, dim2=2).clone()
    unit.div_(root.unsqueeze(1))
    factors = map(Factor, order, unit, root.square(), diagonal + damping)
    return [
        factor if is_usable else None for factor, is_usable in zip(factors, are_usable, strict=True)
    ]


def _most_active_first(diagonal: Tensor, together: int) -> Tensor:
    """The columns in GPTQ's act-order, (layers, in): while most others can still make up for their
    errors.

    Args:
        diagonal: (layers, in).
        together: so many neighbors stay side by side.
    """
    activity = diagonal.view(len(diagonal), -1, together).amax(2)
    group_starts = activity.argsort(dim=1, descending=True, stable=True) * together
    neighbors = torch.arange(together, device=group_starts.device)
    return (group_starts.unsqueeze(2) + neighbors).flatten(1)
