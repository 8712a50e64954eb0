"""Static activation scales: what to observe of inputs, and where to clip them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bitpress.schemes.values import Statistic

# The edges of bins are powers of two, and seven steps between each two of them.
PER_OCTAVE, LOWEST, HIGHEST = 8, -24, 24

BINS = PER_OCTAVE * (HIGHEST - LOWEST)

# The share of all magnitudes that "percentile" keeps.
SHARE = 0.9999


def observe_range(inputs: Tensor, *, histogram: bool) -> dict[str, Statistic]:
    """What a static scale of a layer's inputs is chosen from.

    "input_max" and "input_min", both without axes: the largest of x, and of -x; as asked for
    "input_counts" (BINS,), the histogram of magnitudes.

    Args:
        inputs: (tokens, in), floating.
        histogram: whether a clip below the largest input may be chosen.
    """
    x = inputs.float()
    stats = {
        "input_max": Statistic(x.amax(), "max"),
        "input_min": Statistic(-x.amin(), "max"),
    }
    if histogram:
        stats["input_counts"] = Statistic(magnitude_histogram(x), "sum")
    return stats


def input_absmax(stats: Mapping[str, Statistic]) -> Tensor | None:
    """The largest magnitude of inputs, without axes; None where none was observed."""
    if "input_max" not in stats:
        return None
    return stats["input_max"].value.maximum(stats["input_min"].value)


def magnitude_histogram(x: Tensor) -> Tensor:
    """How many magnitudes of x lie in each bin: (BINS,) float32, a sum over batches. Zeros are not
    counted.
    """
    magnitudes = x.abs().float().flatten()
    magnitudes = magnitudes[magnitudes > 0]
    bins = ((magnitudes.log2() - LOWEST) * PER_OCTAVE).floor_().clamp_(0, BINS - 1)
    return torch.bincount(bins.long(), minlength=BINS).float()


def clip_range(
    counts: Tensor, amax: Tensor, outliers: str, step: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """What a fixed scale should reach: amax ("max"), 99.99 % of all magnitudes ("percentile"), or
    what costs least ("mse").

    Args:
        step: as for `clip_by_error`.
    """
    if outliers == "max" or not counts.any():
        return amax
    if outliers == "percentile":
        return clip_by_share(counts, amax, SHARE)
    return clip_by_error(counts, amax, step)


def clip_by_share(counts: Tensor, amax: Tensor, share: float) -> Tensor:
    """The least upper edge of a bin below which that share of all magnitudes lies, at most amax."""
    reached = counts.double().cumsum(0) >= share * counts.double().sum()
    least: Tensor = _upper_edges(counts)[reached].min()
    return torch.minimum(least, amax)


def clip_by_error(counts: Tensor, amax: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The clip, amax or an upper edge of a bin below it, at which rounding and clipping cost least
    together.

    Args:
        step: given magnitudes and a clip, how far the representable numbers near them lie apart.
    """
    middle = _upper_edges(counts) * 2.0 ** (-0.5 / PER_OCTAVE)
    candidates = [amax, *(edge for edge in _upper_edges(counts) if amax / 256 < edge < amax)]
    costs = []
    for limit in candidates:
        near = step(middle, limit)
        # to zero, or somewhere within a step
        rounding = torch.where(middle < near / 2, middle, near / 12**0.5)
        error = torch.where(middle <= limit, rounding, middle - limit).square()
        costs.append((error.double() * counts.double()).sum())
    best: Tensor = candidates[int(torch.stack(costs).argmin())]
    return best


def median_magnitude(counts: Tensor) -> Tensor:
    """The median magnitude, to an eighth of an octave."""
    return clip_by_share(counts, counts.new_tensor(torch.inf), 0.5)


def _upper_edges(counts: Tensor) -> Tensor:
    return ((torch.arange(BINS, device=counts.device) + 1) / PER_OCTAVE + LOWEST).exp2()
