"""FP4 E2M1: 2 exponent bits with bias 1, 1 mantissa bit, and a sign; its magnitudes are 0, 0.5, 1,
1.5, 2, 3, 4 and 6.

Source: Rouhani et al., "OCP Microscaling Formats (MX) Specification", version 1.0, section 5.3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0

# Bits of float32: its exponent field, and the numbers 1 and 4.
EXPONENT_BITS, BITS_OF_ONE, BITS_OF_FOUR = 0x7F800000, 0x3F800000, 0x40800000

# Added to the bits of a power of two, it gives 1.5 * 2^22 times that number.
TIMES_LARGE = (22 << 23) + (1 << 22)


def round_e2m1(x: Tensor) -> Tensor:
    """The E2M1 numbers nearest to float32 numbers.

    Examples:
        >>> round_e2m1(torch.tensor([0.25, 0.75, 2.5, 5.0, -7.0]))
        tensor([ 0.,  1.,  2.,  4., -6.])

    Args:
        x: float32, any shape.

    Returns:
        float32 of the same shape: ties go to the even code, what lies beyond 6 to 6; NaN stays NaN.
    """
    # From a power of two p = 1, 2 or 4 on, E2M1 numbers lie p / 2 apart; below 1, as from 1 on.
    # Around 1.5 * 2^22 * p float32 numbers lie as far apart: adding that much rounds to even.
    power = x.view(torch.int32).bitwise_and(EXPONENT_BITS).clamp_(BITS_OF_ONE, BITS_OF_FOUR)
    large = power.add_(TIMES_LARGE).view(torch.float32)
    return x.clamp(-E2M1_MAX, E2M1_MAX).add_(large).sub_(large)


def encode_e2m1(x: Tensor) -> Tensor:
    """The codes of E2M1 numbers.

    Args:
        x: float32, any shape; E2M1 numbers, as `round_e2m1` gives them.

    Returns:
        uint8 of the same shape, 0 to 15; the code of both zeros is 0.
    """
    # Divided by 2^14, the difference of the biases 15 and 1, E2M1's fields are the last two bits of
    # float16's exponent and the first of its mantissa, subnormals included. Adding 0 takes the sign
    # from a zero.
    bits = (x * 2.0**-14).add_(0.0).half().view(torch.int16)
    sign = (bits >> 12).bitwise_and_(8)
    magnitude = (bits >> 9).bitwise_and_(7)
    return sign.bitwise_or_(magnitude).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """The float32 numbers, of the same shape, that codes 0 to 15 stand for."""
    # as `encode_e2m1` makes them: E2M1's fields as those of a float16 number, divided by 2^14
    bits = codes.to(torch.int16)
    sign = (bits & 8) << 12
    return (bits & 7).bitwise_left_shift_(9).bitwise_or_(sign).view(torch.float16).float() * 2.0**14


def e2m1_bound(codes: Tensor, clipped: float) -> Tensor:
    """How far a number may lie from the code it was rounded to: half the wider of the steps beside
    it, and beyond 6 as far as it may have been clipped.

    Args:
        codes: 0 to 15, any shape.
        clipped: how far beyond 6 a number may lie.

    Returns:
        float32 of the same shape, in units of the scale.
    """
    # Half a step is 1/4 up to the magnitude 1.5, of code 3, 1/2 up to 3, of code 5, and 1 at 4; the
    # last code is that of 6. Clamped differences are 0 below a code and 1 from the next one on.
    magnitude = (codes & 7).float()
    bound = (magnitude - 3).clamp_(0, 1).mul_(0.25).add_(0.25)
    bound.add_((magnitude - 5).clamp_(0, 1), alpha=0.5)
    return bound.add_(magnitude.sub_(6).clamp_(0, 1), alpha=max(clipped, 1.0) - 1)
