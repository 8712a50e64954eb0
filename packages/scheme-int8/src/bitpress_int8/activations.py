"""INT8 activations: their static scale and zero point, and what rounding makes of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bitpress import Statistic, hookimpl, numerics

if TYPE_CHECKING:
    from torch import Tensor

# Half of a range whose scale is 1.
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
            stats["input_counts"].value,
            amax,
            outliers,
            lambda magnitude, clip: numerics.int8_scale(clip),
        )
        low, high = low.maximum(-clip).clamp(max=0), high.minimum(clip).clamp(min=0)

    if symmetric:
        return {"input_scale": numerics.int8_scale(low.abs().maximum(high))}
    scale, zero_point = numerics.int8_range(low, high)
    return {"input_scale": scale, "input_zero_point": zero_point.to(torch.int8)}


@hookimpl
def quantize_activations(
    inputs: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Tensor:
    """The numbers (tokens, in) nearest to inputs that INT8 codes stand for.

    Their scale is the stored one, or amax / 127.5 of each token, or (max - min) / 255 of it where
    there is a zero point, as in compressed-tensors; vLLM 0.32 takes amax / 127 of a token.
    """
    if "input_scale" not in tensors:
        is_symmetric = config["input_activations"]["symmetric"]
        return numerics.round_tokens_int8(inputs, symmetric=is_symmetric)
    scale = tensors["input_scale"].to(inputs.device).float()
    zero_point = tensors.get("input_zero_point")
    if zero_point is not None:
        zero_point = zero_point.to(inputs.device).float()
    # as loaders replace a scale of 0
    return numerics.round_int8(inputs, scale.masked_fill(scale == 0, 1.0), zero_point)
