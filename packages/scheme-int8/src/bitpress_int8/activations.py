"""INT8 activations: their static scale and zero point, and what rounding makes of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitpress import Statistic, hookimpl, numerics

if TYPE_CHECKING:
    from torch import Tensor

# Half the range of codes, -128 to 127: the scale is amax / 127.5, as in compressed-tensors.
HALF_RANGE = 127.5


def static_qparams(
    stats: Mapping[str, Statistic], symmetric: bool, outliers: str
) -> dict[str, Tensor]:
    """What is stored of static activations, each without axes.

    Args:
        stats: as `numerics.observe_range` gives them, with a histogram.
        symmetric: whether there is no zero point.
        outliers: as for `numerics.clip_range`.

    Returns:
        "input_scale" float32, and where not symmetric "input_zero_point" int8; the scale is 1 where
        no input was observed.
    """
    import torch

    if "input_max" not in stats:
        low, high = torch.tensor(-HALF_RANGE), torch.tensor(HALF_RANGE)
    else:
        low, high = -stats["input_min"].value, stats["input_max"].value
        amax = low.abs().maximum(high.abs())
        clip = numerics.clip_range(
            stats["input_counts"].value, amax, outliers, lambda magnitude, clip: _in_steps(clip)
        )
        low, high = low.maximum(-clip).clamp(max=0), high.minimum(clip).clamp(min=0)

    if symmetric:
        return {"input_scale": _nonzero(_in_steps(low.abs().maximum(high)))}
    scale, zero_point = _fit_asymmetric(low, high)
    return {"input_scale": scale, "input_zero_point": zero_point.to(torch.int8)}


@hookimpl
def quantize_activations(
    inputs: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Tensor:
    """The numbers (tokens, in) nearest to inputs that INT8 codes stand for.

    Their scale is the stored one, or amax / 127.5 of each token, or (max - min) / 255 of it where
    there is a zero point, as in compressed-tensors; vLLM 0.32 takes amax / 127 of a token.
    """
    zero_point = None
    if "input_scale" in tensors:
        scale = _nonzero(tensors["input_scale"].to(inputs.device).float())
        if "input_zero_point" in tensors:
            zero_point = tensors["input_zero_point"].to(inputs.device).float()
    elif config["input_activations"]["symmetric"]:
        scale = _nonzero(_in_steps(numerics.absmax(inputs, dim=1)))  # (tokens, 1)
    else:
        low = inputs.amin(1, keepdim=True).clamp(max=0)
        high = inputs.amax(1, keepdim=True).clamp(min=0)
        scale, zero_point = _fit_asymmetric(low, high)

    if zero_point is None:
        return (inputs / scale).round_().clamp_(-128, 127).mul_(scale)
    codes = (inputs / scale + zero_point).round_().clamp_(-128, 127)
    return codes.sub_(zero_point).mul_(scale)


def _fit_asymmetric(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the zero point, float32, of the range from low to high, which holds 0."""
    scale = _nonzero(_in_steps((high - low) / 2))
    return scale, (-128 - low / scale).round().clamp(-128, 127)


def _in_steps(magnitude: Tensor) -> Tensor:
    """The step of codes that reach a magnitude."""
    return magnitude / numerics.scalar_like(magnitude, HALF_RANGE)


def _nonzero(scale: Tensor) -> Tensor:
    """1 where a scale is 0: its inputs are all 0."""
    return scale.masked_fill(scale == 0, 1.0)
