"""Integers with a scale, and where they are asymmetric a zero point, per row or per group of
columns.

A weight is stored as a code in -2^(b-1) ... 2^(b-1) - 1 and means (code - zero) * scale.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from attrs import frozen
from torch import Tensor

from bitpress.numerics.blocks import absmax
from bitpress.numerics.scale_search import rounding_costs, search_scales, to_groups

# Steps of a zero point away from the one nearest to the end of the range.
SHIFTS = (-1, 0, 1)

# The smallest scale: below it float32 loses bits.
SMALLEST = torch.finfo(torch.float32).tiny


@frozen(eq=False)
class IntegerGrid:
    """The integers of so many bits, scaled.

    Attributes:
        scale: (out, groups) float32, as it will be stored.
        zero: (out, groups) float32 whole numbers; None where codes are symmetric.
        group: columns that share them.
    """

    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int

    def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
        """The representable numbers nearest to targets (rows,) of one column."""
        index = (rows, column // self.group)
        zero = None if self.zero is None else self.zero[index]
        return _nearest(target, self.scale[index], zero, bits=self.bits)

    def rounded(self, weight: Tensor) -> Tensor:
        """The same for a whole weight (out, in)."""
        zero = None if self.zero is None else self.zero.unsqueeze(2)
        return _nearest(
            to_groups(weight, self.group), self.scale.unsqueeze(2), zero, bits=self.bits
        ).view_as(weight)

    def codes(self, weight: Tensor) -> Tensor:
        """The codes nearest to a weight: (out, in) -> (out, in) int8."""
        codes = (to_groups(weight, self.group) / self.scale.unsqueeze(2)).round_()
        if self.zero is not None:
            codes.add_(self.zero.unsqueeze(2))
        return codes.clamp_(*integer_range(self.bits)).view_as(weight).to(torch.int8)


def integer_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code.

    >>> integer_range(4)
    (-8, 7)
    """
    return -(1 << bits - 1), (1 << bits - 1) - 1


def decode_integers(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """The numbers (out, in) float32 that codes stand for.

    Args:
        codes: (out, in).
        scale: (out, groups), the groups of one width.
        zero: (out, groups) zero points.
    """
    steps = to_groups(codes.float(), codes.shape[1] // scale.shape[1])  # (out, groups, group)
    if zero is not None:
        steps = steps - zero.float().unsqueeze(2)
    return (steps * scale.float().unsqueeze(2)).view_as(codes)


def fit_symmetric(
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
        group: columns that share a scale; the width is a multiple of it.
        ratios: scales to try, in units of amax / ((2^bits - 1) / 2), the full range of codes.
        dtype: what the scale is stored in; costs are those of the scale before.
    """
    amax = absmax(to_groups(weight, group), dim=2).squeeze(2)  # (out, groups)
    amax = amax.masked_fill_(amax == 0, 1.0)
    best = search_scales(
        weight, importance, group, _symmetric_costs(bits, tuple(ratios), weight.device), amax
    )
    scale = amax / ((2**bits - 1) / 2) * amax.new_tensor(ratios)[best]
    return IntegerGrid(_by_column(_stored(scale, bits, dtype)), None, bits, group)


def fit_asymmetric(
    weight: Tensor,
    importance: Tensor | None,
    bits: int,
    group: int,
    ratios: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
) -> IntegerGrid:
    """The grid with zero points that costs the weight least; 0 is always on it.

    As `fit_symmetric`, with ratios in units of (max - min) / (2^bits - 1), and for each the zero
    point nearest to the range's end and its two neighbors. A single ratio is taken, with the
    nearest zero point: nothing is searched.
    """
    lowest, greatest = integer_range(bits)
    groups = to_groups(weight, group)
    least, most = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)  # (out, groups)
    steps = 2**bits - 1
    unit = (most / steps - least / steps).masked_fill_(most == least, 1.0)
    zero = (lowest - least / unit).round_().clamp_(lowest, greatest)
    if len(ratios) == 1:
        unit *= ratios[0]
    else:
        table = _asymmetric_costs(bits, tuple(ratios), weight.device)
        best = search_scales(weight, importance, group, table, unit * steps, kind=zero - lowest)
        unit *= unit.new_tensor(ratios)[best // len(SHIFTS)]
        zero = (zero + best % len(SHIFTS) + SHIFTS[0]).clamp_(lowest, greatest)
    return IntegerGrid(_by_column(_stored(unit, bits, dtype)), _by_column(zero), bits, group)


@functools.lru_cache(maxsize=8)
def _symmetric_costs(bits: int, ratios: tuple[float, ...], device: torch.device) -> Tensor:
    """Of weights in units of amax: (1, places, ratios)."""
    scale = torch.tensor(ratios, dtype=torch.float32) / ((2**bits - 1) / 2)
    return rounding_costs(lambda x: _nearest(x, scale, bits=bits)).unsqueeze(0).to(device)


@functools.lru_cache(maxsize=8)
def _asymmetric_costs(bits: int, ratios: tuple[float, ...], device: torch.device) -> Tensor:
    """Of weights in units of max - min, for each zero point: (2^bits, places, ratios · shifts)."""
    lowest, greatest = integer_range(bits)
    scale = torch.tensor(ratios, dtype=torch.float32).repeat_interleave(len(SHIFTS)) / (2**bits - 1)
    shifts = torch.tensor(SHIFTS).repeat(len(ratios))

    def of(zero: int) -> Tensor:
        return rounding_costs(
            lambda x: _nearest(x, scale, (shifts + zero).clamp(lowest, greatest), bits=bits),
            places=1 << 11,
        )

    return torch.stack([of(zero) for zero in range(lowest, greatest + 1)]).to(device)


def _by_column(x: Tensor) -> Tensor:
    """The same numbers, laid out as a sweep reads them: column by column."""
    return x.T.contiguous().T


def _nearest(x: Tensor, scale: Tensor, zero: Tensor | None = None, *, bits: int) -> Tensor:
    codes = (x / scale).round_()
    if zero is None:
        return codes.clamp_(*integer_range(bits)).mul_(scale)
    return codes.add_(zero).clamp_(*integer_range(bits)).sub_(zero).mul_(scale)


def _stored(scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The nearest scale that can be stored and divided by: positive, finite, and so is what codes
    make of it.
    """
    info = torch.finfo(dtype)
    most = min(info.max, torch.finfo(torch.float32).max / 2**bits)
    return scale.clamp_(max(info.smallest_normal * info.eps, SMALLEST), most).to(dtype).float()
