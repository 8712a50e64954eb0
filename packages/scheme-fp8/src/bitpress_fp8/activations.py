"""FP8 activations: their static scale, and what rounding makes of a layer's inputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitpress import Statistic, hookimpl, numerics

if TYPE_CHECKING:
    from torch import Tensor

# The largest input over the median: beyond it ordinary inputs come near to E4M3's subnormals.
MAX_RATIO = 2.0**12


def static_scale(stats: Mapping[str, Statistic], outliers: str) -> Tensor:
    """The static scale of inputs, clip / 448, without axes; 1 where no input was observed."""
    import torch

    amax = numerics.input_absmax(stats)
    if amax is None:
        return torch.tensor(1.0)
    counts = stats["input_counts"].value
    if counts.any() and amax > MAX_RATIO * numerics.median_magnitude(counts):
        warnings.warn(
            "its largest input is over 4,096 times the median; activations=dynamic loses less",
            stacklevel=2,
        )
    return numerics.e4m3_scale(numerics.clip_range(counts, amax, outliers, numerics.e4m3_step))


@hookimpl
def quantize_activations(
    inputs: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Tensor:
    """The E4M3 numbers (tokens, in) nearest to inputs.

    They are in units of the stored scale, or of amax / 448 of each token (`fp8`), or of each group
    of 128 inputs of a token (`fp8-block`), as compressed-tensors computes them.
    """
    if "input_scale" in tensors:
        scale = tensors["input_scale"].to(inputs.device).float()
        return numerics.round_e4m3(inputs, scale)
    group_size = config["input_activations"].get("group_size") or inputs.shape[1]
    return numerics.round_rows_e4m3(inputs.reshape(-1, group_size)).view_as(inputs)
