"""The sweep over blocks of columns in torch, as a rule says how they round; `fused_sweep` does the
same in one kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import pad

from bitpress.numerics.halving import halve
from bitpress.numerics.rounding_rule import RoundingRule
from bitpress.numerics.swept_columns import SweptColumns, Wave, by_groups

# Columns of a block: groups of rows follow each other at this distance.
BLOCK = 64

# Columns that are swept one by one; between leaves the feedback is a matrix product.
LEAF = 16

# Threads take turns at columns: side by side, each would wait for Python's lock at every one of a
# dozen small operations, which took 1.7 times the CPU time and no less of the clock's.
COLUMNS_TURN = threading.RLock()


class BlockSweep:
    """Decides waves of blocks.

    Args:
        columns: of which `target`, `projected` and `error` are written.
        unit: (layers, in, in) float32, U of each layer's factor.
        rules: of the same rows, one for each layer.
    """

    def __init__(self, columns: SweptColumns, unit: Tensor, rules: Sequence[RoundingRule]) -> None:
        self._columns, self._rule, num_groups = columns, rules[0], columns.num_groups
        self._units = diagonal_blocks(unit, columns.block)
        # (columns or groups of them, groups, layers, rows)
        self._scale = by_groups([rule.scale.T for rule in rules], num_groups, 1.0)
        zeros = [rule.zero.T for rule in rules if rule.zero is not None]
        pruned = [~rule.mask.T for rule in rules if rule.mask is not None]
        self._zero = by_groups(zeros, num_groups) if zeros else None
        self._pruned = by_groups(pruned, num_groups) if pruned else None

    def decide(self, wave: Wave) -> None:
        """Decide the blocks of a wave, with error feedback among the columns of each."""
        columns = self._columns
        block = _Block(
            columns.of_wave(columns.original, wave),
            columns.of_wave(columns.target, wave),
            columns.of_wave(columns.projected, wave),
            columns.of_wave(columns.error, wave),
            self._units[slice(*wave.blocks)],
        )
        rounding = _Rounding(
            self._rule,
            self._pick(self._scale, wave, self._rule.group),
            None if self._zero is None else self._pick(self._zero, wave, self._rule.group),
            None if self._pruned is None else self._pick(self._pruned, wave, 1),
        )
        with COLUMNS_TURN:
            for start, middle, stop in halve(0, columns.block, LEAF, LEAF):
                if middle < stop:
                    block.feed(start, middle, stop)
                else:
                    block.decide(start, stop, rounding)

    def _pick(self, of_groups: Tensor, wave: Wave, group: int) -> Tensor:
        """What columns share of a rule, for each one of a wave: (block, blocks, layers, rows)."""
        columns = self._columns
        num_layers, device = len(columns.order), columns.order.device
        blocks = columns.order.view(num_layers, -1, columns.block)[:, slice(*wave.blocks)]
        column = blocks.permute(2, 1, 0)  # (block, blocks, layers)
        places = columns.num_groups - 1 - wave.number + torch.arange(*wave.blocks, device=device)
        index = (column // group) * columns.num_groups + places.unsqueeze(1)
        index = index * num_layers + torch.arange(num_layers, device=device)
        return of_groups.flatten(0, 2).index_select(0, index.flatten()).view(*index.shape, -1)


@frozen(eq=False)
class _Rounding:
    """How each column of some blocks rounds: a rule, its numbers (block, blocks, layers, rows), and
    where the mask is False.
    """

    rule: RoundingRule
    scale: Tensor
    zero: Tensor | None
    pruned: Tensor | None

    def round_column(self, target: Tensor, column: int, out: Tensor) -> None:
        """What targets (blocks, layers, rows) of a column become."""
        scale = self.scale[column]
        torch.div(target, scale, out=out)
        self.rule.numbers.round_(out, None if self.zero is None else self.zero[column]).mul_(scale)
        if self.pruned is not None:
            out.masked_fill_(self.pruned[column], 0.0)


@frozen(eq=False)
class _Block:
    """Blocks of columns of some groups: (block, blocks, layers, rows), and their own (blocks,
    layers, block, block) of U.
    """

    original: Tensor
    target: Tensor
    projected: Tensor
    error: Tensor
    unit: Tensor

    def feed(self, start: int, middle: int, stop: int) -> None:
        """Move the targets from `middle` on by the errors from `start` on."""
        later, error = (
            x.permute(2, 1, 0, 3) for x in (self.target[middle:stop], self.error[start:middle])
        )  # (layers, blocks, columns, rows)
        units = self.unit[:, :, start:middle, middle:stop].mT.unbind(1)
        for own_later, unit, own_error in zip(later, units, error, strict=True):
            own_later.baddbmm_(unit, own_error)

    def decide(self, start: int, stop: int, rounding: _Rounding) -> None:
        """Decide some columns one after the other."""
        own = slice(start, stop)
        parts = self.original[own], self.target[own], self.projected[own], self.error[own]
        unit = self.unit.permute(2, 3, 0, 1).unsqueeze(4)  # (block, block, blocks, layers, 1)
        columns = zip(*(part.unbind() for part in parts), strict=True)
        for k, (original, target, projected, error) in enumerate(columns, start):
            rounding.round_column(target, k, projected)
            torch.sub(original, projected, out=error)
            self.target[k + 1 : stop].addcmul_(unit[k, k + 1 : stop], error)


def diagonal_blocks(unit: Tensor, block: int) -> Tensor:
    """The blocks along the diagonal of each U (layers, in, in): (blocks, layers, block, block)."""
    num_whole, left = divmod(unit.shape[1], block)
    layer, row, column = unit.stride()
    blocks = unit.as_strided(
        (num_whole, len(unit), block, block), (block * (row + column), layer, row, column)
    )
    if left:
        last = pad(unit[:, -left:, -left:], (0, block - left, 0, block - left))
        blocks = torch.cat([blocks, last.unsqueeze(0)])
    return blocks.contiguous()
