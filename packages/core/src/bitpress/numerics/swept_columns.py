"""The columns of a weight while they are swept, block by block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import pad


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

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each block and the group of rows that it is decided for."""
        return ((block, self.number - block) for block in range(*self.blocks))


@frozen(eq=False)
class SweptColumns:
    """The columns of some rows, in the order in which they are decided.

    Row i is number i // groups of group i % groups; the last group lies first. With zeros, columns
    are padded to whole blocks, and groups to as many rows each.

    Attributes:
        order: (in,) which columns they are; padding repeats the last one.
        block: columns of a block.
        original: (in, groups, rows) float32, the weight, moved by the errors of rows before.
        target: (in, groups, rows), the original moved by the errors of columns before as well.
        projected: (in, groups, rows), what targets have become.
        error: (in, groups, rows), original - projected.
    """

    order: Tensor
    block: int
    original: Tensor
    target: Tensor
    projected: Tensor
    error: Tensor

    @classmethod
    def undecided(
        cls, weight: Tensor, order: Tensor, block: int, num_groups: int = 1
    ) -> SweptColumns:
        """Those of a weight (rows, in), before a sweep."""
        # transposed, a column is contiguous
        by_column = weight.T.contiguous().index_select(0, order)
        padding = -len(order) % block
        if padding:
            by_column = pad(by_column, (0, 0, 0, padding))
            order = torch.cat([order, order[-1:].expand(padding)])
        original = by_groups(by_column, num_groups)
        projected, error = torch.zeros_like(original), torch.zeros_like(original)
        return cls(order, block, original, original.clone(), projected, error)

    @property
    def num_groups(self) -> int:
        """Groups of rows."""
        return self.original.shape[1]

    @property
    def num_blocks(self) -> int:
        """Blocks of columns."""
        return len(self.order) // self.block

    @property
    def waves(self) -> Iterator[Wave]:
        """In their order: every group is swept a block behind the group before it."""
        for number in range(self.num_blocks + self.num_groups - 1):
            first = max(number - self.num_groups + 1, 0)
            yield Wave(number, (first, min(number + 1, self.num_blocks)))

    def of_wave(self, x: Tensor, wave: Wave) -> Tensor:
        """A view of a wave's part of one of the attributes: (block, blocks of the wave, rows)."""
        blocks = x.view(-1, self.block, *x.shape[1:])  # (blocks, block, groups, rows)
        # groups lie in reverse, so that the blocks of a wave are a diagonal
        return blocks.diagonal(self.num_groups - 1 - wave.number, 0, 2).movedim(2, 1)

    def of_group(self, x: Tensor, group: int) -> Tensor:
        """A view of a group's part of one of the attributes: (in, rows)."""
        return x[:, self.num_groups - 1 - group]


def by_groups(by_column: Tensor, num_groups: int, padding: float = 0) -> Tensor:
    """Numbers (columns, rows) in groups of rows, as `SweptColumns` has them:
    (columns, groups, rows).
    """
    num_missing = -by_column.shape[1] % num_groups
    if num_missing:
        by_column = pad(by_column, (0, num_missing), value=padding)
    if num_groups == 1:
        return by_column.unsqueeze(1)
    by_row = by_column.reshape(len(by_column), -1, num_groups)
    return by_row.flip(2).transpose(1, 2).contiguous()


def in_rows(of_groups: Tensor, num_rows: int) -> Tensor:
    """What `by_groups` made, without padding, as it was: (columns, num_rows)."""
    if of_groups.shape[1] == 1:
        return of_groups[:, 0, :num_rows]
    return of_groups.flip(1).transpose(1, 2).flatten(1)[:, :num_rows]
