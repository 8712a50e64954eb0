"""Codes of 1 to 8 bits side by side in bytes, or in 32-bit words, as compressed-tensors stores
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The widest code: it fills a byte.
MAX_BITS = 8

# So many codes of any width fill whole bytes, and four times as many whole words.
CODES_PER_GROUP = 8


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes side by side in 32-bit words, row by row, as `pack-quantized` stores them.

    Examples:
        >>> pack_words(torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8), 4)
        tensor([[-22444272]], dtype=torch.int32)

    Args:
        codes: (rows, n) int8, from -2^(bits-1) to 2^(bits-1) - 1.
        bits: bits per code, 1 to 8. Codes of 3, 5, 6 or 7 bits lie across words, as
            compressed-tensors stores them from 0.18 on.

    Returns:
        (rows, ceil(n bits / 32)) int32. 2^(bits-1) is added to make codes unsigned; the first lies
        in a word's lowest bits, the last word is filled with zero bits.

    Raises:
        ValueError: codes of that width, dtype or shape cannot be packed.
    """
    _require_width(bits)
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(
            f"pack_words takes int8 codes (rows, n), and got {codes.dtype} of shape "
            f"{tuple(codes.shape)}"
        )
    num_codes = codes.shape[1]
    num_words = -(-num_codes * bits // 32)
    # With 8 bits the sum wraps around in int8, and is right when read as uint8.
    unsigned = (codes + (1 << bits - 1)).view(torch.uint8)
    codes_per_step = 32 // bits if _divides_byte(bits) else 4 * CODES_PER_GROUP
    padded = torch.nn.functional.pad(unsigned, (0, -num_codes % codes_per_step))
    # On little-endian machines a word's lowest byte comes first.
    words = pack_bytes(padded, bits).view(torch.int32)
    return words[:, :num_words].contiguous()


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes side by side in bytes, row by row.

    Examples:
        >>> pack_bytes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4)
        tensor([[33, 15]], dtype=torch.uint8)

    Args:
        codes: (rows, n) uint8, from 0 to 2^bits - 1. n fills whole bytes; with 3, 5, 6 or 7 bits it
            is a multiple of 8.
        bits: bits per code, 1 to 8.

    Returns:
        (rows, n bits / 8) uint8, the first code in a byte's lowest bits.

    Raises:
        ValueError: codes of that width or number cannot be packed.
    """
    _require_width(bits)
    multiple = 8 // bits if _divides_byte(bits) else CODES_PER_GROUP
    if codes.shape[1] % multiple:
        raise ValueError(
            f"pack_bytes takes a multiple of {multiple} codes of {bits} bits in a row, and got "
            f"{codes.shape[1]}"
        )
    if not _divides_byte(bits):
        return _pack_groups(codes, bits)

    rows, codes = len(codes), codes.reshape(-1)
    # Two neighbors become one code of twice the bits, until a code is a byte.
    while bits < 8:
        # Of two bytes read as an int16, the first is the low one.
        pairs = codes.view(torch.int16)
        codes = (pairs >> 8 - bits).bitwise_or_(pairs).to(torch.uint8)
        bits = 2 * bits
    return codes.view(rows, -1)


def unpack_bytes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bytes`: (rows, bytes) uint8 -> (rows, 8 bytes / bits) uint8.

    Raises:
        ValueError: codes of that width are not packed, or the bytes hold no whole number of them.
    """
    _require_width(bits)
    if not _divides_byte(bits):
        return _unpack_groups(packed, bits)
    code_mask = (1 << bits) - 1
    codes = [packed >> shift & code_mask for shift in range(0, 8, bits)]
    return torch.stack(codes, 2).flatten(1)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_words`: (rows, words) int32 -> (rows, count) int8.

    Raises:
        ValueError: codes of that width are not packed.
    """
    _require_width(bits)
    packed = words.contiguous().view(torch.uint8)
    if not _divides_byte(bits):
        # What `pack_words` has cut off: the words that only padding filled.
        packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits))
    unsigned = unpack_bytes(packed, bits)[:, :count]
    return (unsigned - (1 << bits - 1)).view(torch.int8)


def _pack_groups(codes: Tensor, bits: int) -> Tensor:
    """8 codes at a time, of fewer than 8 bits, as the `bits` lowest bytes of an int64."""
    groups = codes.reshape(len(codes), -1, CODES_PER_GROUP).long()  # (rows, groups, 8)
    shifts = bits * torch.arange(CODES_PER_GROUP, device=codes.device)
    # No two codes share a bit, so that their sum is their bitwise or.
    packed: Tensor = (groups << shifts).sum(2, keepdim=True)  # (rows, groups, 1)
    return packed.view(torch.uint8)[:, :, :bits].flatten(1)


def _unpack_groups(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack_groups`."""
    if packed.shape[1] % bits:
        raise ValueError(
            f"unpack_bytes takes a multiple of {bits} bytes in a row, and got {packed.shape[1]}"
        )
    group_bytes = packed.reshape(len(packed), -1, bits)  # (rows, groups, bits)
    padded = torch.nn.functional.pad(group_bytes, (0, 8 - bits)).contiguous()
    shifts = bits * torch.arange(CODES_PER_GROUP, device=packed.device)
    codes = padded.view(torch.int64) >> shifts & (1 << bits) - 1  # (rows, groups, 8)
    return codes.to(torch.uint8).flatten(1)


def _divides_byte(bits: int) -> bool:
    return 8 % bits == 0


def _require_width(bits: int) -> None:
    if bits not in range(1, MAX_BITS + 1):
        raise ValueError(f"codes have 1 to {MAX_BITS} bits, and not {bits}")
