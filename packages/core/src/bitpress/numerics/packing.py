"""Codes of 2, 4 or 8 bits side by side in bytes, or in 32-bit words, as compressed-tensors stores
them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes side by side in 32-bit words, row by row, as `pack-quantized` stores them.

    >>> pack_words(torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8), 4)
    tensor([[-22444272]], dtype=torch.int32)

    Args:
        codes: (rows, n) int8, from -2^(bits-1) to 2^(bits-1) - 1.
        bits: bits per code: 2, 4 or 8.

    Returns:
        (rows, ceil(n bits / 32)) int32. 2^(bits-1) is added to make codes unsigned; the first lies
        in a word's lowest bits, the last word is filled with zero bits.
    """
    # With 8 bits the sum wraps around in int8, and is right when read as uint8.
    unsigned = (codes + (1 << bits - 1)).view(torch.uint8)
    padded = torch.nn.functional.pad(unsigned, (0, -codes.shape[1] % (32 // bits)))
    # On little-endian machines a word's lowest byte comes first.
    return pack_bytes(padded, bits).view(torch.int32)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes side by side in bytes, row by row.

    >>> pack_bytes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4)
    tensor([[33, 15]], dtype=torch.uint8)

    Args:
        codes: (rows, n) uint8, from 0 to 2^bits - 1; n fills whole bytes.
        bits: bits per code: 2, 4 or 8.

    Returns:
        (rows, n bits / 8) uint8, the first code in a byte's lowest bits.
    """
    rows, codes = len(codes), codes.reshape(-1)
    # Two neighbors become one code of twice the bits, until a code is a byte.
    while bits < 8:
        # Of two bytes read as an int16, the first is the low one.
        pairs = codes.view(torch.int16)
        codes = (pairs >> 8 - bits).bitwise_or_(pairs).to(torch.uint8)
        bits = 2 * bits
    return codes.view(rows, -1)


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bytes`: (rows, bytes) uint8 -> (rows, 8 bytes / bits) uint8."""
    code_mask = (1 << bits) - 1
    codes = [packed >> shift & code_mask for shift in range(0, 8, bits)]
    return torch.stack(codes, 2).flatten(1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_words`: (rows, words) int32 -> (rows, count) int8."""
    unsigned = unpack_bytes(words.contiguous().view(torch.uint8), bits)[:, :count]
    return (unsigned - (1 << bits - 1)).view(torch.int8)
