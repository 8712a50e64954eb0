"""What is the same on every device, and whose copies threads share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fixtures.fake_gpu import GPU, Pretended, bare
from torch import Tensor

from bitpress.numerics.exact import power_of_two, scalar_like
from bitpress.numerics.histogram import magnitude_histogram
from bitpress.numerics.scale_search import table_for_device


@pytest.mark.parametrize("number", [3.0, 6.0, 127.5, 448.0])
def test_a_gpu_divides_by_a_number_beside_it_as_a_cpu_does(number: float) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    with Pretended():
        on_gpu = x.to(GPU)
        quotient, by_reciprocal = on_gpu / scalar_like(on_gpu, number), on_gpu / number
    assert torch.equal(bare(quotient), x / number)
    # the pretended GPU tells them apart
    assert not torch.equal(bare(by_reciprocal), x / number)


def test_a_power_of_two_is_exact() -> None:
    exponent = torch.arange(-126, 128, dtype=torch.int32)
    with Pretended():
        powers = power_of_two(exponent.to(GPU))
    assert bare(powers).tolist() == [2.0**e for e in range(-126, 128)]


def test_a_gpu_puts_numbers_of_bfloat16_into_the_bins_of_a_cpu() -> None:
    x = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    with Pretended():
        counts = magnitude_histogram(x.to(GPU))
    assert torch.equal(bare(counts), magnitude_histogram(x))


def make(size: int) -> Tensor:
    """A table."""
    return torch.ones(size)


def test_a_thread_shares_a_table_on_the_cpu_and_none_on_a_gpu() -> None:
    def find(device: torch.device) -> list[Tensor]:
        with Pretended():
            return [table_for_device(device, make, 3) for _ in range(2)]

    cpu = torch.device("cpu")
    with ThreadPoolExecutor(1) as other:
        of_other, on_gpu_of_other = (other.submit(find, device).result() for device in (cpu, GPU))
    table, again = find(GPU)
    assert table is again
    assert table.device == GPU
    assert table is not on_gpu_of_other[0]
    assert find(cpu)[0] is of_other[0]
