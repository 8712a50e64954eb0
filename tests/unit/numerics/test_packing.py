"""Codes of every width lie side by side in a row's stream of bits, and come back as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from bitpress import numerics


def draw_codes(bits: int, rows: int, count: int, seed: int) -> torch.Tensor:
    low, high = numerics.integer_range(bits)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (rows, count), generator=generator, dtype=torch.int8)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(1, 70), st.integers(0, 1000))
def test_packed_words_are_little_endian_streams_of_codes(
    bits: int, rows: int, count: int, seed: int
) -> None:
    codes = draw_codes(bits, rows, count, seed)
    words = numerics.pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, -(-count * bits // 32))
    assert words.is_contiguous()
    offset = 1 << bits - 1
    for row, line in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum((code + offset) << i * bits for i, code in enumerate(row))
        assert [word & 0xFFFFFFFF for word in line] == [
            stream >> 32 * i & 0xFFFFFFFF for i in range(len(line))
        ]
    assert torch.equal(numerics.unpack_words(words, bits, count), codes)
    # strides do not matter
    transposed = numerics.pack_words(codes.T, bits)
    assert torch.equal(numerics.unpack_words(transposed.T.contiguous().T, bits, rows), codes.T)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_comes_back(bits: int) -> None:
    low, high = numerics.integer_range(bits)
    codes = torch.arange(low, high + 1).to(torch.int8).repeat(3, 1)
    count = codes.shape[1]
    assert torch.equal(numerics.unpack_words(numerics.pack_words(codes, bits), bits, count), codes)


def test_three_bits_lie_across_words() -> None:
    codes = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3, -4, 3, 0]], dtype=torch.int8)
    assert numerics.pack_words(codes, 3).tolist() == [[0x38FAC688, 1]]


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_a_width_that_no_byte_holds_is_refused_in_words(bits: int) -> None:
    codes = torch.zeros(1, 32, dtype=torch.int8)
    for call in (
        lambda: numerics.pack_words(codes, bits),
        lambda: numerics.unpack_words(codes.view(torch.int32), bits, 8),
        lambda: numerics.pack_bytes(codes.view(torch.uint8), bits),
        lambda: numerics.unpack_bytes(codes.view(torch.uint8), bits),
    ):
        with pytest.raises(ValueError, match=f"codes have 1 to 8 bits, and not {bits}"):
            call()


def test_what_is_no_row_of_codes_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"takes int8 codes .* got torch\.float32 of shape"):
        numerics.pack_words(torch.zeros(2, 8), 4)
    with pytest.raises(ValueError, match=r"of shape \(8,\)"):
        numerics.pack_words(torch.zeros(8, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="a multiple of 8 codes of 3 bits"):
        numerics.pack_bytes(torch.zeros(1, 4, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="a multiple of 2 codes of 4 bits"):
        numerics.pack_bytes(torch.zeros(1, 3, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="a multiple of 3 bytes"):
        numerics.unpack_bytes(torch.zeros(1, 4, dtype=torch.uint8), 3)
