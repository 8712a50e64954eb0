"""One sweep over the columns of a weight for every method that feeds errors forward: GPTQ,
SparseGPT and their kin.

Columns are decided one after the other, each as near as its own format allows to a target that
makes up for the errors of the columns before it:

    target_k = w_k + Σ_{j<k} (w_j - q_j) U_jk        q_k = project(target_k)        loss = Σ_k D_k
    (target_k - q_k)²

With H = U D Uᵀ this is GPTQ (Frantar et al., arXiv 2210.17323) in the form of Chee et al. (QuIP,
arXiv 2307.13304, theorem 6): no inverse is needed. Only blocks of `LEAF` columns are swept one by
one; between blocks the feedback is a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics.hessian import Factor

# Columns that are swept one by one.
LEAF = 16

# Rows swept together: a leaf's columns of them stay in cache.
ROWS = 2048

Project = Callable[[Tensor, slice, int], Tensor]

Ahead = Callable[[Tensor, slice, slice], None]


def column_sweep(
    weight: Tensor, factor: Factor, project: Project, ahead: Ahead | None = None, span: int = LEAF
) -> tuple[Tensor, Tensor]:
    """The projected weight, and what it costs each row.

    Args:
        weight: (out, in) float32; its rows are independent.
        project: given the targets (rows,) of one column, which rows they are, and which column,
            returns what they become.
        ahead: for choices between columns: before each `span` of them it is given what would be
            best for them (span, rows) if they and all that follow could be any number, which rows
            they are, and the columns' places in the factor's order.
        span: a divisor or a multiple of `LEAF`.

    Returns:
        (out, in) float32, and (out,) float32: (w - q) H (w - q)ᵀ of each row.
    """
    sweep = _Sweep(factor, project, ahead, span)
    swept, losses = torch.empty_like(weight), []
    for first in range(0, len(weight), ROWS):
        rows = slice(first, min(first + ROWS, len(weight)))
        swept[rows], loss = sweep.of_rows(weight[rows], rows)
        losses.append(loss)
    return swept, torch.cat(losses)


@frozen(eq=False)
class _Sweep:
    """The arguments of a sweep, the same for all rows."""

    factor: Factor
    project: Project
    ahead: Ahead | None
    span: int

    def of_rows(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows' projected weight (rows, in), and what it costs each of them (rows,)."""
        factor, span = self.factor, self.span
        # A column is contiguous.
        source = weight.T.contiguous().index_select(0, factor.order)  # (in, rows)
        target, error, chosen = source.clone(), torch.empty_like(source), torch.empty_like(source)
        columns, loss = factor.order.tolist(), weight.new_zeros(len(weight))
        source_columns, target_columns, error_columns, chosen_columns = (
            tensor.unbind() for tensor in (source, target, error, chosen)
        )

        # No product ends inside a span.
        whole = max(span, LEAF) if self.ahead else LEAF
        for lo, middle, hi in _steps(0, len(columns), whole):
            if middle < hi:
                target[middle:hi].addmm_(factor.unit[lo:middle, middle:hi].T, error[lo:middle])
                continue
            for k in range(lo, hi):
                if self.ahead and k % span == 0:
                    positions = slice(k, min(k + span, len(columns)))
                    best = self._unconstrained(source[positions], target[positions], positions)
                    self.ahead(best, rows, positions)
                chosen_columns[k].copy_(self.project(target_columns[k], rows, columns[k]))
                torch.sub(source_columns[k], chosen_columns[k], out=error_columns[k])
                target[k + 1 : hi].addr_(factor.unit[k, k + 1 : hi], error_columns[k])
            loss += factor.variance[lo:hi] @ (target[lo:hi] - chosen[lo:hi]).square_()
        return torch.empty_like(chosen).index_copy_(0, factor.order, chosen).T, loss

    def _unconstrained(self, source: Tensor, target: Tensor, positions: slice) -> Tensor:
        """What would be best for a span if it and all that follow could be any number."""
        unit = self.factor.unit[positions, positions].T
        missing: Tensor = torch.linalg.solve_triangular(
            unit, source - target, upper=False, unitriangular=True
        )
        return source - missing


def _steps(lo: int, hi: int, whole: int) -> Iterator[tuple[int, int, int]]:
    """The steps over columns lo to hi.

    (lo, hi, hi) decides these columns; (lo, middle, hi) feeds the errors of the first to those from
    middle on.
    """
    if hi - lo <= LEAF:
        yield lo, hi, hi
        return
    unit = whole if hi - lo > whole else LEAF
    middle = lo + unit * ((hi - lo + unit) // (2 * unit))
    yield from _steps(lo, middle, whole)
    yield lo, middle, hi
    yield from _steps(middle, hi, whole)
