"""Rounding to the numbers of a format, inside kernels in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from bitpress.numerics.rounding_rule import NumberFormat


def format_arguments(numbers: NumberFormat) -> tuple[float, float, int, int, int]:
    """What a kernel passes on to `round_to_format`."""
    return float(numbers.lowest), float(numbers.highest), *numbers.powers, numbers.to_large


# As many arguments as a format has numbers.
@triton.jit
def round_to_format(x, lowest, highest, min_power, max_power, to_large):  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    """The numbers nearest to x, ties to even; NaN stays NaN, and a negative zero negative."""
    # comparisons, as NaN is neither below nor above
    clipped = tl.where(x < lowest, lowest, tl.where(x > highest, highest, x))
    bits = clipped.to(tl.int32, bitcast=True)
    power = tl.minimum(tl.maximum(bits & 0x7F800000, min_power), max_power)
    large = (power + to_large).to(tl.float32, bitcast=True)
    rounded = (clipped + large) - large
    sign = bits & -0x80000000
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
