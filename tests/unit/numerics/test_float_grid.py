"""Numbers of a small float format times scales, against all of them."""

from __future__ import annotations

import pytest
import torch

from bitpress import numerics

FORMATS = {
    "E2M1": torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),
    "E4M3": torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_become_the_nearest_number_of_the_format_times_their_scale(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 24, generator=generator) * FORMATS[name].max()
    scale = torch.rand(6, 3, generator=generator) + 0.5
    grid = numerics.FloatGrid(getattr(numerics, name), scale, 8)

    units = weight.view(6, 3, 8) / scale.unsqueeze(2)
    table = torch.cat([FORMATS[name], -FORMATS[name]])
    nearest = table[(units.unsqueeze(3) - table).abs().argmin(3)]
    assert torch.equal(grid.units(weight), nearest.view(6, 24))
    assert torch.equal(grid.rounded(weight), (nearest * scale.unsqueeze(2)).view(6, 24))


@pytest.mark.parametrize("name", FORMATS)
def test_a_column_and_some_rows_are_rounded_as_the_whole_is(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 24, generator=generator)
    grid = numerics.FloatGrid(
        getattr(numerics, name), torch.rand(6, 3, generator=generator) + 0.1, 8
    )
    whole, rows = grid.rounded(weight), slice(2, 5)
    assert torch.equal(grid.rounded(weight[rows], rows), whole[rows])
    for column in range(24):
        assert torch.equal(grid.nearest(weight[rows, column], rows, column), whole[rows, column])
