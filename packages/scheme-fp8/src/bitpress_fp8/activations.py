"""FP8 activations: a scale that is found before serving, from how large inputs were, and what
rounding makes of inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitpress import Statistic, numerics

if TYPE_CHECKING:
    from torch import Tensor

# largest by median: beyond it ordinary numbers come near to E4M3's subnormals
WIDE = 2.0**12


def observed(inputs: Tensor) -> dict[str, Statistic]:
    """The largest magnitude and a histogram of all of them."""
    return {
        "input_amax": Statistic(numerics.absmax(inputs.float()), "max"),
        "input_counts": Statistic(numerics.magnitude_histogram(inputs), "sum"),
    }


def scale(stats: Mapping[str, Statistic], outliers: str) -> Tensor:
    """One number, clip / 448; 1 where nothing was observed."""
    import torch

    if "input_amax" not in stats:
        return torch.tensor(1.0)
    amax, counts = stats["input_amax"].value, stats["input_counts"].value
    if counts.any() and amax > WIDE * numerics.median_magnitude(counts):
        warnings.warn(
            "its largest input is over 4,096 times the median; activations=dynamic loses less",
            stacklevel=2,
        )
    return numerics.e4m3_scale(numerics.clip_range(counts, amax, outliers, _step))


def _step(magnitude: Tensor, clip: Tensor) -> Tensor:
    """E4M3's: 2^-3 of the power of two below a number, and 2^-9 among subnormals, in units of the
    scale.
    """
    unit = clip / numerics.E4M3_MAX
    power = (magnitude / unit).log2().floor().clamp(min=-6)
    return (power - 3).exp2() * unit


def rounded(inputs: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """(tokens, in): the E4M3 numbers nearest to inputs, in units of a static scale or of amax / 448
    per token, or per group.
    """
    if "input_scale" in tensors:
        scale = tensors["input_scale"].to(inputs.device).float()
        return numerics.decode_e4m3(numerics.encode_e4m3(inputs, scale)) * scale
    groups = inputs.reshape(-1, config["input_activations"].get("group_size") or inputs.shape[1])
    scale = numerics.e4m3_scale(numerics.absmax(groups, dim=1))
    return (numerics.decode_e4m3(numerics.encode_e4m3(groups, scale)) * scale).view_as(inputs)
