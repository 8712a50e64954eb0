"""A scale, and a zero point, for INT8 activations that are found before serving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitpress import Stat, numerics

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 127.5  # between zero and the largest number


def observed(inputs: Tensor) -> dict[str, Stat]:
    """The range, and a histogram of magnitudes."""
    x = inputs.float()
    return {
        "input_max": Stat(x.amax(), "max"),
        "input_min": Stat((-x).amax(), "max"),
        "input_counts": Stat(numerics.magnitudes(x), "sum"),
    }


def parts(stats: Mapping[str, Stat], symmetric: bool, outliers: str) -> dict[str, Tensor]:
    """`input_scale`, and `input_zero_point` int8 where it is not symmetric: (code - zero) scale; scale 1 if nothing was seen."""
    import torch

    if "input_max" not in stats:
        low, high = torch.tensor(-STEPS), torch.tensor(STEPS)
    else:
        low, high = -stats["input_min"].value, stats["input_max"].value
        amax = low.abs().maximum(high.abs())
        clip = numerics.clip(stats["input_counts"].value, amax, outliers, lambda magnitude, clip: clip / STEPS)
        low, high = low.maximum(-clip).clamp(max=0), high.minimum(clip).clamp(min=0)
    if symmetric:
        scale = low.abs().maximum(high) / STEPS
        return {"input_scale": scale.masked_fill(scale == 0, 1.0)}
    scale = (high - low) / (2 * STEPS)
    scale = scale.masked_fill(scale == 0, 1.0)
    zero = (-128 - low / scale).round().clamp(-128, 127)
    return {"input_scale": scale, "input_zero_point": zero.to(torch.int8)}
