"""The columns of one weight or several while they are swept, block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import pad

from bitpress.runtime.batching import stack


@frozen
class Wave:
    """Blocks of columns that are decided at the same time: each of another group of rows, that of a
    group being the one before that of the group before it.

    Attributes:
        number: of the wave; of block and group, the sum.
        blocks: the first of the blocks, and the one after the last.
    """

    number: int
    blocks: tuple[int, int]


@frozen(eq=False)
class SweptColumns:
    """The columns of some rows, in the order in which they are decided: of one layer, or of several
    that have nothing to do with each other.

    Row i is number i // groups of group i % groups; the last group lies first. With zeros, columns
    are padded to whole blocks, and groups to as many rows each.

    Attributes:
        order: (layers, in) which columns they are; padding repeats the last one.
        block: columns of a block.
        original: (in, groups, layers, rows) float32, weights, moved by the errors of rows before.
        target: like it, the original moved by the errors of columns before as well.
        projected: like it, what targets have become.
        error: like it, original - projected.
    """

    order: Tensor
    block: int
    original: Tensor
    target: Tensor
    projected: Tensor
    error: Tensor

    @classmethod
    def undecided(
        cls, weights: Sequence[Tensor], orders: Sequence[Tensor], block: int, num_groups: int = 1
    ) -> SweptColumns:
        """Those of weights (rows, in), before a sweep."""
        padding = -len(orders[0]) % block
        by_column = []
        for weight, order in zip(weights, orders, strict=True):
            # transposed, a column is contiguous
            columns = weight.T.contiguous().index_select(0, order)
            if padding:
                columns = pad(columns, (0, 0, 0, padding))
            by_column.append(columns)
        order = stack(orders)
        if padding:
            order = torch.cat([order, order[:, -1:].expand(-1, padding)], 1)
        original = by_groups(by_column, num_groups)
        del by_column, columns
        projected, error = torch.zeros_like(original), torch.zeros_like(original)
        return cls(order, block, original, original.clone(), projected, error)

    @property
    def num_groups(self) -> int:
        """Groups of rows."""
        return self.original.shape[1]

    @property
    def num_blocks(self) -> int:
        """Blocks of columns."""
        return self.order.shape[1] // self.block

    @property
    def waves(self) -> Iterator[Wave]:
        """In their order: every group is swept a block behind the group before it."""
        for number in range(self.num_blocks + self.num_groups - 1):
            first = max(number - self.num_groups + 1, 0)
            yield Wave(number, (first, min(number + 1, self.num_blocks)))

    def of_wave(self, x: Tensor, wave: Wave) -> Tensor:
        """A view of a wave's part of one of the attributes: (block, blocks of the wave, layers,
        rows).
        """
        blocks = x.view(-1, self.block, *x.shape[1:])  # (blocks, block, groups, layers, rows)
        # groups lie in reverse, so that the blocks of a wave are a diagonal
        return blocks.diagonal(self.num_groups - 1 - wave.number, 0, 2).movedim(3, 1)

    def of_blocks(self, x: Tensor, wave: Wave, blocks: range, columns: slice) -> Tensor:
        """A view of one of the attributes, for the groups of a wave that are at some blocks:
        (blocks, layers, columns, rows).

        Args:
            blocks: of the wave.
            columns: of the first of them; of the others, as many are as far from the block.
        """
        column, group, layer, row = x.stride()
        place = self.num_groups - 1 - wave.number + blocks.start
        return x.as_strided(
            (len(blocks), x.shape[2], columns.stop - columns.start, x.shape[3]),
            (blocks.step * (self.block * column + group), layer, column, row),
            x.storage_offset() + columns.start * column + place * group,
        )


def by_groups(of_layers: Sequence[Tensor], num_groups: int, padding: float = 0) -> Tensor:
    """Numbers (columns, rows) of layers in groups of rows, as `SweptColumns` has them:
    (columns, groups, layers, rows).
    """
    grouped = [_group_rows(by_column, num_groups, padding) for by_column in of_layers]
    return stack(grouped, 2)


def _group_rows(by_column: Tensor, num_groups: int, padding: float) -> Tensor:
    num_missing = -by_column.shape[1] % num_groups
    if num_missing:
        by_column = pad(by_column, (0, num_missing), value=padding)
    if num_groups == 1:
        return by_column.unsqueeze(1)
    by_row = by_column.reshape(len(by_column), -1, num_groups)
    return by_row.flip(2).transpose(1, 2).contiguous()


def in_rows(of_groups: Tensor, num_rows: int) -> list[Tensor]:
    """What `by_groups` made, without padding, as it was: (columns, num_rows) of each layer."""
    # (layers, columns, rows of a group, groups)
    by_layer = of_groups.flip(1).permute(2, 0, 3, 1)
    return list(by_layer.flatten(2)[..., :num_rows].unbind())
