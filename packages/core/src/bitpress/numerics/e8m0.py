"""E8M0, the scales of microscaling formats: a power of two as a byte, its exponent plus 127.

Source: Rouhani et al., "OCP Microscaling Formats (MX) Specification", version 1.0, section 5.4.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitpress.numerics.exact import MANTISSA_BITS, power_of_two

# Exponents of normal float32 numbers: where subnormal ones are read as 0, the byte 0 for 2^-127 is.
MIN_EXPONENT, MAX_EXPONENT = -126, 127

# The code of NaN, and the bits of float32's NaN and of 2^-127, which is subnormal there.
NAN_CODE, NAN_BITS, LEAST_BITS = 0xFF, 0x7FC00000, 1 << MANTISSA_BITS - 1


def encode_e8m0(power: Tensor) -> Tensor:
    """The codes of powers of two.

    Examples:
        >>> encode_e8m0(torch.tensor([0.5, 1.0, 4.0]))
        tensor([126, 127, 129], dtype=torch.uint8)

    Args:
        power: float32, any shape; powers of two from 2^-126 to 2^127.

    Returns:
        uint8 of the same shape, 1 to 254.
    """
    return (power.view(torch.int32) >> MANTISSA_BITS).to(torch.uint8)


def decode_e8m0(codes: Tensor) -> Tensor:
    """The powers of two, float32 of the same shape, that codes (uint8) stand for; 255 is NaN."""
    bits = codes.int() << MANTISSA_BITS
    bits.masked_fill_(codes == 0, LEAST_BITS).masked_fill_(codes == NAN_CODE, NAN_BITS)
    return bits.view(torch.float32)


def power_above(amax: Tensor, limit: float) -> Tensor:
    """The least power of two s, from 2^-126 to 2^127, with amax < limit · s.

    Examples:
        >>> power_above(torch.tensor([6.9, 7.0]), 7)
        tensor([1., 2.])

    Args:
        amax: float32, any shape, not negative.
        limit: positive.

    Returns:
        float32 of the same shape; some power of two where amax is 0.
    """
    mantissa, exponent = amax.frexp()
    limit_mantissa, limit_exponent = math.frexp(limit)
    exponent = exponent - limit_exponent + (mantissa >= limit_mantissa)
    return power_of_two(exponent.clamp_(MIN_EXPONENT, MAX_EXPONENT))
