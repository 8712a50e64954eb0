"""Weights without the zeros between them, and a bit for each position: as compressed-tensors up to
0.14 reads them.

Bit i of byte j of a row stands for column 8 j + i. Zeros that the mask keeps are stored like other
weights, so that their number follows from the options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def compress(weight: Tensor, mask: Tensor) -> Tensor:
    """(out, kept): the weights where the mask (out, in) is True, as many in every row."""
    return weight[mask].view(len(weight), -1)


def pack_mask(mask: Tensor) -> Tensor:
    """(out, in) bool -> (out, ceil(in / 8)) uint8."""
    import torch

    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -1, 8)
    return (padded << torch.arange(8, device=mask.device)).sum(2).to(torch.uint8)


def decompress(values: Tensor, packed_mask: Tensor, width: int) -> Tensor:
    """The weight (out, in), from what `compress` and `pack_mask` gave."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=packed_mask.device)
    bits = packed_mask.unsqueeze(2) >> shifts & 1  # (out, bytes, 8)
    mask = bits.flatten(1)[:, :width].bool()
    weight = values.new_zeros(mask.shape)
    weight[mask] = values.flatten()
    return weight
