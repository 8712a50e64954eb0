"""Matrices that files hold in another form: inside a tensor of all experts, or transposed. They are
computed while they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from attrs import frozen

from bitpress.checkpoint.safetensors import BITS, Entry
from bitpress.runtime.devices import CPU

T = TypeVar("T")


class MatrixReader(Protocol):
    """The methods of a reader that a view calls."""

    def rows(self, entry: Entry, first: int, last: int, device: torch.device = CPU) -> torch.Tensor:
        """Rows `first` to `last` (exclusive) of a tensor, on a device."""

    def whole(self, entry: Entry) -> torch.Tensor:
        """All of a tensor."""

    def transposed(self, entry: Entry) -> torch.Tensor:
        """All of a matrix, transposed."""

    def computed(self, entry: Entry, compute: Callable[[], T]) -> T:
        """What is computed of a whole tensor, and read by rows."""


@frozen
class View(Entry):
    """A matrix (out, in) made of stored tensors; name, dtype and shape are the view's own.

    Attributes:
        stored: the matrix of which the view is some rows, or some columns where that is (in, out).
        first: the first of these rows or columns.
        transposed: whether `stored` is (in, out).
        whole: the tensor of all experts of which `stored` is a part; None where it is none.
    """

    stored: Entry
    first: int = 0
    transposed: bool = False
    whole: Entry | None = None

    @property
    def file_bytes(self) -> int:
        """Bytes of the files that it is made of."""
        if isinstance(self.stored, View):
            return self.stored.file_bytes
        return self.numel * BITS[self.stored.dtype] // 8

    @property
    def held_bytes(self) -> int:
        """Bytes that a thread holds of it beside the rows that it reads: a matrix that is turned,
        twice.
        """
        below = self.stored.held_bytes if isinstance(self.stored, View) else 0
        return below + (2 * self.stored.nbytes if self.transposed else 0)

    def rows(
        self,
        reader: MatrixReader,
        first: int,
        last: int,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
    ) -> torch.Tensor:
        """Rows `first` to `last` (exclusive), on the CPU unless they are computed on a device."""
        first, last = self.first + first, self.first + last
        if self.transposed:
            return reader.transposed(self.stored)[first:last].contiguous()
        return reader.rows(self.stored, first, last)


def fill_rows(
    target: torch.Tensor,
    first: int,
    period: int,
    max_rows: int,
    make_rows: Callable[[int, int], torch.Tensor],
) -> None:
    """Fill a tensor with rows of a matrix that are made together.

    Args:
        target: (rows, ...) of any dtype.
        first: the number of its first row in the matrix.
        period: rows that are made of one another: a multiple of it is where a piece begins.
        max_rows: of a piece; at least `period` are made.
        make_rows: the rows of the matrix from a number to another (exclusive), or as many as there
            are.
    """
    last, step = first + len(target), max(max_rows // period, 1) * period
    for start in range(first // period * period, last, step):
        piece = make_rows(start, start + step)
        begin, end = max(first, start), min(last, start + step)
        target[begin - first : end - first] = piece[begin - start : end - start]


def select_matrix(stored: Entry, number: int) -> Entry:
    """One matrix of a tensor (matrices, rows, columns), as a tensor of the file."""
    shape = stored.shape[1:]
    size = stored.nbytes // stored.shape[0]
    return Entry(
        f"{stored.name}[{number}]", stored.dtype, shape, stored.file, stored.start + number * size
    )
