"""Codes of 2, 4 or 8 bits side by side in 32-bit words, as compressed-tensors' `pack-quantized` stores them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """(rows, n) int8 codes -> (rows, ceil(n bits / 32)) int32.

    2^(bits-1) is added to make codes unsigned; the first lies in a word's lowest bits, the last word is filled with zero bits.

    >>> pack_words(torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8), 4)
    tensor([[-22444272]], dtype=torch.int32)
    """
    each = 8 // bits
    unsigned = (codes + (1 << bits - 1)).view(torch.uint8)  # wraps around as it should
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % (32 // bits))).view(len(codes), -1, each)
    found: Tensor = unsigned[:, :, 0].contiguous()  # (rows, bytes); a word's lowest byte comes first
    for place in range(1, each):
        found |= unsigned[:, :, place] << place * bits
    return found.view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: (rows, words) int32 -> (rows, count) int8."""
    packed = words.contiguous().view(torch.uint8)  # (rows, bytes)
    found = torch.stack([packed >> place & (1 << bits) - 1 for place in range(0, 8, bits)], 2).flatten(1)[:, :count]
    return (found - (1 << bits - 1)).view(torch.int8)
