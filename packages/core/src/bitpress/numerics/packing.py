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
    each = 32 // bits
    unsigned = codes.to(torch.int32) + (1 << bits - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % each))
    words = unsigned.reshape(len(codes), -1, each) << (torch.arange(each, dtype=torch.int32, device=codes.device) * bits)
    return words.sum(2, dtype=torch.int32)  # no two share a bit, so that a sum is a union


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: (rows, words) int32 -> (rows, count) int8."""
    each = 32 // bits
    shifts = torch.arange(each, dtype=torch.int32, device=words.device) * bits
    unsigned = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)  # (rows, words, each)
    return (unsigned.flatten(1)[:, :count] - (1 << bits - 1)).to(torch.int8)
