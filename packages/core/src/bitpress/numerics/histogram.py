"""Where to clip activations whose scale is fixed beforehand, from a histogram of their
magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# bins: their edges are powers of two to the eighth parts
PER_OCTAVE, LOWEST, HIGHEST = 8, -24, 24

BINS = PER_OCTAVE * (HIGHEST - LOWEST)

# of all magnitudes that a percentile keeps
SHARE = 0.9999


def magnitude_histogram(x: Tensor) -> Tensor:
    """How many magnitudes of x lie in each bin: (BINS,) float32, a sum over batches. Zeros are not
    counted.
    """
    found = x.abs().float().flatten()
    found = found[found > 0]
    place = ((found.log2() - LOWEST) * PER_OCTAVE).floor_().clamp_(0, BINS - 1)
    return torch.bincount(place.long(), minlength=BINS).float()


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
    return (
        clip_by_share(counts, amax, SHARE)
        if outliers == "percentile"
        else clip_by_error(counts, amax, step)
    )


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
