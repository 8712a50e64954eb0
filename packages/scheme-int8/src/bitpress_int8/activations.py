"""INT8 activations: a scale, and a zero point, that are found before serving, and what rounding
makes of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitpress import Statistic, hookimpl, numerics

if TYPE_CHECKING:
    from torch import Tensor

# Steps between zero and the largest number.
STEPS = 127.5


def static_qparams(
    stats: Mapping[str, Statistic], symmetric: bool, outliers: str
) -> dict[str, Tensor]:
    """`input_scale`, and `input_zero_point` int8 where it is not symmetric: (code - zero) scale;
    scale 1 if nothing was seen.
    """
    import torch

    if "input_max" not in stats:
        low, high = torch.tensor(-STEPS), torch.tensor(STEPS)
    else:
        low, high = -stats["input_min"].value, stats["input_max"].value
        amax = low.abs().maximum(high.abs())
        clip = numerics.clip_range(
            stats["input_counts"].value, amax, outliers, lambda magnitude, clip: clip / STEPS
        )
        low, high = low.maximum(-clip).clamp(max=0), high.minimum(clip).clamp(min=0)
    if symmetric:
        scale = low.abs().maximum(high) / STEPS
        return {"input_scale": scale.masked_fill(scale == 0, 1.0)}
    scale = (high - low) / (2 * STEPS)
    scale = scale.masked_fill(scale == 0, 1.0)
    zero = (-128 - low / scale).round().clamp(-128, 127)
    return {"input_scale": scale, "input_zero_point": zero.to(torch.int8)}


@hookimpl
def quantize_activations(
    inputs: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Tensor:
    """(tokens, in): the integers nearest to inputs times their scale, which is stored, or amax /
    127.5 (range / 255) of a token.

    vLLM's kernels take amax / 127 of a token instead, compressed-tensors what is taken here.
    """
    if "input_scale" in tensors:
        scale = tensors["input_scale"].to(inputs.device).float()
        zero = (
            tensors["input_zero_point"].to(inputs.device).float()
            if "input_zero_point" in tensors
            else None
        )
    elif config["input_activations"]["symmetric"]:
        scale, zero = numerics.absmax(inputs, dim=1) / STEPS, None  # (tokens, 1)
    else:
        low, high = (
            inputs.amin(1, keepdim=True).clamp(max=0),
            inputs.amax(1, keepdim=True).clamp(min=0),
        )
        scale = (high - low) / (2 * STEPS)
        zero = (-128 - low / scale.masked_fill(scale == 0, 1.0)).round().clamp(-128, 127)
    scale = scale.masked_fill(scale == 0, 1.0)
    if zero is None:
        return (inputs / scale).round_().clamp_(-128, 127).mul_(scale)
    return (inputs / scale + zero).round_().clamp_(-128, 127).sub_(zero).mul_(scale)
