"""E2M1 numbers against all sixteen of them."""

from __future__ import annotations

import pytest
import torch

from bitpress import numerics

NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
TABLE = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)])


def test_every_number_has_its_code() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(numerics.decode_e2m1(codes), TABLE)
    # both zeros have the code of 0
    assert torch.equal(numerics.encode_e2m1(TABLE), codes.masked_fill(codes == 8, 0))


def test_rounding_finds_the_nearest_of_all() -> None:
    x = torch.linspace(-9, 9, 36_001)
    distance = (x.unsqueeze(1) - TABLE).abs()
    rounded = numerics.round_e2m1(x)
    assert torch.equal((x - rounded).abs(), distance.amin(1))
    assert torch.isin(rounded, TABLE).all()


@pytest.mark.parametrize(
    ("x", "nearest"),
    [
        (0.25, 0),
        (0.75, 1),
        (1.25, 1),
        (1.75, 2),
        (2.5, 2),
        (3.5, 4),
        (5.0, 4),
        (5.01, 6),
        (1e30, 6),
        (-5.0, -4),
        (-0.3, -0.5),
    ],
)
def test_ties_go_to_the_even_code_and_what_is_too_large_to_six(x: float, nearest: float) -> None:
    assert numerics.round_e2m1(torch.tensor([x])).item() == nearest


def test_nan_stays_nan() -> None:
    assert numerics.round_e2m1(torch.tensor([torch.nan])).isnan().all()


def test_bytes_hold_the_first_code_lowest() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    packed = numerics.pack_bytes(codes, 4)
    assert packed.flatten().tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(numerics.unpack_bytes(packed, 4), codes)


@pytest.mark.parametrize("clipped", [0.0, 3.0, 26.0])
def test_a_bound_is_half_the_wider_step_beside_a_code_and_beyond_six_what_was_clipped(
    clipped: float,
) -> None:
    bounds = numerics.e2m1_bound(torch.arange(16, dtype=torch.uint8), clipped)
    for code, number in enumerate(TABLE.tolist()):
        beside = [abs(number - other) for other in TABLE.tolist() if other != number]
        steps = sorted(beside)[:2]
        expected = max(clipped, 1.0) if abs(number) == 6 else max(steps) / 2
        assert bounds[code].item() == expected
