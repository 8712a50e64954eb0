"""What differs between the element formats of MX: E2M1 in 4 bits, E4M3 in 8.

Source: Rouhani et al., "OCP Microscaling Formats (MX) Specification", version 1.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitpress import numerics

if TYPE_CHECKING:
    from torch import Tensor

# Numbers that share a scale: fixed by the format.
GROUP_SIZE = 32

# By bits per element, where inputs in units of their scale must lie below. To nearest, what is
# below 7 becomes 6 or less; E4M3's largest number is 448.
INPUT_LIMIT = {4: 7.0, 8: 448.0}

# Weights of 8 bits in units of their scale lie below it: half-way between 448 and 480, which would
# be the next number. A greater scale has no number that this one lacks, but beyond 448, and a
# smaller one clips.
E4M3_WEIGHT_LIMIT = 464.0

# The group's largest weight of 4 bits is 4 or more, and less than 8, in units of the middle scale.
E2M1_SPAN = 8.0

# Scales that are tried with 4 bits, in units of that one: twice it, where 6 would clip too much,
# and less where columns with small weights matter more than the largest one's. Still greater ones
# lack numbers and add none. Of equals the first is taken, which clips least.
RATIOS = (2.0, 1.0, 0.5, 0.25)

# Below it a power of two is a subnormal number of float32; above these the largest element is
# infinite there.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = {4: 2.0**125, 8: 2.0**119}

# With the largest scale weights lie below 512 in its units: that far from 448 is four times half a
# step.
LARGEST_BOUND = 4.0

# How far beyond 6 a weight of 4 bits may be clipped, in units of its scale.
MAX_CLIPPED = E2M1_SPAN / RATIOS[-1] - 6


def number_format(bits: int) -> numerics.NumberFormat:
    """The numbers that elements of so many bits stand for."""
    return numerics.E2M1 if bits == 4 else numerics.E4M3


def encode(numbers: Tensor, bits: int) -> Tensor:
    """The codes of numbers of the format: uint8 0 to 15, or `torch.float8_e4m3fn`."""
    import torch

    return numerics.encode_e2m1(numbers) if bits == 4 else numbers.to(torch.float8_e4m3fn)


def decode(codes: Tensor, bits: int) -> Tensor:
    """The float32 numbers that codes stand for."""
    return numerics.decode_e2m1(codes) if bits == 4 else numerics.decode_e4m3(codes)


def bound(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """How far weights may lie from what their codes (out, in) stand for with scales (out, groups):
    half a step, and as far as a scale clips.
    """
    # multiplied by powers of two, numbers are not rounded
    if bits == 4:
        return numerics.scale_groups(numerics.e2m1_bound(codes, MAX_CLIPPED), scale)
    scale = scale.where(scale < LARGEST_SCALE[bits], scale * LARGEST_BOUND)
    return numerics.scale_groups(numerics.e4m3_bound(codes), scale)


def round_inputs(inputs: Tensor, bits: int) -> Tensor:
    """Inputs (tokens, in) as compressed-tensors rounds them.

    The exponent of a scale is that of the group's largest magnitude, rounded up from 1.75 times a
    power of two on, less 2 for E2M1 or 8 for E4M3. AMD's kernels do the same. FlashInfer's, for
    NVIDIA, take the least power of two that clips nothing: for E2M1, twice as much in groups whose
    largest magnitude lies between 1.5 and 1.75 times a power of two.
    """
    amax = numerics.absmax(numerics.to_groups(inputs.float(), GROUP_SIZE), dim=2).squeeze(2)
    scale = numerics.power_above(amax, INPUT_LIMIT[bits])  # (tokens, groups)
    return numerics.FloatGrid(number_format(bits), scale, GROUP_SIZE).rounded(inputs.float())


def fit(weight: Tensor, importance: Tensor | None, bits: int) -> numerics.FloatGrid:
    """The grid of the least Σ importance (w - q)².

    Args:
        weight: (out, in) float32, the width a multiple of 32.
        importance: (in,) what an error costs in each column; None where all cost the same.
        bits: bits per element.
    """
    import torch

    amax = numerics.absmax(numerics.to_groups(weight, GROUP_SIZE), dim=2).squeeze(2)
    scale = numerics.power_above(amax, E2M1_SPAN if bits == 4 else E4M3_WEIGHT_LIMIT)
    if bits == 4:
        table = numerics.table_for_device(weight.device, _rounding_costs)
        # twice the greatest power of two is not a float32 number
        span = (scale * E2M1_SPAN).clamp_(max=torch.finfo(torch.float32).max)
        best = numerics.search_scales(weight, importance, GROUP_SIZE, table, span)
        scale.mul_(numerics.table_for_device(weight.device, torch.tensor, RATIOS)[best])
    scale.clamp_(SMALLEST_SCALE, LARGEST_SCALE[bits])
    # A sweep reads scales column by column.
    return numerics.FloatGrid(number_format(bits), scale.T.contiguous().T, GROUP_SIZE)


def _rounding_costs() -> Tensor:
    """Rounding costs of weights in units of the span: (1, places, candidates)."""
    import torch

    scale = torch.tensor(RATIOS) / E2M1_SPAN
    return numerics.rounding_costs(lambda x: numerics.round_e2m1(x / scale).mul_(scale)).unsqueeze(
        0
    )
