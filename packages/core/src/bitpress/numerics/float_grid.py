"""Weights as numbers of a small float format, times a scale for each group of columns."""

from __future__ import annotations

from attrs import frozen
from torch import Tensor

from bitpress.numerics.rounding_rule import NumberFormat, RoundingRule
from bitpress.numerics.scale_search import to_groups


@frozen(eq=False)
class FloatGrid:
    """What numbers of a format stand for with these scales: a grid for `gptq_quantize`.

    Attributes:
        numbers: the format.
        scale: (out, groups) float32, positive.
        group: columns that share a scale.
    """

    numbers: NumberFormat
    scale: Tensor
    group: int

    @property
    def rounding_rule(self) -> RoundingRule:
        """What `nearest` gives, as a rule."""
        return RoundingRule(self.numbers, self.scale, self.group)

    def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
        """The representable numbers nearest to targets (rows,) of one column."""
        scale = self.scale[rows, column // self.group]
        return self.numbers.round_(target / scale).mul_(scale)

    def rounded(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """The representable numbers nearest to all columns of some rows (rows, in)."""
        return scale_groups(self.units(weight, rows), self.scale[rows])

    def units(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """The same in units of the scale: numbers of the format."""
        groups = to_groups(weight, self.group)  # (rows, groups, group)
        return self.numbers.round_(groups / self.scale[rows].unsqueeze(2)).view_as(weight)


def scale_groups(numbers: Tensor, scale: Tensor) -> Tensor:
    """Numbers times the scales of their groups.

    Args:
        numbers: (out, in) float32.
        scale: (out, groups) float32, the groups of one width.

    Returns:
        (out, in) float32.
    """
    groups = to_groups(numbers, numbers.shape[1] // scale.shape[1])  # (out, groups, group)
    return (groups * scale.unsqueeze(2)).view_as(numbers)
