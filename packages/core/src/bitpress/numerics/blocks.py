"""Largest magnitudes of rows, tiles of a matrix and whole tensors, and scales spread back over what
they cover.
"""

from __future__ import annotations

import torch
from torch import Tensor

# numbers along which loops over floats are slower than those over integers
FEW = 32


def absmax(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude along an axis, which is kept with length 1, or of everything, as a
    tensor without axes.

    >>> absmax(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), dim=1)
    tensor([[3.], [2.]])
    """
    if dim is None:
        return x.amax().maximum(-x.amin())
    # magnitudes are ordered as their bits are
    if x.shape[dim] < FEW and x.dtype == torch.float32:
        return (
            x.view(torch.int32).bitwise_and(0x7FFFFFFF).amax(dim, keepdim=True).view(torch.float32)
        )
    # twice as fast as abs().amax()
    return x.amax(dim, keepdim=True).maximum(-x.amin(dim, keepdim=True))


def block_absmax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each tile of a matrix: (out, in) -> (ceil(out / rows), ceil(in /
    columns)).

    Tiles at the lower and right edge hold what is left; nothing is repeated or padded into them but
    zeros.
    """
    rows, columns = block
    out, width = x.shape
    high, wide = -(-out // rows), -(-width // columns)
    if width % columns:
        x = torch.nn.functional.pad(x, (0, wide * columns - width))
    row = absmax(x.reshape(out, wide, columns), dim=2).squeeze(2)  # (out, wide)
    if out % rows:
        row = torch.nn.functional.pad(row, (0, 0, 0, high * rows - out))
    return row.reshape(high, rows, wide).amax(1)  # (high, wide)


def expand_blocks(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Scales of tiles spread over the matrix they cover: (high, wide) -> `shape`."""
    rows, columns = block
    wide = scale.repeat_interleave(columns, 1)[:, : shape[1]]  # (high, in)
    return wide.unsqueeze(1).expand(-1, rows, -1).reshape(-1, shape[1])[: shape[0]]  # (out, in)
