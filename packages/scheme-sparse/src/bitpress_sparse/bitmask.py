"""Kept weights without the zeros between them, and a bit for each place: as compressed-tensors up
to 0.14 reads them.

Bit i of byte j of a row stands for column 8 j + i. Weights that are kept and happen to be zero are
stored like the others, so that how many there are is known beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def values(weight: Tensor, mask: Tensor) -> Tensor:
    """(out, kept): the weights where the mask (out, in) is True, as many in every row."""
    return weight[mask].view(len(weight), -1)


def bits(mask: Tensor) -> Tensor:
    """(out, in) bool -> (out, ceil(in / 8)) uint8."""
    import torch

    padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).view(len(mask), -1, 8)
    return (padded << torch.arange(8, device=mask.device)).sum(2).to(torch.uint8)


def dense(values: Tensor, bits: Tensor, width: int) -> Tensor:
    """The inverse of both: (out, in)."""
    import torch

    mask = (
        (bits.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=bits.device) & 1)
        .flatten(1)[:, :width]
        .bool()
    )
    found = values.new_zeros(mask.shape)
    found[mask] = values.flatten()
    return found
