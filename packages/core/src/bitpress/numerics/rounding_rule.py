"""How a grid rounds, as data: what a kernel that decides many columns at once can follow, where a
function of torch would be called for each column.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import attrs
import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics.fp4 import E2M1_MAX, EXPONENT_BITS
from bitpress.numerics.fp8 import E4M3_MAX

# Of float32: bits below its exponent field, and what is added to exponents there.
FLOAT32_MANTISSA_BITS, FLOAT32_BIAS = 23, 127


@frozen
class NumberFormat:
    """Numbers from `lowest` to `highest` that lie a power of two apart: whole numbers, or floats of
    a few bits.

    Where p is the power of two at or below a number's magnitude, but at least 2^`min_exponent` and
    at most 2^`max_exponent`, its neighbors are p · 2^-`mantissa_bits` away.
    """

    lowest: float
    highest: float
    mantissa_bits: int = 0
    min_exponent: int = 0
    max_exponent: int = 0

    @property
    def powers(self) -> tuple[int, int]:
        """As bits of float32, the powers of two of the least and the greatest exponent."""
        least, greatest = (e + FLOAT32_BIAS for e in (self.min_exponent, self.max_exponent))
        return least << FLOAT32_MANTISSA_BITS, greatest << FLOAT32_MANTISSA_BITS

    @property
    def to_large(self) -> int:
        """What makes, of the bits of 2^e in float32, those of 1.5 · 2^(e + 23 - mantissa_bits):
        around it float32 numbers lie as far apart as those of the format at 2^e.
        """
        exponent = FLOAT32_MANTISSA_BITS - self.mantissa_bits
        return (exponent << FLOAT32_MANTISSA_BITS) + (1 << FLOAT32_MANTISSA_BITS - 1)

    def round_(self, x: Tensor, zero: Tensor | None = None) -> Tensor:
        """The nearest numbers, in the place of x: of two that are as near the even one; NaN stays
        NaN, and a negative zero negative.

        Args:
            x: float32, any shape.
            zero: whole numbers of the same shape: x + zero is what becomes a number of the format.
        """
        if zero is not None:
            return x.round_().add_(zero).clamp_(self.lowest, self.highest).sub_(zero)
        if self.mantissa_bits == 0:
            return x.round_().clamp_(self.lowest, self.highest)
        x.clamp_(self.lowest, self.highest)
        power = x.view(torch.int32).bitwise_and(EXPONENT_BITS).clamp_(*self.powers)
        large = power.add_(self.to_large).view(torch.float32)
        return torch.copysign(x.add(large).sub_(large), x, out=x)


E2M1 = NumberFormat(-E2M1_MAX, E2M1_MAX, 1, 0, 2)
E4M3 = NumberFormat(-E4M3_MAX, E4M3_MAX, 3, -6, 8)


@frozen(eq=False)
class RoundingRule:
    """Weights become n · scale, n being the number of a format nearest to weight / scale, the even
    one of two that are as near; or (n - zero) · scale, where n - zero is nearest.

    Attributes:
        numbers: the format.
        scale: (out, groups) float32, positive.
        group: columns that share a scale and a zero point.
        zero: (out, groups) float32 whole numbers; None where they are 0.
        mask: (out, in) bool, False where weights become 0; None where none does.
        stored_scales: scales are numbers of this format, divided by `divisor`; None where there is
            no format for them.
        divisor: float32 without axes; None where it is 1.
    """

    numbers: NumberFormat
    scale: Tensor
    group: int
    zero: Tensor | None = None
    mask: Tensor | None = None
    stored_scales: NumberFormat | None = None
    divisor: Tensor | None = None

    def of_rows(self, rows: slice) -> RoundingRule:
        """The rule for some of the rows."""
        return attrs.evolve(
            self,
            scale=self.scale[rows],
            zero=None if self.zero is None else self.zero[rows],
            mask=None if self.mask is None else self.mask[rows],
        )


@runtime_checkable
class RuledGrid(Protocol):
    """A grid whose rounding is a rule: a GPU sweeps it in a fused kernel."""

    @property
    def rounding_rule(self) -> RoundingRule:
        """What `nearest` gives, as a rule without a mask."""
        ...
