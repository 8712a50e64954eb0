"""Integers with a scale, and where they are asymmetric a zero point, per row or per group of
columns.

A weight is stored as a code in -2^(b-1) ... 2^(b-1) - 1 and means (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics.blocks import absmax
from bitpress.numerics.exact import scalar_like
from bitpress.numerics.rounding_rule import NumberFormat, RoundingRule
from bitpress.numerics.scale_refit import FINE_BITS
from bitpress.numerics.scale_search import (
    rounding_costs,
    search_scales,
    table_for_device,
    to_groups,
)

# Zero points tried: the one nearest to the end of the range, and its neighbors.
ZERO_POINT_SHIFTS = (-1, 0, 1)

# The least normal float32 number: below it a scale loses bits.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny

# Places whose rounding costs are tabulated for each zero point: half as many as for symmetric
# grids, as there are 2^bits such tables.
PLACES_PER_ZERO_POINT = 1 << 11


# Scales of two bytes, as kernels round them. Above 2^110, where bfloat16 goes on, the numbers that
# they round by would overflow.
SCALE_FORMATS = {
    torch.float16: NumberFormat(0.0, 65504.0, 10, -14, 15),
    torch.bfloat16: NumberFormat(0.0, 2.0**110, 7, -126, 110),
}


@frozen(eq=False)
class IntegerGrid:
    """The signed integers of so many bits, scaled: (code - zero) · scale.

    Attributes:
        scale: (out, groups) float32, as it will be stored.
        zero: (out, groups) float32 zero points, whole numbers; None where codes are symmetric.
        bits: bits per code.
        group: columns that share a scale and a zero point.
        scale_dtype: that scales are stored in; None where rows share theirs.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    scale_dtype: torch.dtype | None = None

    def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
        """The representable numbers nearest to targets (rows,) of one column."""
        index = (rows, column // self.group)
        zero_point = None if self.zero is None else self.zero[index]
        return _round(target, self.scale[index], zero_point, bits=self.bits)

    def rounded(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """The representable numbers nearest to all columns of some rows (rows, in)."""
        groups = to_groups(weight, self.group)  # (rows, groups, group)
        zero_point = None if self.zero is None else self.zero[rows].unsqueeze(2)
        rounded = _round(groups, self.scale[rows].unsqueeze(2), zero_point, bits=self.bits)
        return rounded.view_as(weight)

    @property
    def rounding_rule(self) -> RoundingRule:
        """What `nearest` gives, as a rule."""
        numbers, scales = NumberFormat(*integer_range(self.bits)), None
        if self.scale_dtype in SCALE_FORMATS:
            least, greatest = _stored_range(self.bits, self.scale_dtype)
            scales = SCALE_FORMATS[self.scale_dtype]
            greatest = min(greatest, scales.highest)
            scales = attrs.evolve(scales, lowest=least, highest=greatest)
        return RoundingRule(numbers, self.scale, self.group, self.zero, stored_scales=scales)

    @property
    def refits(self) -> bool:
        """Whether scales gain by being fitted to codes."""
        return self.scale_dtype is not None and self.bits < FINE_BITS

    def nearest_scale(self, scale: Tensor) -> Tensor:
        """The nearest scales that can be stored."""
        return _to_stored(scale, self.bits, self.scale_dtype or torch.float32)

    def codes(self, weight: Tensor) -> Tensor:
        """The codes nearest to a weight: (out, in) -> (out, in) int8."""
        codes = (to_groups(weight, self.group) / self.scale.unsqueeze(2)).round_()
        if self.zero is not None:
            codes.add_(self.zero.unsqueeze(2))
        return codes.clamp_(*integer_range(self.bits)).view_as(weight).to(torch.int8)


def integer_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code of so many bits, signed.

    Examples:
        >>> integer_range(4)
        (-8, 7)
    """
    return -(1 << bits - 1), (1 << bits - 1) - 1


def decode_integers(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The numbers that codes stand for: (code - zero) · scale.

    Args:
        codes: (out, in) integers.
        scale: (out, groups), the groups of one width.
        zero: (out, groups) zero points; None where codes are symmetric.

    Returns:
        (out, in) float32.
    """
    steps = to_groups(codes.float(), codes.shape[1] // scale.shape[1])  # (out, groups, group)
    if zero is not None:
        steps = steps - zero.float().unsqueeze(2)
    return (steps * scale.float().unsqueeze(2)).view_as(codes)


def integer_bound(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, smallest_ratio: float
) -> Tensor:
    """How far a weight may lie from what its code stands for: half a step, and at both ends of the
    range as far as the scale may have clipped it.

    Args:
        codes: (out, in) integers.
        scale: (out, groups) as it is stored, the groups of one width.
        zero: (out, groups) zero points; None where codes are symmetric.
        bits: bits per code.
        smallest_ratio: of those that the scale was chosen from, as `fit_symmetric` and
            `fit_asymmetric` take them.

    Returns:
        (out, in) float32.
    """
    min_code, max_code = integer_range(bits)
    num_steps = max_code - min_code
    info = torch.finfo(scale.dtype)
    scale = scale.float()
    # How much smaller a stored scale may be than the one that was chosen, as a share.
    rounding = info.eps * max(info.smallest_normal / float(scale.amin()), 1.0)
    widest = num_steps / smallest_ratio * (1 + rounding)
    # Where codes are symmetric, the range is half of that on each side. Otherwise it is all of it,
    # and a zero point may be one off, and is rounded.
    clipped = widest / 2 + 1 - max_code if zero is None else widest - num_steps + 2
    # The largest scale that can be stored may clip any weight.
    if scale.amax() >= torch.finfo(torch.float32).max / 2**bits * (1 - 2.0**-7):
        clipped = 2.0 ** (bits + 1)

    # 1 at both ends of the range and 0 between them: comparisons would take several times as long
    is_end = (codes.float() + 0.5).abs_().sub_(max_code - 0.5).clamp_(min=0)
    in_steps = is_end.mul_(max(clipped - 0.5, 0.0)).add_(0.5)
    bound = to_groups(in_steps, codes.shape[1] // scale.shape[1])  # (out, groups, group)
    # float32 rounds the quotient, the product and the difference
    return bound.mul_(scale.unsqueeze(2) * (1 + 2.0**-10)).view_as(codes)


# Public: schemes of other packages call it with these arguments.
def fit_symmetric(  # noqa: PLR0913
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group: int,
    ratios: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
) -> IntegerGrid:
    """The grid without zero points that costs the weight least: Σ importance (w - q)².

    Args:
        weight: (out, in) float32.
        importance: (in,) what an error costs in each column; None where all cost the same.
        bits: bits per code.
        group: columns that share a scale; the width is a multiple of it.
        ratios: scales to try, in units of amax / ((2^bits - 1) / 2), the full range of codes.
        dtype: what the scale is stored in; costs are those of the scale before.

    Returns:
        The grid, its scale rounded to `dtype`.
    """
    amax = absmax(to_groups(weight, group), dim=2).squeeze(2)  # (out, groups)
    amax = amax.masked_fill_(amax == 0, 1.0)
    table = table_for_device(weight.device, _symmetric_costs, bits, tuple(ratios))
    best = search_scales(weight, importance, group, table, amax)
    ratio = table_for_device(weight.device, torch.tensor, tuple(ratios))[best]  # (out, groups)
    scale = amax / scalar_like(amax, (2**bits - 1) / 2) * ratio
    return IntegerGrid(_by_column(_to_stored(scale, bits, dtype)), None, bits, group, dtype)


# Public: schemes of other packages call it with these arguments.
def fit_asymmetric(  # noqa: PLR0913
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group: int,
    ratios: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
) -> IntegerGrid:
    """The grid with zero points that costs the weight least; 0 is always on it.

    Args:
        weight: (out, in) float32.
        importance: (in,) what an error costs in each column; None where all cost the same.
        bits: bits per code.
        group: columns that share a scale and a zero point; the width is a multiple of it.
        ratios: scales to try, in units of (max - min) / (2^bits - 1), each with the zero point
            nearest to the range's end and its two neighbors. A single ratio is taken with the
            nearest zero point: nothing is searched.
        dtype: what the scale is stored in; costs are those of the scale before.

    Returns:
        The grid, its scale rounded to `dtype`.
    """
    min_code, max_code = integer_range(bits)
    num_steps = max_code - min_code
    groups = to_groups(weight, group)
    # The range is widened to hold 0, so that zeros stay zero.
    low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)  # (out, groups)
    # Divided before they are subtracted: the difference of two huge numbers would overflow.
    steps = scalar_like(high, num_steps)
    scale = (high / steps - low / steps).masked_fill_(high == low, 1.0)
    zero_point = (min_code - low / scale).round_().clamp_(min_code, max_code)

    if len(ratios) == 1:
        scale *= ratios[0]
    else:
        table = table_for_device(weight.device, _asymmetric_costs, bits, tuple(ratios))
        span, kind = scale * num_steps, zero_point - min_code
        best = search_scales(weight, importance, group, table, span, kind=kind)
        # A candidate is a ratio and a shift of the zero point.
        num_shifts = len(ZERO_POINT_SHIFTS)
        ratio = table_for_device(weight.device, torch.tensor, tuple(ratios))
        scale *= ratio[best // num_shifts]
        zero_point = zero_point + best % num_shifts + ZERO_POINT_SHIFTS[0]
        zero_point = zero_point.clamp_(min_code, max_code)
    scale = _by_column(_to_stored(scale, bits, dtype))
    return IntegerGrid(scale, _by_column(zero_point), bits, group, dtype)


def _symmetric_costs(bits: int, ratios: tuple[float, ...]) -> Tensor:
    """Rounding costs of weights in units of amax: (1, places, ratios)."""
    scale = torch.tensor(ratios, dtype=torch.float32) / ((2**bits - 1) / 2)
    return rounding_costs(lambda x: _round(x, scale, bits=bits)).unsqueeze(0)


def _asymmetric_costs(bits: int, ratios: tuple[float, ...]) -> Tensor:
    """Rounding costs of weights in units of max - min, for each zero point that the range may
    have: (2^bits, places, ratios · shifts).
    """
    min_code, max_code = integer_range(bits)
    num_shifts = len(ZERO_POINT_SHIFTS)
    scale = torch.tensor(ratios, dtype=torch.float32).repeat_interleave(num_shifts) / (2**bits - 1)
    shifts = torch.tensor(ZERO_POINT_SHIFTS).repeat(len(ratios))

    def costs(nearest_zero_point: int) -> Tensor:
        zero_point = (shifts + nearest_zero_point).clamp(min_code, max_code)
        return rounding_costs(
            lambda x: _round(x, scale, zero_point, bits=bits), places=PLACES_PER_ZERO_POINT
        )

    return torch.stack([costs(zero) for zero in range(min_code, max_code + 1)])


def _by_column(x: Tensor) -> Tensor:
    """The same numbers, laid out as a sweep reads them: column by column."""
    return x.T.contiguous().T


def _round(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, bits: int) -> Tensor:
    codes = (x / scale).round_()
    if zero_point is None:
        return codes.clamp_(*integer_range(bits)).mul_(scale)
    return codes.add_(zero_point).clamp_(*integer_range(bits)).sub_(zero_point).mul_(scale)


def _to_stored(scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The nearest scale that can be stored and divided by: positive, finite, and so is what codes
    make of it.
    """
    return scale.clamp_(*_stored_range(bits, dtype)).to(dtype).float()


def _stored_range(bits: int, dtype: torch.dtype) -> tuple[float, float]:
    """The least and the greatest scale that can be stored."""
    info = torch.finfo(dtype)
    smallest = max(info.smallest_normal * info.eps, SMALLEST_SCALE)
    return smallest, min(info.max, torch.finfo(torch.float32).max / 2**bits)
