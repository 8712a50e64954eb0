"""What every device computes to the same bit, where torch's own way rounds otherwise on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Of float32: what is added to an exponent, and the bits of a number below it.
EXPONENT_BIAS, MANTISSA_BITS = 127, 23


def scalar_like(x: Tensor, number: float) -> Tensor:
    """A number to divide x by.

    On a GPU torch divides by a number of the host's by multiplying with its reciprocal, which
    rounds twice: of quotients by 448 half differ in the last bit.

    Returns:
        The number without axes, on the device and in the dtype of x.
    """
    return x.new_full((), number)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly: a GPU's powers, and so torch's `ldexp`, need not be exact.

    Args:
        exponent: int32, any shape, from -126 to 127.

    Returns:
        float32 of the same shape.
    """
    return (exponent + EXPONENT_BIAS << MANTISSA_BITS).view(torch.float32)
