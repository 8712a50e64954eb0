"""What 8-bit integers make of a layer's inputs: scales and zero points as compressed-tensors has
them.
"""

from __future__ import annotations

from torch import Tensor

from bitpress.numerics.blocks import absmax
from bitpress.numerics.exact import scalar_like

# Half the range of codes, -128 to 127.
HALF_RANGE = 127.5


def int8_scale(amax: Tensor) -> Tensor:
    """The scale that maps a largest magnitude to half the range of codes.

    Args:
        amax: float32, any shape, not negative.

    Returns:
        float32 of the same shape: amax / 127.5, and 1 where amax is 0, so that no scale is 0.
    """
    scale = amax / scalar_like(amax, HALF_RANGE)
    return scale.masked_fill_(scale == 0, 1.0)


def int8_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the zero point of a range.

    Args:
        low: float32, any shape, not positive.
        high: of the same shape, not negative.

    Returns:
        float32 of the same shape: (high - low) / 255, 1 where that is 0; and whole numbers from
        -128 to 127, the codes of 0.
    """
    scale = int8_scale((high - low) / 2)
    return scale, (-128 - low / scale).round_().clamp_(-128, 127)


def round_int8(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The numbers nearest to x that codes stand for.

    Args:
        x: float32, any shape.
        scale: positive float32 that broadcasts to it.
        zero: zero points of the same shape; None where codes are symmetric.

    Returns:
        (code - zero) · scale, float32 of the shape of x.
    """
    if zero is None:
        return (x / scale).round_().clamp_(-128, 127).mul_(scale)
    return (x / scale + zero).round_().clamp_(-128, 127).sub_(zero).mul_(scale)


def round_tokens_int8(inputs: Tensor, *, symmetric: bool) -> Tensor:
    """Inputs (tokens, in) as codes with a scale for each token stand for them.

    Args:
        inputs: float32.
        symmetric: whether there is no zero point.
    """
    if symmetric:
        return round_int8(inputs, int8_scale(absmax(inputs, dim=1)))
    low = inputs.amin(1, keepdim=True).clamp_(max=0)
    high = inputs.amax(1, keepdim=True).clamp_(min=0)
    return round_int8(inputs, *int8_range(low, high))
