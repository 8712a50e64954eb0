"""Matrices that files hold in another form: inside a tensor of all experts, transposed, or in FP8
with scales. They are computed while they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from attrs import frozen

from bitpress.checkpoint.safetensors import Entry
from bitpress.runtime.devices import CPU


class MatrixReader(Protocol):
    """The methods of a reader that a view calls."""

    def rows(self, entry: Entry, first: int, last: int, device: torch.device = CPU) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a tensor, on a device."""

    def whole(self, entry: Entry) -> torch.Tensor:
        """All of a tensor."""

    def transposed(self, entry: Entry) -> torch.Tensor:
        """All of a matrix, transposed."""

    def computed(self, entry: Entry, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What is computed of a whole tensor, and read by rows."""


@frozen
class View(Entry):
    """A matrix (out, in) made of stored tensors; name, dtype and shape are the view's own.

    Attributes:
        stored: the matrix of which the view is some rows, or some columns where that is (in, out).
        first: the first of these rows or columns.
        transposed: whether `stored` is (in, out).
        whole: the tensor of all experts of which `stored` is a part; None where it is none.
        scale: the factors of the stored numbers: one for all, (out, 1), or one for each tile.
        tile: rows and columns that share a scale.
    """

    stored: Entry
    first: int = 0
    transposed: bool = False
    whole: Entry | None = None
    scale: Entry | None = None
    tile: tuple[int, int] = (1, 1)

    def rows(
        self,
        reader: MatrixReader,
        first: int,
        last: int,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
    ) -> torch.Tensor:
        """Rows `first` to `last` (exclusive), those with a scale in this dtype.

        Args:
            device: that multiplies numbers with their scales; other rows are on the CPU.
        """
        first, last = self.first + first, self.first + last
        if self.transposed:
            return reader.transposed(self.stored)[first:last].contiguous()
        if self.scale is None:
            return reader.rows(self.stored, first, last)
        numbers = reader.rows(self.stored, first, last, device)

        # Scales grow to (rows, in), or stay at 1 on an axis along which all numbers share one.
        tile_height, tile_width = self.tile
        num_columns = self.scale.shape[-1] if len(self.scale.shape) > 1 else 1
        scale = reader.whole(self.scale).to(device).float()
        scale = scale.reshape(-1, num_columns)  # (tiles, tiles)
        if len(scale) > 1:
            numbers_of_tiles = torch.arange(first, last).div_(tile_height, rounding_mode="floor")
            scale = scale.index_select(0, numbers_of_tiles.to(device))
        if scale.shape[1] > 1:
            scale = scale.repeat_interleave(tile_width, 1)[:, : self.shape[1]]
        return (numbers.float() * scale).to(dtype)


def select_matrix(stored: Entry, number: int) -> Entry:
    """One matrix of a tensor (matrices, rows, columns), as a tensor of the file."""
    shape = stored.shape[1:]
    size = stored.nbytes // stored.shape[0]
    return Entry(
        f"{stored.name}[{number}]", stored.dtype, shape, stored.file, stored.start + number * size
    )
