"""Rounding to the numbers of a format, inside kernels in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from bitpress.numerics.rounding_rule import NumberFormat

# Of float32: bits below its exponent field, and what is added to exponents there.
MANTISSA_BITS, BIAS = 23, 127


def format_arguments(numbers: NumberFormat) -> tuple[float, float, int, int, int]:
    """What a kernel passes on to `round_to_format`: the least and the greatest number; as bits of
    float32, the powers of two of the least and the greatest exponent; and what makes, of the bits
    of 2^e, those of 1.5 · 2^(e + 23 - mantissa_bits), around which float32 numbers lie as far apart
    as those of the format at 2^e.
    """
    to_large = ((MANTISSA_BITS - numbers.mantissa_bits) << MANTISSA_BITS) + (1 << 22)
    min_power = (numbers.min_exponent + BIAS) << MANTISSA_BITS
    max_power = (numbers.max_exponent + BIAS) << MANTISSA_BITS
    return float(numbers.lowest), float(numbers.highest), min_power, max_power, to_large


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
