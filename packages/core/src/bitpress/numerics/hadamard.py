"""Rotations of channels by a Hadamard matrix: QuaRot (arXiv:2404.00456), SpinQuant
(arXiv:2405.16406).
"""

from __future__ import annotations

import hashlib
import math

import torch
from attrs import frozen
from torch import Tensor


@frozen
class Rotation:
    """The orthogonal matrix R = diag(signs) · H / sqrt(b), the same for every period of channels.

    H is the Hadamard matrix of Sylvester's form, in blocks of b channels, b being the largest power
    of two that divides the period. The signs spread what would otherwise stay in the first channel
    of a block, the sum of all.

    Attributes:
        period: channels after which it repeats: those of a head, or of all.
    """

    period: int

    @property
    def block(self) -> int:
        """Channels that are mixed with one another."""
        return self.period & -self.period

    def factors(self) -> Tensor:
        """The signs, each divided by the root of the block's size, (period,) float64.

        They are bits of a digest: every release of torch, on every device, has the same.
        """
        digest = hashlib.shake_256(f"bitpress rotation {self.period}".encode())
        num_bytes = -(-self.period // 8)
        data = torch.frombuffer(bytearray(digest.digest(num_bytes)), dtype=torch.uint8)
        bits = data.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1
        signs: Tensor = 1 - 2 * bits.flatten()[: self.period].double()
        return signs / math.sqrt(self.block)


def rotate_rows(matrix: Tensor, rotation: Rotation) -> Tensor:
    """Rᵀ W, of a matrix whose rows are the channels.

    Only sums and differences of two numbers, and one product, are taken of each: the result is the
    same to the bit however many columns are rotated together.

    Args:
        matrix: (periods of channels, columns) float64.
    """
    num_channels, num_columns = matrix.shape
    factors = rotation.factors().repeat(num_channels // rotation.period)
    rotated = matrix * factors.unsqueeze(1)
    half = 1
    while half < rotation.block:
        pairs = rotated.reshape(-1, 2, half, num_columns)
        rotated = torch.empty_like(pairs)
        torch.add(pairs[:, 0], pairs[:, 1], out=rotated[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=rotated[:, 1])
        half *= 2
    return rotated.reshape(num_channels, num_columns)


def rotate_columns(matrix: Tensor, rotation: Rotation) -> Tensor:
    """W R, of a matrix (rows, periods of channels) float64."""
    return rotate_rows(matrix.T.contiguous(), rotation).T
