"""Matrices that files hold in another form: an expert inside one tensor, transposed, or in FP8 with
scales. Made while read.
"""

from __future__ import annotations

from typing import Protocol

import torch
from attrs import frozen

from bitpress.checkpoint.safetensors import Entry


class Read(Protocol):
    """What a view needs of a reader."""

    def rows(self, entry: Entry, first: int, last: int) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a tensor."""

    def whole(self, entry: Entry) -> torch.Tensor:
        """All of a tensor."""

    def turned(self, entry: Entry) -> torch.Tensor:
        """All of a matrix, transposed."""


@frozen
class View(Entry):
    """A matrix (out, in) made of stored tensors; name, dtype and shape are the view's own.

    Attributes:
        stored: the matrix whose numbers it holds some rows of, or columns where that is stored (in,
            out).
        first: the first of them.
        transposed: whether it is stored (in, out).
        whole: the tensor of which `stored` is a part; None where it is not.
        scale: what a stored number is multiplied by: one for all, (out, 1), or one for each tile.
        tile: rows and columns that share a scale.
    """

    stored: Entry
    first: int = 0
    transposed: bool = False
    whole: Entry | None = None
    scale: Entry | None = None
    tile: tuple[int, int] = (1, 1)

    def rows(self, reader: Read, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows `first` to `last` (exclusive), in a dtype."""
        first, last = self.first + first, self.first + last
        if self.transposed:
            return reader.turned(self.stored)[first:last].contiguous()
        found = reader.rows(self.stored, first, last)
        if self.scale is None:
            return found
        high, wide = self.tile
        scale = (
            reader.whole(self.scale)
            .float()
            .reshape(-1, self.scale.shape[-1] if len(self.scale.shape) > 1 else 1)
        )
        # some rows have scales of their own
        if len(scale) > 1:
            scale = scale.index_select(0, torch.arange(first, last) // high)
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(wide, 1)[:, : self.shape[1]]
        return (found.float() * scale).to(dtype)


def part(stored: Entry, number: int) -> Entry:
    """One of the matrices of a tensor (matrices, rows, columns), itself a tensor of the file."""
    shape = stored.shape[1:]
    size = stored.nbytes // stored.shape[0]
    return Entry(
        f"{stored.name}[{number}]", stored.dtype, shape, stored.file, stored.start + number * size
    )
