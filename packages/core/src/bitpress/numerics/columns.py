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

# Columns that are swept one by one; between leaves the feedback is a matrix product.
LEAF = 16

# Rows swept together: a leaf's columns of so many rows stay in a core's cache.
ROW_TILE = 2048

# (targets (rows,) of a column, the rows, the column) -> what the targets become (rows,)
Project = Callable[[Tensor, slice, int], Tensor]

# (best numbers (span, rows), the rows, positions of the span in the factor's order) -> nothing
SpanCallback = Callable[[Tensor, slice, slice], None]


def column_sweep(
    weight: Tensor,
    factor: Factor,
    project: Project,
    ahead: SpanCallback | None = None,
    span: int = LEAF,
) -> tuple[Tensor, Tensor]:
    """The projected weight, and what it costs each row.

    Args:
        weight: (out, in) float32; its rows are independent.
        factor: of the Hessian of the layer's inputs.
        project: given the targets (rows,) of one column, which rows they are, and which column,
            returns what they become.
        ahead: for choices between columns: before each `span` of them it is given what would be
            best for them (span, rows) if they and all that follow could be any number, which rows
            they are, and the columns' positions in the factor's order.
        span: a divisor or a multiple of `LEAF`.

    Returns:
        (out, in) float32, and (out,) float32: (w - q) H (w - q)ᵀ of each row.
    """
    sweep = _Sweep(factor, project, ahead, span)
    projected, losses = torch.empty_like(weight), []
    for first in range(0, len(weight), ROW_TILE):
        rows = slice(first, min(first + ROW_TILE, len(weight)))
        projected[rows], loss = sweep.project_rows(weight[rows], rows)
        losses.append(loss)
    return projected, torch.cat(losses)


@frozen(eq=False)
class _Sweep:
    """The arguments of a sweep, the same for all rows."""

    factor: Factor
    project: Project
    ahead: SpanCallback | None
    span: int

    def project_rows(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows' projected weight (rows, in), and what it costs each of them (rows,)."""
        factor, span = self.factor, self.span
        columns = factor.order.tolist()

        # Transposed, a column is contiguous.
        original = weight.T.contiguous().index_select(0, factor.order)  # (in, rows)
        target = original.clone()
        error, projected = torch.empty_like(original), torch.empty_like(original)
        loss = weight.new_zeros(len(weight))

        # One view of each column, made once and not in the loop.
        original_columns, target_columns = original.unbind(), target.unbind()
        error_columns, projected_columns = error.unbind(), projected.unbind()

        # A span is chosen as a whole: no product between leaves ends inside one.
        unit = max(span, LEAF) if self.ahead else LEAF
        for start, middle, stop in _schedule(0, len(columns), unit):
            if middle < stop:
                feedback = factor.unit[start:middle, middle:stop].T
                target[middle:stop].addmm_(feedback, error[start:middle])
                continue

            for k in range(start, stop):
                if self.ahead and k % span == 0:
                    positions = slice(k, min(k + span, len(columns)))
                    best = self._unconstrained(original[positions], target[positions], positions)
                    self.ahead(best, rows, positions)
                projected_columns[k].copy_(self.project(target_columns[k], rows, columns[k]))
                torch.sub(original_columns[k], projected_columns[k], out=error_columns[k])
                target[k + 1 : stop].addr_(factor.unit[k, k + 1 : stop], error_columns[k])
            residual = target[start:stop] - projected[start:stop]
            loss += factor.variance[start:stop] @ residual.square_()

        return torch.empty_like(projected).index_copy_(0, factor.order, projected).T, loss

    def _unconstrained(self, original: Tensor, target: Tensor, positions: slice) -> Tensor:
        """What would be best for a span if it and all that follow could be any number.

        Then every later target is met exactly: (w - q) U = w - target on the span.
        """
        unit = self.factor.unit[positions, positions].T
        error: Tensor = torch.linalg.solve_triangular(
            unit, original - target, upper=False, unitriangular=True
        )
        return original - error


def _schedule(start: int, stop: int, unit: int) -> Iterator[tuple[int, int, int]]:
    """The steps of a sweep over columns start to stop, halved again and again.

    (start, stop, stop) decides these columns one by one; (start, middle, stop) feeds the errors of
    the first ones to those from middle on.
    """
    if stop - start <= LEAF:
        yield start, stop, stop
        return
    multiple = unit if stop - start > unit else LEAF
    middle = start + multiple * ((stop - start + multiple) // (2 * multiple))
    yield from _schedule(start, middle, unit)
    yield start, middle, stop
    yield from _schedule(middle, stop, unit)
