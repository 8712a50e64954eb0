"""What 8-bit integers and E4M3 make of inputs, against a reference in float64."""

from __future__ import annotations

import pytest
import torch

from bitpress import numerics

X = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)) + 0.3


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_lie_at_most_half_a_step_from_their_codes(symmetric: bool) -> None:
    x = X.double()
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    step = x.abs().amax(1, keepdim=True) / 127.5 if symmetric else (high - low) / 255
    rounded = numerics.round_tokens_int8(X, symmetric=symmetric).double()
    error = ((rounded - x) / step).abs()
    # both ends of the range may be half a code outside it
    assert error.amax() <= (0.5 + 1e-4 if symmetric else 1.0)
    assert (error <= 0.5 + 1e-4).double().mean() > 0.95
    offset = 0 if symmetric else (-128 - low / step).round().clamp(-128, 127)
    codes = rounded / step + offset
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert -128 <= codes.round().amin() <= codes.round().amax() <= 127


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(2, 8)
    for symmetric in (True, False):
        assert torch.equal(numerics.round_tokens_int8(zeros, symmetric=symmetric), zeros)
    assert torch.equal(numerics.round_rows_e4m3(zeros), zeros)


def test_rows_of_e4m3_are_the_nearest_numbers_in_units_of_448() -> None:
    table = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    scale = X.double().abs().amax(1, keepdim=True) / 448
    units = X.double() / scale
    distance = (units.abs().unsqueeze(2) - table).abs().amin(2)
    result = numerics.round_rows_e4m3(X).double() / scale
    torch.testing.assert_close((result - units).abs(), distance, rtol=1e-3, atol=1e-4)
