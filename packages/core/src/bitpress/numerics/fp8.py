"""FP8 E4M3 (the OCP "FN" form, `torch.float8_e4m3fn`): 4 exponent bits with bias 7, 3 mantissa
bits, no infinity, 448 at most.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433, table 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitpress.numerics.blocks import absmax
from bitpress.numerics.exact import power_of_two, scalar_like

E4M3_MAX = 448.0

# The least normal float32 number: below it a scale loses bits, and w / scale could leave the range.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

# The code of NaN, its sign left out.
NAN_MAGNITUDE = 0x7F


def e4m3_scale(amax: Tensor) -> Tensor:
    """The scale that maps a largest magnitude to 448, E4M3's largest number.

    Args:
        amax: any shape, not negative.

    Returns:
        float32 of the same shape: amax / 448, and 1 where amax is 0, so that no scale is 0.
    """
    numerator = amax.float()
    scale = (numerator / scalar_like(numerator, E4M3_MAX)).clamp_(min=SMALLEST_SCALE)
    return scale.masked_fill(amax == 0, 1.0)


def encode_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """The E4M3 numbers nearest to x / scale.

    Args:
        x: float32, any shape.
        scale: positive float32 that broadcasts to it.

    Returns:
        `torch.float8_e4m3fn` of the same shape: ties go to even, what lies beyond 448 to 448; NaN
        stays NaN.
    """
    # The cast alone makes NaN of what is too large, in some versions of torch.
    return (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(codes: Tensor) -> Tensor:
    """The float32 numbers that E4M3 codes stand for, exactly.

    Args:
        codes: `torch.float8_e4m3fn`, any shape.

    Returns:
        float32 of the same shape; the NaN codes (0x7F, 0xFF) are NaN.
    """
    if codes.device.type != "cpu":
        return codes.float()

    # On a CPU torch converts one number at a time. E4M3's fields, shifted into those of float16,
    # are the same number divided by 2^8 (float16's bias is 15, E4M3's 7), subnormals included, and
    # float16 to float32 is one instruction for many.
    bits = codes.view(torch.int8).to(torch.int16)
    # From int8 to int16 the sign is extended: the shift leaves a copy of it in bit 14.
    half = (bits << 7).bitwise_and_(-0x4001).view(torch.float16)
    numbers = half.float().mul_(256.0)

    magnitude = codes.view(torch.uint8) & 0x7F
    if magnitude.numel() and magnitude.max() == NAN_MAGNITUDE:
        numbers.masked_fill_(magnitude == NAN_MAGNITUDE, torch.nan)
    return numbers


def round_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """The numbers that the E4M3 codes of x with a scale stand for.

    Args:
        x: float32, any shape.
        scale: positive float32 that broadcasts to it.
    """
    return decode_e4m3(encode_e4m3(x, scale)).mul_(scale)


def round_rows_e4m3(x: Tensor) -> Tensor:
    """The numbers (rows, columns), float32, that E4M3 codes with the scale amax / 448 of each row
    stand for.
    """
    return round_e4m3(x, e4m3_scale(absmax(x, dim=1)))


def e4m3_step(magnitude: Tensor, clip: Tensor) -> Tensor:
    """How far apart the numbers near a magnitude lie, where the largest of all is a clip.

    That is 2^-3 of the power of two below a number, and 2^-9 among subnormals, in units of the
    scale.

    Args:
        magnitude: any shape, float32, not negative.
        clip: without axes, float32, positive: 448 times the scale.

    Returns:
        float32 of the same shape as the magnitudes.
    """
    scale = clip / scalar_like(clip, E4M3_MAX)
    # of the number between 1/2 and 1 that is left, whose logarithm is at least -1
    exponent = (magnitude / scale).frexp().exponent.sub_(1).clamp_(min=-6)
    return power_of_two(exponent - 3) * scale


def e4m3_bound(codes: Tensor) -> Tensor:
    """How far a number may lie from the code it was rounded to: half a step.

    A step is 2^-3 of the power of two below the code's magnitude, and 2^-9 among subnormals; a code
    that is a power of two has a finer step below it, and the coarser one is returned.

    Args:
        codes: `torch.float8_e4m3fn`, any shape.

    Returns:
        float32 of the same shape, in units of the scale.
    """
    # 2^-6 is E4M3's least normal number.
    magnitude = decode_e4m3(codes).abs_().clamp_(min=2.0**-6)
    # A float32 number without its mantissa is the power of two below it.
    power = magnitude.view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    return power.mul_(2.0**-4)
