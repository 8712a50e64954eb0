"""FP4 E2M1: 2 exponent bits with bias 1, 1 mantissa bit, and a sign; its magnitudes are 0, 0.5, 1,
1.5, 2, 3, 4 and 6.

Source: Rouhani et al., "OCP Microscaling Formats (MX) Specification", version 1.0, section 5.3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0

# float32's exponent, and its bits of 1 and 4
EXPONENT, ONE, FOUR = 0x7F800000, 0x3F800000, 0x40800000

# added to a power of two's bits: 1.5 * 2^22 of it
LARGE = (22 << 23) + (1 << 22)

# by code; 8 more is the same with a minus
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def round_e2m1(x: Tensor) -> Tensor:
    """The E2M1 numbers nearest to float32 numbers, ties to the even code, what lies beyond 6 at 6;
    NaN stays NaN.

    >>> round_e2m1(torch.tensor([0.25, 0.75, 2.5, 5.0, -7.0]))
    tensor([ 0.,  1.,  2.,  4., -6.])
    """
    # between two powers of two numbers lie half the lower one apart; below 1, as between 1 and 2.
    # Beside a float32 number that large, numbers lie as far apart, so that adding it rounds.
    large = (
        x.view(torch.int32).bitwise_and(EXPONENT).clamp_(ONE, FOUR).add_(LARGE).view(torch.float32)
    )
    return x.clamp(-E2M1_MAX, E2M1_MAX).add_(large).sub_(large)


def encode_e2m1(x: Tensor) -> Tensor:
    """uint8 codes, 0 to 15, of E2M1 numbers.

    E2M1's fields are the last of float16's exponent and the first of its mantissa, if its bias of
    15 is made up for, subnormals included; a zero has no sign.
    """
    bits = (x * 2.0**-14).add_(0.0).half().view(torch.int16)
    return (bits >> 12).bitwise_and_(8).bitwise_or_((bits >> 9).bitwise_and_(7)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """float32 numbers of codes 0 to 15."""
    table = torch.tensor((*MAGNITUDES, *(-m for m in MAGNITUDES)), device=codes.device)
    return table[codes.int()]
