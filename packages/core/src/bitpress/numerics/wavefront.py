"""Rows that make up for each other's errors, swept as a wavefront: a group of them is decided on a
block of columns as soon as the group before it has been.

What a target loses for the errors of rows before it, it loses column by column. So no group needs
to wait for the whole of another: all of them are swept side by side, each a block behind the one
before it.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import pad

from bitpress.numerics import block_sweep, kernel_trial
from bitpress.numerics.halving import halve
from bitpress.numerics.hessian import Factor
from bitpress.numerics.output_hessian import RowFactor
from bitpress.numerics.rounding_rule import RoundingRule
from bitpress.numerics.swept_columns import SweptColumns, Wave, in_rows


@frozen(eq=False)
class Swept:
    """What a sweep made of some rows.

    Attributes:
        numbers: (rows, in) float32, representable.
        cost: (rows,) float32, of their errors, as `column_sweep` gives it.
        target: (rows, in) float32, what rows should have become, given the rows before them.
    """

    numbers: Tensor
    cost: Tensor
    target: Tensor


def sweep_waves(
    weight: Tensor, factor: Factor, rule: RoundingRule, row_factor: RowFactor | None
) -> Swept:
    """The weight as a rule rounds it with error feedback.

    Args:
        weight: (rows, in) float32.
        factor: of the Hessian of the layer's inputs.
        rule: of these rows.
        row_factor: of these rows; None: they do not make up for each other's errors.
    """
    num_rows, width = weight.shape
    num_groups = 1 if row_factor is None else row_factor.num_groups
    kernels: ModuleType = block_sweep
    if kernel_trial.can_fuse(weight.device):
        kernels = importlib.import_module("bitpress.numerics.fused_sweep")
    columns = SweptColumns.undecided(weight, factor.order, kernels.BLOCK, num_groups)
    blocks = kernels.BlockSweep(columns, factor.unit, rule)
    column_feedback = _ColumnFeedback(columns, factor.unit)
    row_feedback = None if row_factor is None else _WaveFeedback(columns, row_factor)
    for wave in columns.waves:
        if row_feedback is not None:
            row_feedback.move_targets(wave)
        blocks.decide(wave)
        column_feedback.feed(wave)
        if row_feedback is not None:
            row_feedback.take_errors(wave)

    moved, target, projected = (
        x[:width] for x in (columns.original, columns.target, columns.projected)
    )
    # only these are needed
    del columns, blocks, column_feedback, row_feedback
    residual = target.sub_(projected).square_()
    loss = (factor.variance @ residual.flatten(1)).view(1, num_groups, -1)
    del target, residual
    return Swept(
        _in_rows(projected, factor, num_rows),
        in_rows(loss, num_rows)[0],
        weight if row_factor is None else _in_rows(moved, factor, num_rows),
    )


def _in_rows(of_groups: Tensor, factor: Factor, num_rows: int) -> Tensor:
    """Columns (in, groups, rows) in the order of the factor as rows in that of the weight."""
    by_column = in_rows(of_groups, num_rows)
    return torch.empty_like(by_column).index_copy_(0, factor.order, by_column).T.contiguous()


class _ColumnFeedback:
    """Moves the targets of columns by the errors of columns before them."""

    def __init__(self, columns: SweptColumns, unit: Tensor) -> None:
        self._columns, self._unit = columns, unit
        # after each block, from which columns to which errors are fed
        self._steps: list[list[tuple[int, int, int]]] = []
        for start, middle, stop in halve(0, len(unit), columns.block, columns.block):
            if middle == stop:
                self._steps.append([])
            else:
                self._steps[-1].append((start, middle, stop))

    def feed(self, wave: Wave) -> None:
        """Feed forward what a wave has decided."""
        columns = self._columns
        for block, group in wave:
            target, error = (columns.of_group(x, group) for x in (columns.target, columns.error))
            for start, middle, stop in self._steps[block]:
                feedback = self._unit[start:middle, middle:stop].T
                target[middle:stop].addmm_(feedback, error[start:middle])


class _WaveFeedback:
    """Moves the targets of a wave by the errors of rows before them.

    What rows have lost, w - q, is held as (blocks of columns, blocks of rows, columns of a block,
    rows of a block), the last group of rows first.
    """

    def __init__(self, columns: SweptColumns, factor: RowFactor) -> None:
        self._columns, num_groups = columns, factor.num_groups
        num_blocks, size, step = len(factor.coupling), factor.block, factor.block // num_groups
        coupling = factor.coupling.view(num_blocks, num_groups, step, num_groups, step).flip(1, 3)
        # (groups, blocks of rows, rows of a block, rows of a group)
        self._coupling = coupling.permute(1, 0, 3, 4, 2).reshape(num_groups, num_blocks, size, step)
        self._lost = coupling.new_zeros(columns.num_blocks, num_blocks, columns.block, size)
        self._step, self._shift = step, coupling.new_zeros(())

    def move_targets(self, wave: Wave) -> None:
        """Move the targets of a wave."""
        columns, num_rows = self._columns, self._columns.original.shape[2]
        first, stop = (columns.num_groups - 1 - wave.number + block for block in wave.blocks)
        # the groups after its last one have lost nothing yet
        rows = slice(first * self._step, None)
        lost, coupling = self._lost[slice(*wave.blocks)], self._coupling[first:stop]
        gain = lost[..., rows] @ coupling[:, :, rows]  # (blocks, blocks of rows, block, rows)
        self._shift = gain.permute(2, 0, 1, 3).flatten(2)[..., :num_rows]  # (block, blocks, rows)
        columns.of_wave(columns.target, wave).add_(self._shift)
        columns.of_wave(columns.original, wave).add_(self._shift)

    def take_errors(self, wave: Wave) -> None:
        """Hold what the rows of a wave have lost."""
        columns, num_blocks = self._columns, self._coupling.shape[1]
        lost = columns.of_wave(columns.error, wave) - self._shift  # (block, blocks, rows)
        lost = pad(lost, (0, num_blocks * self._step - lost.shape[2]))
        held = self._lost.view(
            columns.num_blocks, num_blocks, columns.block, columns.num_groups, self._step
        ).diagonal(columns.num_groups - 1 - wave.number, 0, 3)  # (blocks, block, rows, blocks)
        held.copy_(lost.view(*lost.shape[:2], num_blocks, self._step).permute(2, 0, 3, 1))
