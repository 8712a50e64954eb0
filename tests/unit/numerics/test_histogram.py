"""Clips found on a histogram that adds up, against the numbers themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures.fake_gpu import GPU, Elsewhere, Pretended, bare

from bitpress import numerics
from bitpress.numerics.histogram import MAX_EXPONENT, MIN_EXPONENT


def long_tailed(count: int, seed: int = 0) -> torch.Tensor:
    """Numbers of which few are large."""
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return x * x.abs() ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitudes_are_counted_eight_to_the_octave(dtype: torch.dtype) -> None:
    x = long_tailed(4000).to(dtype)
    counts = numerics.magnitude_histogram(x)
    magnitudes = x.float().abs()
    for power in range(-12, 6):
        num_bins = (power - MIN_EXPONENT) * 8
        assert counts[:num_bins].sum() == ((magnitudes > 0) & (magnitudes < 2.0**power)).sum()


def test_zeros_and_nan_are_not_counted_and_the_ends_catch_what_lies_beyond() -> None:
    beyond = [2.0 ** (MIN_EXPONENT - 9), 2.0 ** (MAX_EXPONENT + 9), -3e38, torch.inf]
    x = torch.tensor([0.0, -0.0, torch.nan, *beyond])
    before = x.clone()
    counts = numerics.magnitude_histogram(x)
    assert counts.sum() == 4
    assert (counts[0], counts[-1]) == (1, 3)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


def test_halves_add_up_to_the_whole() -> None:
    x = long_tailed(1000)
    assert torch.equal(
        sum(numerics.magnitude_histogram(half) for half in x.chunk(2)),
        numerics.magnitude_histogram(x),
    )


@pytest.mark.parametrize("histogram", [True, False])
def test_what_is_observed_of_halves_merges_to_that_of_the_whole(histogram: bool) -> None:
    x = long_tailed(1000).view(100, 10)
    whole = numerics.observe_range(x, histogram=histogram)
    first, second = (numerics.observe_range(half, histogram=histogram) for half in x.chunk(2))
    assert whole.keys() == {"input_max", "input_min"} | ({"input_counts"} if histogram else set())
    for name, statistic in whole.items():
        assert torch.equal((first[name] | second[name]).value, statistic.value)
    assert numerics.input_absmax(whole) == x.abs().amax()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_magnitude_is_that_of_either_end(sign: int) -> None:
    x = sign * torch.tensor([[-1.0, 5.0], [2.0, -3.0]])
    assert numerics.input_absmax(numerics.observe_range(x, histogram=False)) == 5


def test_where_no_input_was_observed_there_is_no_largest_magnitude() -> None:
    assert numerics.input_absmax({}) is None


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 0.9999])
def test_a_clip_by_share_keeps_that_share_to_an_eighth_of_an_octave(share: float) -> None:
    x = long_tailed(50_000).abs()
    clip = numerics.clip_by_share(numerics.magnitude_histogram(x), x.amax(), share)
    exact = x.quantile(share)
    assert exact <= clip <= exact * 2 ** (1 / 8) * 1.001


def test_a_clip_never_lies_beyond_the_largest_number() -> None:
    x = torch.tensor([1.0, 1.01])
    assert numerics.clip_by_share(numerics.magnitude_histogram(x), x.amax(), 1.0) == x.amax()


def test_the_median_ignores_zeros() -> None:
    x = torch.cat([torch.zeros(1000), long_tailed(1001).abs()])
    median = x[1000:].median()
    assert (
        median
        <= numerics.median_magnitude(numerics.magnitude_histogram(x))
        <= median * 2 ** (1 / 8) * 1.001
    )


@pytest.mark.parametrize("steps", [7.5, 127.5])
def test_a_clip_by_error_is_as_good_as_the_best_found_by_trying(steps: float) -> None:
    x = long_tailed(20_000)

    def cost(clip: torch.Tensor) -> float:
        unit = clip / steps
        return float(
            ((x / unit).round().clamp(-steps - 0.5, steps - 0.5) * unit - x).square().mean()
        )

    clip = numerics.clip_by_error(
        numerics.magnitude_histogram(x), x.abs().amax(), lambda m, c: c / steps
    )
    best = min(cost(x.abs().amax() * ratio) for ratio in torch.linspace(0.02, 1.0, 200))
    assert cost(clip) <= 1.1 * best
    assert cost(clip) <= cost(x.abs().amax()) * 1.001


def test_numbers_without_outliers_are_not_clipped_by_error() -> None:
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    clip = numerics.clip_by_error(
        numerics.magnitude_histogram(x), x.abs().amax(), lambda m, c: c / 127.5
    )
    assert clip > 0.9


def test_a_gpu_is_not_asked_for_every_clip_that_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    x = long_tailed(20_000)
    counts, amax = numerics.magnitude_histogram(x), x.abs().amax()
    expected = numerics.clip_by_error(counts, amax, numerics.e4m3_step)
    compute, operations = Elsewhere.__torch_dispatch__, []

    def count(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operations.append(func)
        return compute(func, types, args, kwargs)

    monkeypatch.setattr(Elsewhere, "__torch_dispatch__", classmethod(count))
    with Pretended():
        on_gpu = counts.to(GPU), amax.to(GPU)
        operations.clear()
        clip = numerics.clip_by_error(*on_gpu, numerics.e4m3_step)
    assert clip.device == GPU
    assert torch.equal(bare(clip), expected)
    # both are brought, the clip goes back
    assert len(operations) <= 3
