"""What NVFP4 needs to know of a layer's inputs, which are rounded to it while serving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitpress import Statistic, numerics
from bitpress_nvfp4 import scales

if TYPE_CHECKING:
    from torch import Tensor


def global_scale(stats: Mapping[str, Statistic]) -> Tensor:
    """2688 / amax, one number; for inputs up to 2688 where nothing was observed."""
    import torch

    amax = numerics.input_absmax(stats)
    if amax is None:
        amax = torch.tensor(numerics.E4M3_MAX * numerics.E2M1_MAX)
    return scales.global_scale(amax, numerics.E4M3_MAX)


def round_without_global_scale(inputs: Tensor) -> Tensor:
    """Inputs (tokens, in) as they will be rounded, but that the global scale is not known yet and
    taken to be 1.

    What it is decides only how local scales round, not how far; nor does a scale leave E4M3's range
    here.
    """
    groups = numerics.to_groups(inputs.float(), scales.GROUP)
    amax = groups.abs().amax(2, keepdim=True)
    mantissa, exponent = (amax / numerics.E2M1_MAX).frexp()
    # E4M3 has four significant bits
    local = (mantissa * 16).round_().div_(16).ldexp(exponent).masked_fill_(amax == 0, 1.0)
    return numerics.round_e2m1(groups / local).mul_(local).view_as(inputs)


def round_inputs(inputs: Tensor, divisor: Tensor) -> Tensor:
    """Inputs (tokens, in) as they are rounded: local scales from the largest of every 16, with a
    global scale.
    """
    groups = numerics.to_groups(inputs, scales.GROUP)
    amax = groups.abs().amax(2, keepdim=True)
    local = numerics.decode_e4m3(
        numerics.encode_e4m3(amax * divisor, amax.new_tensor(numerics.E2M1_MAX))
    )
    scale = local.masked_fill_(local == 0, 0.125) / divisor
    return numerics.round_e2m1(groups / scale).mul_(scale).view_as(inputs)
