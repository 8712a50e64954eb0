"""How a grid rounds, as data: what a kernel that decides many columns at once can follow, where a
function of torch would be called for each column.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import attrs
from attrs import frozen
from torch import Tensor

from bitpress.numerics.fp4 import E2M1_MAX
from bitpress.numerics.fp8 import E4M3_MAX


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
