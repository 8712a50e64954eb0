"""Static activation scales: what to observe of inputs, and where to clip them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bitpress.schemes.values import Statistic

# Magnitudes from 2^-24 to 2^24 are told apart, eight bins to the octave; the first and the last bin
# hold what lies beyond.
BINS_PER_OCTAVE, MIN_EXPONENT, MAX_EXPONENT = 8, -24, 24
NUM_BINS = BINS_PER_OCTAVE * (MAX_EXPONENT - MIN_EXPONENT)

# Bins begin so much of one lower: a power of two belongs to the bin that begins with it, on devices
# whose logarithm of it is less in the last bit too.
EDGE = 2.0**-12

# The share of all magnitudes that "percentile" leaves unclipped.
PERCENTILE = 0.9999

# Clips below this part of the largest magnitude are not tried.
MIN_CLIP = 1 / 256


def observe_range(inputs: Tensor, *, histogram: bool) -> dict[str, Statistic]:
    """What a static scale of a layer's inputs is chosen from; call it from `observe`.

    Args:
        inputs: (tokens, in), floating.
        histogram: whether a clip below the largest input may be chosen.

    Returns:
        Statistics by name, float32: "input_max" and "input_min", both without axes, the largest of
        x and of -x; with a histogram also "input_counts" (NUM_BINS,), as `magnitude_histogram`
        gives it.
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
    """How many magnitudes of x lie in each bin, eight bins to the octave.

    Args:
        x: any shape, floating.

    Returns:
        (NUM_BINS,) float32, which adds up over batches; zeros are not counted.
    """
    # in place, as x may be all that there is room for
    bins = x.abs().float().flatten()
    is_counted = bins > 0
    bins.log2_().sub_(MIN_EXPONENT).mul_(BINS_PER_OCTAVE).add_(EDGE).floor_()
    bins.clamp_(0, NUM_BINS - 1).masked_fill_(~is_counted, NUM_BINS)
    return torch.bincount(bins.int(), minlength=NUM_BINS + 1)[:NUM_BINS].float()


def clip_range(
    counts: Tensor, amax: Tensor, outliers: str, step: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The largest magnitude that a static scale should represent.

    Args:
        counts: (NUM_BINS,), as `magnitude_histogram` gives it.
        amax: the largest magnitude, without axes.
        outliers: "max" for amax, "percentile" for 99.99 % of all magnitudes, "mse" for what costs
            least.
        step: as for `clip_by_error`.

    Returns:
        The clip, without axes; amax where nothing was counted.
    """
    if outliers == "max" or not counts.any():
        return amax
    if outliers == "percentile":
        return clip_by_share(counts, amax, PERCENTILE)
    return clip_by_error(counts, amax, step)


def clip_by_share(counts: Tensor, amax: Tensor, share: float) -> Tensor:
    """The least upper edge of a bin below which a share of all magnitudes lies, at most amax.

    Args:
        counts: (NUM_BINS,), as `magnitude_histogram` gives it.
        amax: the largest magnitude, without axes.
        share: from 0 to 1.

    Returns:
        The clip, without axes.
    """
    is_reached = counts.double().cumsum(0) >= share * counts.double().sum()
    edge: Tensor = _upper_edges(counts)[is_reached].min()
    return torch.minimum(edge, amax)


def clip_by_error(counts: Tensor, amax: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The clip at which rounding and clipping cost least together.

    Args:
        counts: (NUM_BINS,), as `magnitude_histogram` gives it.
        amax: the largest magnitude, without axes.
        step: given magnitudes and a clip, how far the representable numbers near them lie apart;
            it is given tensors of the CPU.

    Returns:
        amax, or an upper edge of a bin below it, without axes.
    """
    # a GPU would be waited for at every edge
    device, counts, amax = amax.device, counts.cpu(), amax.cpu()

    # All magnitudes of a bin are taken to be its geometric middle.
    middle = _upper_edges(counts) * 2.0 ** (-0.5 / BINS_PER_OCTAVE)
    edges = [edge for edge in _upper_edges(counts) if amax * MIN_CLIP < edge < amax]
    candidates = [amax, *edges]

    costs = []
    for clip in candidates:
        step_size = step(middle, clip)
        # Below half a step a number is rounded to zero; else its error is uniform within a step,
        # with variance step² / 12.
        rounding = torch.where(middle < step_size / 2, middle, step_size / 12**0.5)
        error = torch.where(middle <= clip, rounding, middle - clip).square()
        costs.append((error.double() * counts.double()).sum())
    best: Tensor = candidates[int(torch.stack(costs).argmin())]
    return best.to(device)


def median_magnitude(counts: Tensor) -> Tensor:
    """The median of the magnitudes that were counted, to an eighth of an octave, without axes."""
    return clip_by_share(counts, counts.new_tensor(torch.inf), 0.5)


def _upper_edges(counts: Tensor) -> Tensor:
    # on the CPU, as every device has them
    ends = torch.arange(NUM_BINS) + 1
    return (ends / BINS_PER_OCTAVE + MIN_EXPONENT).exp2().to(counts.device)
