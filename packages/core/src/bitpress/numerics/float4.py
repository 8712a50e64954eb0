"""FP4 E2M1: 2 exponent bits with bias 1, 1 mantissa bit, and a sign; its magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6.

Source: Rouhani et al., "OCP Microscaling Formats (MX) Specification", version 1.0, section 5.3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; 8 more is the same with a minus


def round_e2m1(x: Tensor) -> Tensor:
    """The E2M1 numbers nearest to float32 numbers, ties to the even code, what lies beyond 6 at 6; NaN stays NaN.

    >>> round_e2m1(torch.tensor([0.25, 0.75, 2.5, 5.0, -7.0]))
    tensor([ 0.,  1.,  2.,  4., -6.])
    """
    # between two powers of two numbers lie half the lower one apart; below 1, as between 1 and 2
    power = x.abs().clamp_(1.0, 4.0).view(torch.int32).bitwise_and_(0x7F800000).view(torch.float32)
    return (x / power).mul_(2).round_().mul_(power).div_(2).clamp_(-E2M1_MAX, E2M1_MAX)


def encode_e2m1(x: Tensor) -> Tensor:
    """uint8 codes, 0 to 15, of E2M1 numbers."""
    magnitude = x.abs()
    code = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return (code + 8 * (x < 0)).to(torch.uint8)


def decode_e2m1(codes: Tensor) -> Tensor:
    """float32 numbers of codes 0 to 15."""
    table = torch.tensor((*MAGNITUDES, *(-m for m in MAGNITUDES)), device=codes.device)
    return table[codes.int()]
