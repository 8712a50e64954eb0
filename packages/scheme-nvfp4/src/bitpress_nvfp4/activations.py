"""NVFP4 activations: their static global scale, and what rounding makes of a layer's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitpress import Statistic, numerics
from bitpress_nvfp4 import scales

if TYPE_CHECKING:
    from torch import Tensor


def input_global_scale(stats: Mapping[str, Statistic]) -> Tensor:
    """The global scale of inputs, 448 · 6 / amax, without axes; 1 where none was observed."""
    import torch

    amax = numerics.input_absmax(stats)
    if amax is None:
        amax = torch.tensor(numerics.E4M3_MAX * numerics.E2M1_MAX)
    return scales.global_scale(amax, numerics.E4M3_MAX)


def round_inputs(inputs: Tensor, global_scale: Tensor) -> Tensor:
    """Inputs (tokens, in) as loaders round them: a local scale of every 16, amax · global / 6."""
    groups = numerics.to_groups(inputs, scales.GROUP_SIZE)
    amax = groups.abs().amax(2, keepdim=True)
    six = numerics.scalar_like(amax, numerics.E2M1_MAX)
    local = numerics.decode_e4m3(numerics.encode_e4m3(amax * global_scale, six))
    # As compressed-tensors replaces a local scale of 0.
    local.masked_fill_(local == 0, 0.125)
    scale = local / global_scale
    return numerics.round_e2m1(groups / scale).mul_(scale).view_as(inputs)
