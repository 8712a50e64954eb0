"""Codes of 2, 4 or 8 bits side by side in bytes, or in 32-bit words, as compressed-tensors stores
them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) int8 codes -> (rows, ceil(n bits / 32)) int32.

    2^(bits-1) is added to make codes unsigned; the first lies in a word's lowest bits, the last
    word is filled with zero bits.

    >>> pack_words(torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8), 4)
    tensor([[-22444272]], dtype=torch.int32)
    """
    # wraps around as it should
    unsigned = (codes + (1 << bits - 1)).view(torch.uint8)
    padded = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % (32 // bits)))
    # a word's lowest byte comes first
    return pack_bytes(padded, bits).view(torch.int32)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) uint8 codes -> (rows, n bits / 8) uint8, the first code in a byte's lowest bits; n
    fills whole bytes.

    >>> pack_bytes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4)
    tensor([[33, 15]], dtype=torch.uint8)
    """
    rows, codes = len(codes), codes.reshape(-1)
    while bits < 8:
        # the first code is the low byte
        pairs = codes.view(torch.int16)
        codes, bits = (pairs >> 8 - bits).bitwise_or_(pairs).to(torch.uint8), 2 * bits
    return codes.view(rows, -1)


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """The inverse: (rows, bytes) uint8 -> (rows, 8 bytes / bits) uint8."""
    return torch.stack(
        [packed >> place & (1 << bits) - 1 for place in range(0, 8, bits)], 2
    ).flatten(1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_words`: (rows, words) int32 -> (rows, count) int8."""
    found = unpack_bytes(words.contiguous().view(torch.uint8), bits)[:, :count]
    return (found - (1 << bits - 1)).view(torch.int8)
