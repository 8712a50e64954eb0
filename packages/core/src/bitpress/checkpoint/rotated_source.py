"""Tensors of a model whose hidden states, and whose heads' values, are rotated: they are computed
while they are read.
"""

from __future__ import annotations

from collections.abc import Container

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from bitpress.checkpoint.dequantized_source import DequantizedView
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.source import Source
from bitpress.checkpoint.views import MatrixReader, View, fill_rows
from bitpress.numerics.hadamard import Rotation, rotate_columns, rotate_rows
from bitpress.runtime.devices import CPU

# Numbers that are rotated together, in float64: 2 MB of them stay in a core's cache.
NUMBERS_PER_PASS = 1 << 18

# Bytes that a pass takes for each of them: four numbers in float64.
PASS_BYTES = 32


@frozen
class RotatedView(View):
    """A matrix (out, in) or a bias (out,) after rotation.

    What is computed in float64 is rounded once: to float32 where it is going to be quantized, and
    otherwise to the dtype in which it is stored.

    Attributes:
        norm: the weight (in,) of the norm before it, which its columns are multiplied by.
        inputs: the rotation of its columns; None where they stay.
        outputs: the rotation of its rows; None where they stay.
        is_copied: whether it is stored as it is read.
    """

    norm: Entry | None = field(default=None, kw_only=True)
    inputs: Rotation | None = field(default=None, kw_only=True)
    outputs: Rotation | None = field(default=None, kw_only=True)
    is_copied: bool = field(default=False, kw_only=True)

    @property
    def is_whole(self) -> bool:
        """Whether each of its rows is made of all rows of what is stored."""
        return self.outputs is not None and self.outputs.period == self.shape[0]

    def rows(
        self,
        reader: MatrixReader,
        first: int,
        last: int,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
    ) -> Tensor:
        """Rows `first` to `last` (exclusive), on the CPU."""
        dtype = dtype if self.is_copied else torch.float32
        if self.is_whole:
            return reader.computed(self, lambda: self._rotate_whole(reader, dtype))[first:last]

        period = self.outputs.period if self.outputs else 1
        row_numbers = self.numel // self.shape[0]
        rotated = torch.empty((last - first, *self.shape[1:]), dtype=dtype)

        def make_rows(start: int, end: int) -> Tensor:
            stored = reader.rows(self.stored, start, min(end, self.shape[0]))
            return self._rotate(reader, stored)

        fill_rows(rotated, first, period, NUMBERS_PER_PASS // row_numbers, make_rows)
        return rotated

    def _rotate_whole(self, reader: MatrixReader, dtype: torch.dtype) -> Tensor:
        stored = reader.whole(self.stored)
        if stored.ndim == 1 or self.norm is not None:
            return self._rotate(reader, stored).to(dtype)
        num_rows, num_columns = stored.shape
        period = self.inputs.period if self.inputs else 1
        step = max(NUMBERS_PER_PASS // num_rows // period, 1) * period
        rotated = torch.empty(self.shape, dtype=dtype)
        for start in range(0, num_columns, step):
            columns = slice(start, start + step)
            rotated[:, columns] = self._rotate(reader, stored[:, columns])
        return rotated

    def _rotate(self, reader: MatrixReader, numbers: Tensor) -> Tensor:
        """Whole periods of rows and columns, in float64."""
        matrix = numbers.double().reshape(len(numbers), -1)
        if self.norm is not None:
            matrix = matrix * reader.whole(self.norm).double()
        if self.inputs is not None:
            matrix = rotate_columns(matrix, self.inputs)
        if self.outputs is not None:
            matrix = rotate_rows(matrix, self.outputs)
        return matrix.reshape(numbers.shape)


@frozen
class FoldedNorm(View):
    """The weight of a norm that the layers after it have taken over."""

    def rows(
        self,
        reader: MatrixReader,
        first: int,
        last: int,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
    ) -> Tensor:
        """Ones, on the CPU."""
        return torch.ones(last - first, dtype=dtype)


def round_copies(source: Checkpoint, compressed: Container[str]) -> Checkpoint:
    """A source whose computed tensors are rounded to the dtypes in which they are stored, but for
    layers that are compressed.

    Args:
        compressed: module names.
    """
    entries = {
        name: attrs.evolve(entry, is_copied=name.removesuffix(".weight") not in compressed)
        if isinstance(entry, (RotatedView, DequantizedView))
        else entry
        for name, entry in source.entries.items()
    }
    return attrs.evolve(source, entries=entries)


def unrotate(source: Checkpoint) -> Checkpoint:
    """The model as it was before its hidden states were rotated; the same where they were not."""
    return (isinstance(source, Source) and source.original) or source


def estimate_reading(source: Checkpoint) -> int:
    """Bytes that reading a rotated tensor takes at most, beside its rows; 0 where none is."""
    views = [entry for entry in source.entries.values() if isinstance(entry, RotatedView)]
    if not views:
        return 0
    # a matrix as it is stored and as it is rotated, and what is made of a pass over some of it
    whole = [view.stored.nbytes + 4 * view.numel for view in views if view.is_whole]
    num_numbers = [view.shape[0] * (view.inputs.period if view.inputs else 1) for view in views]
    passes = [n for view, n in zip(views, num_numbers, strict=True) if view.is_whole]
    return max(whole, default=0) + PASS_BYTES * max([NUMBERS_PER_PASS, *passes])
