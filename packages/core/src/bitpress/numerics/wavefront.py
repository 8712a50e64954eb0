"""Rows that make up for each other's errors, swept as a wavefront: a group of them is decided on a
block of columns as soon as the group before it has been.

What a target loses for the errors of rows before it, it loses column by column. So no group needs
to wait for the whole of another: all of them are swept side by side, each a block behind the one
before it.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Sequence
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
from bitpress.runtime.batching import batched, stack


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


@frozen(eq=False)
class _Sweep:
    """Arguments of `sweep_waves`."""

    weight: Tensor
    factor: Factor
    rule: RoundingRule
    row_factor: RowFactor | None

    @property
    def num_groups(self) -> int:
        """Of rows, of which each makes up for those before."""
        return 1 if self.row_factor is None else self.row_factor.num_groups

    @property
    def form(self) -> Hashable:
        """What sweeps have in common that are made together."""
        weight, rule = self.weight, self.rule
        kinds = rule.zero is None, rule.mask is None, self.row_factor is None
        return weight.shape, weight.device, rule.numbers, rule.group, kinds, self.num_groups


def sweep_waves(
    weight: Tensor, factor: Factor, rule: RoundingRule, row_factor: RowFactor | None
) -> Swept:
    """The weight as a rule rounds it with error feedback; together with those of other layers that
    are solved side by side, and are as large.

    Args:
        weight: (rows, in) float32.
        factor: of the Hessian of the layer's inputs.
        rule: of these rows.
        row_factor: of these rows; None: they do not make up for each other's errors.
    """
    sweep = _Sweep(weight, factor, rule, row_factor)
    return batched(_sweep_layers, sweep, sweep.form)


def _sweep_layers(sweeps: Sequence[_Sweep]) -> list[Swept]:
    """Sweeps that have the same form, made together."""
    first, kernels = sweeps[0], _kernels_for(sweeps[0].weight.device)
    weights, orders = [s.weight for s in sweeps], [s.factor.order for s in sweeps]
    columns = SweptColumns.undecided(weights, orders, kernels.BLOCK, first.num_groups)
    _decide_waves(columns, kernels, sweeps)

    num_rows, width = first.weight.shape
    moved, target, projected = (
        x[:width] for x in (columns.original, columns.target, columns.projected)
    )
    # only these are needed
    del columns
    residual = target.sub_(projected).square_()
    costs = [
        (sweep.factor.variance @ own.flatten(1)).view(1, first.num_groups, -1)
        for sweep, own in zip(sweeps, residual.unbind(2), strict=True)
    ]
    del target, residual
    costs = in_rows(stack(costs, 2), num_rows)
    numbers = _in_rows(projected, sweeps, num_rows)
    del projected
    targets = weights if first.row_factor is None else _in_rows(moved, sweeps, num_rows)
    swept = zip(numbers, costs, targets, strict=True)
    return [Swept(own_numbers, cost[0], target) for own_numbers, cost, target in swept]


def _kernels_for(device: torch.device) -> ModuleType:
    """What decides blocks of columns there."""
    if kernel_trial.can_fuse(device):
        return importlib.import_module("bitpress.numerics.fused_sweep")
    if kernel_trial.can_compile(device):
        return importlib.import_module("bitpress.numerics.compiled_sweep")
    return block_sweep


def _decide_waves(columns: SweptColumns, kernels: ModuleType, sweeps: Sequence[_Sweep]) -> None:
    unit = stack([sweep.factor.unit for sweep in sweeps])
    blocks = kernels.BlockSweep(columns, unit, [sweep.rule for sweep in sweeps])
    column_feedback = _ColumnFeedback(columns, unit)
    row_factors = [sweep.row_factor for sweep in sweeps if sweep.row_factor is not None]
    row_feedback = _WaveFeedback(columns, row_factors) if row_factors else None
    for wave in columns.waves:
        if row_feedback is not None:
            row_feedback.move_targets(wave)
        blocks.decide(wave)
        column_feedback.feed(wave)
        if row_feedback is not None:
            row_feedback.take_errors(wave)


def _in_rows(of_groups: Tensor, sweeps: Sequence[_Sweep], num_rows: int) -> list[Tensor]:
    """Columns (in, groups, layers, rows) in the order of each layer's factor as its rows (rows, in)
    in that of the weight.
    """
    by_column = in_rows(of_groups, num_rows)
    return [
        torch.empty_like(own).index_copy_(0, sweep.factor.order, own).T.contiguous()
        for own, sweep in zip(by_column, sweeps, strict=True)
    ]


class _ColumnFeedback:
    """Moves the targets of columns by the errors of columns before them.

    Args:
        unit: (layers, in, in) float32, U of each layer's factor.
    """

    def __init__(self, columns: SweptColumns, unit: Tensor) -> None:
        self._columns, self._unit = columns, unit
        # after each block but the last: of how many columns errors are fed to how many
        steps = halve(0, unit.shape[1], columns.block, columns.block)
        self._steps = [
            (middle - start, stop - middle) for start, middle, stop in steps if middle < stop
        ]

    def feed(self, wave: Wave) -> None:
        """Feed forward what a wave has decided, together where errors of as many columns are fed to
        as many.
        """
        alike: dict[tuple[int, int], list[int]] = {}
        for block in range(wave.blocks[0], min(wave.blocks[1], len(self._steps))):
            alike.setdefault(self._steps[block], []).append(block)
        for (num_before, num_after), (first, *others) in alike.items():
            # they are at equal distances
            distance = others[0] - first if others else 1
            blocks = range(first, first + distance * (len(others) + 1), distance)
            self._feed(wave, blocks, num_before, num_after)

    def _feed(self, wave: Wave, blocks: range, num_before: int, num_after: int) -> None:
        """Move the targets of so many columns after each block by the errors of so many up to it.

        Args:
            blocks: of the wave.
        """
        columns, size = self._columns, self._columns.block
        middle = (blocks.start + 1) * size
        start, distance = middle - num_before, blocks.step * size
        error = columns.of_blocks(columns.error, wave, blocks, slice(start, middle))
        target = columns.of_blocks(columns.target, wave, blocks, slice(middle, middle + num_after))
        layer, row, column = self._unit.stride()
        unit = self._unit.as_strided(
            (len(blocks), len(self._unit), num_after, num_before),
            (distance * (row + column), layer, column, row),
            self._unit.storage_offset() + start * row + middle * column,
        )
        # one product for each layer or for each block, of which there are fewer
        axis = 0 if len(blocks) < len(self._unit) else 1
        for own_target, own_unit, own_error in zip(
            *(x.unbind(axis) for x in (target, unit, error)), strict=True
        ):
            own_target.baddbmm_(own_unit, own_error)


class _WaveFeedback:
    """Moves the targets of a wave by the errors of rows before them.

    What rows have lost, w - q, is held as (blocks of columns, blocks of rows, columns of a block,
    rows of a block), the last group of rows first; blocks of rows are those of all layers.
    """

    def __init__(self, columns: SweptColumns, factors: Sequence[RowFactor]) -> None:
        self._columns, num_groups, size = columns, factors[0].num_groups, factors[0].block
        step = size // num_groups
        coupling = stack([factor.coupling for factor in factors]).flatten(0, 1)
        num_blocks = len(coupling)
        coupling = coupling.view(num_blocks, num_groups, step, num_groups, step).flip(1, 3)
        # (groups, blocks of rows, rows of a block, rows of a group)
        self._coupling = coupling.permute(1, 0, 3, 4, 2).reshape(num_groups, num_blocks, size, step)
        self._lost = coupling.new_zeros(columns.num_blocks, num_blocks, columns.block, size)
        self._step, self._shift = step, coupling.new_zeros(())

    def move_targets(self, wave: Wave) -> None:
        """Move the targets of a wave."""
        columns = self._columns
        num_layers, num_rows = columns.original.shape[2:]
        first, stop = (columns.num_groups - 1 - wave.number + block for block in wave.blocks)
        # the groups after its last one have lost nothing yet
        rows = slice(first * self._step, None)
        lost, coupling = self._lost[slice(*wave.blocks)], self._coupling[first:stop]
        gain = lost[..., rows] @ coupling[:, :, rows]  # (blocks, blocks of rows, block, rows)
        by_block = gain.permute(2, 0, 1, 3)
        by_layer = by_block.reshape(*by_block.shape[:2], num_layers, -1)
        self._shift = by_layer[..., :num_rows]  # (block, blocks, layers, rows)
        columns.of_wave(columns.target, wave).add_(self._shift)
        columns.of_wave(columns.original, wave).add_(self._shift)

    def take_errors(self, wave: Wave) -> None:
        """Hold what the rows of a wave have lost."""
        columns, num_blocks = self._columns, self._coupling.shape[1]
        lost = columns.of_wave(columns.error, wave) - self._shift  # (block, blocks, layers, rows)
        num_layers, num_rows = lost.shape[2:]
        lost = pad(lost, (0, num_blocks // num_layers * self._step - num_rows))
        held = self._lost.view(
            columns.num_blocks, num_blocks, columns.block, columns.num_groups, self._step
        ).diagonal(columns.num_groups - 1 - wave.number, 0, 3)  # (blocks, block, rows, blocks)
        held.copy_(lost.reshape(*lost.shape[:2], num_blocks, self._step).permute(2, 0, 3, 1))
