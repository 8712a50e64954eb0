"""What is measured of a layer that is installed."""

from __future__ import annotations

import pytest
import torch

from bitpress.compression.calibration.solution import _output_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", [0.01, 0.0005])
def test_the_error_of_an_output_is_that_of_float64(dtype: torch.dtype, step: float) -> None:
    draw = torch.Generator().manual_seed(0)
    sample = torch.randn(200, 96, generator=draw).to(dtype)
    weight = (torch.randn(70, 96, generator=draw) * 0.02).to(dtype)
    dequantized = (weight.float() / step).round() * step

    x, w, q = (tensor.double() for tensor in (sample, weight, dequantized))
    expected = float((x @ (w - q).T).norm() / (x @ w.T).norm())
    assert _output_error(sample, weight, dequantized) == pytest.approx(expected, rel=2e-3)


def test_an_output_of_zeros_has_no_error() -> None:
    weight = torch.zeros(3, 8, dtype=torch.bfloat16)
    assert _output_error(torch.ones(4, 8, dtype=torch.bfloat16), weight, weight.float()) == 0.0
