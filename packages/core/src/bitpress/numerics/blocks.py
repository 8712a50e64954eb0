"""Largest magnitudes of rows, tiles of a matrix and whole tensors, and scales spread back over what
they cover.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Along an axis of fewer numbers, torch reduces float32 more slowly than int32.
SHORT_AXIS = 32


def absmax(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude along an axis, or of the whole tensor.

    Examples:
        >>> absmax(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), dim=1)
        tensor([[3.], [2.]])

    Args:
        x: any shape, floating.
        dim: the axis, which is kept with length 1; None for the whole tensor.

    Returns:
        The largest magnitudes, in the dtype of x; without axes where `dim` is None.
    """
    if dim is None:
        return x.amax().maximum(-x.amin())

    # Magnitudes of floats have the order of their bits, read as integers; those of 16 bits torch
    # reduces several times as fast, along any axis.
    is_half = x.dtype.itemsize == 2
    if is_half or (x.dtype == torch.float32 and x.shape[dim] < SHORT_AXIS):
        integer = torch.int16 if is_half else torch.int32
        magnitude = x.view(integer).bitwise_and(torch.iinfo(integer).max)
        return magnitude.amax(dim, keepdim=True).view(x.dtype)

    # Two reductions are twice as fast as abs().amax(), which writes all magnitudes first.
    return x.amax(dim, keepdim=True).maximum(-x.amin(dim, keepdim=True))


def block_absmax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each tile of a matrix.

    Tiles at the lower and right edge hold what is left of the matrix, padded with zeros only.

    Args:
        x: (out, in) floating.
        block: rows and columns of a tile.

    Returns:
        (ceil(out / rows), ceil(in / columns)), in the dtype of x.
    """
    rows, columns = block
    out, width = x.shape
    tiles_down, tiles_across = -(-out // rows), -(-width // columns)

    if width % columns:
        x = torch.nn.functional.pad(x, (0, tiles_across * columns - width))
    of_rows = absmax(x.reshape(out, tiles_across, columns), dim=2).squeeze(2)  # (out, tiles_across)

    if out % rows:
        of_rows = torch.nn.functional.pad(of_rows, (0, 0, 0, tiles_down * rows - out))
    return of_rows.reshape(tiles_down, rows, tiles_across).amax(1)  # (tiles_down, tiles_across)


def expand_blocks(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Scales of tiles, spread over the matrix that the tiles cover.

    Args:
        scale: (ceil(out / rows), ceil(in / columns)).
        block: rows and columns of a tile.
        shape: (out, in) of the matrix.

    Returns:
        (out, in), in the dtype of `scale`.
    """
    rows, columns = block
    out, width = shape
    over_columns = scale.repeat_interleave(columns, 1)[:, :width]  # (tiles_down, in)
    return over_columns.unsqueeze(1).expand(-1, rows, -1).reshape(-1, width)[:out]
