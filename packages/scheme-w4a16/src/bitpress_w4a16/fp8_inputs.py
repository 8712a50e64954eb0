"""Scales of 4-bit weights that vLLM multiplies with FP8 activations.

Its kernel takes the scales of groups as E4M3 numbers, with a float32 scale for each row. It makes
both of the stored scales when it loads them: the row's is amax / 448 of them, times 8, and the
groups' are the nearest E4M3 numbers, divided by 8. Rounding scales after their codes were chosen
costs a third more than the codes do, on tiny-llama: so the scales are rounded so beforehand. Facts:
vLLM 0.32, `convert_bf16_scales_to_fp8` and `QuantFP8`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitpress import numerics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The kernel's group.
GROUP_SIZE = 128

# What E4M3 numbers of groups are divided by, and rows' scales multiplied with.
SHIFT = 8

# The least scale of a row, without that factor.
SMALLEST_ROW_SCALE = 1 / (448 * 512)

# E4M3's least number.
SMALLEST_E4M3 = 2.0**-9

# A scale's rounding makes it smaller by so much at most, where it becomes the least of E4M3's.
LEAST_ROUNDED = 2 / 3


def storable_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scales that vLLM computes with as they are stored, but for the rounding to dtype.

    Args:
        scale: (out, groups) float32, positive.
        dtype: what scales are stored in.

    Returns:
        (out, groups) float32, numbers of that dtype.
    """
    top = numerics.absmax(scale, dim=1)  # (out, 1)
    of_row = (top / numerics.scalar_like(top, numerics.E4M3_MAX)).clamp_(min=SMALLEST_ROW_SCALE)
    of_row.mul_(SHIFT)
    of_group = numerics.decode_e4m3(numerics.encode_e4m3(scale, of_row))
    return of_group.clamp_(min=SMALLEST_E4M3).mul_(of_row).to(dtype).float()
