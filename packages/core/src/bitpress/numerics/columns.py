"""One sweep over the columns of a weight for every method that feeds errors forward: GPTQ,
SparseGPT and their kin.

Columns are decided one after the other, each as near as its own format allows to a target that
makes up for the errors of the columns before it:

    target_k = w_k + Σ_{j<k} (w_j - q_j) U_jk        q_k = project(target_k)        loss = Σ_k D_k
    (target_k - q_k)²

With H = U D Uᵀ this is GPTQ (Frantar et al., arXiv 2210.17323) in the form of Chee et al. (QuIP,
arXiv 2307.13304, theorem 6): no inverse is needed. Only blocks of `LEAF` columns are swept one by
one; between blocks the feedback is a matrix product.

Where it is known what an error in each output costs, rows make up for the errors of other rows too
(Tseng et al., YAQA, arXiv 2505.22988): group after group of rows is swept towards targets that the
errors of the groups before it have moved; side by side, where `wavefront` can.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics import block_sweep
from bitpress.numerics.halving import halve
from bitpress.numerics.hessian import Factor
from bitpress.numerics.output_hessian import RowFactor
from bitpress.numerics.rounding_rule import RoundingRule
from bitpress.numerics.rows import compute_coupled_rows, decide_rows
from bitpress.numerics.wavefront import sweep_waves

# (targets (rows,) of a column, the rows, the column) -> what the targets become (rows,)
Project = Callable[[Tensor, slice, int], Tensor]

# (best numbers (span, rows), the rows, positions of the span in the factor's order) -> nothing
SpanCallback = Callable[[Tensor, slice, slice], None]


# Public: schemes of other packages call it with these arguments.
def column_sweep(  # noqa: PLR0913
    weight: Tensor,
    factor: Factor,
    project: Project,
    ahead: SpanCallback | None = None,
    span: int = block_sweep.LEAF,
    *,
    row_factor: RowFactor | None = None,
    rule: RoundingRule | None = None,
) -> tuple[Tensor, Tensor]:
    """The projected weight, and what it costs each row.

    Args:
        weight: (out, in) float32.
        factor: of the Hessian of the layer's inputs.
        project: given the targets (rows,) of one column, which rows they are, and which column,
            returns what they become. The rows are a slice, with a step where there is a
            `row_factor`.
        ahead: for choices between columns: before each `span` of them it is given what would be
            best for them (span, rows) if they and all that follow could be any number, which rows
            they are, and the columns' positions in the factor's order.
        span: a divisor or a multiple of `LEAF`.
        row_factor: how rows make up for each other's errors; None: they do not.
        rule: what `project` does, as data, so that rows that make up for each other's errors are
            swept side by side, and compiled kernels decide many columns at once; None: it cannot
            be said so.

    Returns:
        (out, in) float32, and (out,) float32: (t - q) H (t - q)ᵀ of each row, t being the row of
        the weight, moved by the errors of the rows before it.
    """
    losses = weight.new_empty(len(weight))
    if rule is None or ahead is not None:
        sweep = _Sweep(factor, project, ahead, span)

        def decide(target: Tensor, rows: slice) -> Tensor:
            projected, losses[rows] = sweep.project_rows(target, rows)
            return projected

        return decide_rows(weight, row_factor, decide), losses

    def compute(rows: slice, own: RowFactor | None) -> Tensor:
        swept = sweep_waves(weight[rows], factor, rule.of_rows(rows), own)
        losses[rows] = swept.cost
        return swept.numbers

    return compute_coupled_rows(weight, row_factor, compute, has_rule=True), losses


@frozen(eq=False)
class _Sweep:
    """The arguments of a sweep, the same for all rows."""

    factor: Factor
    project: Project
    ahead: SpanCallback | None
    span: int

    def project_rows(self, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Some rows' projected weight (rows, in), and what it costs each of them (rows,).

        Args:
            weight: (rows, in) float32.
            rows: which they are.
        """
        # transposed, a column is contiguous
        original = weight.T.contiguous().index_select(0, self.factor.order)
        columns = _Columns(original, original.clone(), *map(torch.empty_like, [original] * 2))
        self._loop(columns, rows)

        projected = columns.projected
        residual = columns.target.sub_(projected)
        loss = self.factor.variance @ residual.square_()
        return torch.empty_like(projected).index_copy_(0, self.factor.order, projected).T, loss

    def _loop(self, columns: _Columns, rows: slice) -> None:
        """Decide all columns one by one."""
        names, span, width = self.factor.columns, self.span, len(columns.target)

        # One view of each column, made once and not in the loop.
        original_columns, target_columns = columns.original.unbind(), columns.target.unbind()
        error_columns, projected_columns = columns.error.unbind(), columns.projected.unbind()
        target, transposed = columns.target, self.factor.unit.T

        # A span is chosen as a whole: no product between leaves ends inside one.
        leaf = block_sweep.LEAF
        unit = max(span, leaf) if self.ahead else block_sweep.BLOCK
        for start, middle, stop in halve(0, width, unit, leaf):
            if middle < stop:
                self._feed(columns, start, middle, stop)
                continue

            with block_sweep.COLUMNS_TURN:
                for k in range(start, stop):
                    if self.ahead and k % span == 0:
                        positions = slice(k, min(k + span, width))
                        best = self._unconstrained(columns, positions)
                        self.ahead(best, rows, positions)
                    projected_columns[k].copy_(self.project(target_columns[k], rows, names[k]))
                    error = torch.sub(
                        original_columns[k], projected_columns[k], out=error_columns[k]
                    )
                    # as a product of columns: `addr_` fuses it with the sum at some widths only
                    target[k + 1 : stop].addcmul_(transposed[k + 1 : stop, k : k + 1], error)

    def _feed(self, columns: _Columns, start: int, middle: int, stop: int) -> None:
        """Move the targets from `middle` on by the errors from `start` on."""
        feedback = self.factor.unit[start:middle, middle:stop].T
        columns.target[middle:stop].addmm_(feedback, columns.error[start:middle])

    def _unconstrained(self, columns: _Columns, positions: slice) -> Tensor:
        """What would be best for a span if it and all that follow could be any number.

        Then every later target is met exactly: (w - q) U = w - target on the span.
        """
        original, target = columns.original[positions], columns.target[positions]
        unit = self.factor.unit[positions, positions].T
        error: Tensor = torch.linalg.solve_triangular(
            unit, original - target, upper=False, unitriangular=True
        )
        return original - error


@frozen(eq=False)
class _Columns:
    """Columns (in, rows) float32, in the order in which they are decided: the weight, moved by the
    errors before, what these become, and original - projected.
    """

    original: Tensor
    target: Tensor
    projected: Tensor
    error: Tensor
