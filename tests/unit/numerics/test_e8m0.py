"""Powers of two as bytes, against Python's exact numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from bitpress import numerics


def test_every_code_stands_for_its_power_and_the_last_for_nan() -> None:
    numbers = numerics.decode_e8m0(torch.arange(256, dtype=torch.uint8)).double().tolist()
    assert numbers[:255] == [2.0 ** (code - 127) for code in range(255)]
    assert math.isnan(numbers[255])


def test_powers_are_encoded_as_they_are_decoded() -> None:
    codes = torch.arange(1, 255, dtype=torch.uint8)
    assert torch.equal(numerics.encode_e8m0(numerics.decode_e8m0(codes)), codes)


@settings(derandomize=True, deadline=None)
@given(
    st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([6.0, 7.0, 8.0, 448.0, 464.0, 0.3])
)
def test_the_least_power_of_two_above_is_found(amax: float, limit: float) -> None:
    power = numerics.power_above(torch.tensor(amax), limit).item()
    assert math.frexp(power)[0] == 0.5
    assert power / 2 * limit <= amax < power * limit


@pytest.mark.parametrize(
    ("amax", "limit", "power"),
    [(2.0**-149, 4.0, 2.0**-126), (2.0**127, 2.0**-10, 2.0**127), (0.0, 8.0, 2.0**-4)],
)
def test_it_is_a_normal_number_whatever_is_asked_for(
    amax: float, limit: float, power: float
) -> None:
    assert numerics.power_above(torch.tensor(amax), limit).item() == power
