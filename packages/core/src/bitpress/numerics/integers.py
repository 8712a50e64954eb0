"""Integers with a scale, and where they are asymmetric a zero point, per row or per group of columns.

A weight is stored as a code in -2^(b-1) ... 2^(b-1) - 1 and means (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor

CHUNK = 1 << 17  # weights whose candidates are compared at a time: they stay in cache
SMALLEST = torch.finfo(torch.float32).tiny  # of a scale: below it float32 loses bits


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
        place = (rows, column // self.group)
        return _nearest(target, self.scale[place], None if self.zero is None else self.zero[place], self.bits)

    def rounded(self, weight: Tensor) -> Tensor:
        """The same for a whole weight (out, in)."""
        zero = None if self.zero is None else self.zero.unsqueeze(2)
        return _nearest(_grouped(weight, self.group), self.scale.unsqueeze(2), zero, self.bits).view_as(weight)

    def codes(self, weight: Tensor) -> Tensor:
        """The codes nearest to a weight: (out, in) -> (out, in) int8."""
        found = (_grouped(weight, self.group) / self.scale.unsqueeze(2)).round_()
        if self.zero is not None:
            found.add_(self.zero.unsqueeze(2))
        return found.clamp_(*limits(self.bits)).view_as(weight).to(torch.int8)


def limits(bits: int) -> tuple[int, int]:
    """The least and the greatest code.

    >>> limits(4)
    (-8, 7)
    """
    return -(1 << bits - 1), (1 << bits - 1) - 1


def decode_integers(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """(out, in) float32: what codes mean. `scale` and `zero` are (out, groups), the groups of one width."""
    found = _grouped(codes.float(), codes.shape[1] // scale.shape[1])
    if zero is not None:
        found = found - zero.float().unsqueeze(2)
    return (found * scale.float().unsqueeze(2)).view_as(codes)


def fit_symmetric(
    weight: Tensor, importance: Tensor | None, bits: int, group: int, ratios: Sequence[float], dtype: torch.dtype = torch.float32
) -> IntegerGrid:
    """The grid without zero points that costs the weight least: Σ importance (w - q)².

    Args:
        weight: (out, in) float32.
        importance: (in,) what an error costs in each column; None where all cost the same.
        group: columns that share a scale; the width is a multiple of it.
        ratios: scales to try, in units of amax / ((2^bits - 1) / 2), the full range of codes.
        dtype: what the scale is stored in; every candidate is rounded to it before it is judged.
    """

    def candidates(grouped: Tensor) -> Iterator[tuple[Tensor, None]]:
        amax = grouped.abs().amax(2)  # (out, groups)
        unit = (amax / ((2**bits - 1) / 2)).masked_fill_(amax == 0, 1.0)
        for ratio in ratios:
            yield _stored(unit * ratio, bits, dtype), None

    return _search(weight, importance, bits, group, candidates)


def fit_asymmetric(
    weight: Tensor, importance: Tensor | None, bits: int, group: int, ratios: Sequence[float], dtype: torch.dtype = torch.float32
) -> IntegerGrid:
    """The grid with zero points that costs the weight least; 0 is always on it.

    As `fit_symmetric`, with ratios in units of (max - min) / (2^bits - 1), and for each the zero point nearest to the range's end
    and its two neighbours.
    """
    lowest, greatest = limits(bits)

    def candidates(grouped: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        least, most = grouped.amin(2).clamp_(max=0), grouped.amax(2).clamp_(min=0)
        steps = 2**bits - 1
        unit = (most / steps - least / steps).masked_fill_(most == least, 1.0)
        for ratio in ratios:
            scale = _stored(unit * ratio, bits, dtype)
            for shift in (-1, 0, 1):
                yield scale, (lowest - least / scale * ratio + shift).round_().clamp_(lowest, greatest)

    return _search(weight, importance, bits, group, candidates)


Candidates = Callable[[Tensor], Iterator[tuple[Tensor, Tensor | None]]]


def _search(weight: Tensor, importance: Tensor | None, bits: int, group: int, candidates: Candidates) -> IntegerGrid:
    """The best candidate of every group, rows chunk by chunk."""
    found = [
        _best(_grouped(chunk, group), None if importance is None else importance.view(-1, group), bits, candidates)
        for chunk in torch.split(weight, max(CHUNK // weight.shape[1], 1))
    ]
    zeros = [zero for _, zero in found if zero is not None]
    return IntegerGrid(torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None, bits, group)


def _best(grouped: Tensor, importance: Tensor | None, bits: int, candidates: Candidates) -> tuple[Tensor, Tensor | None]:
    """The candidate of each group that costs least; judged near 1, where no square is too large or too small for float32."""
    power = -grouped.abs().amax(2).frexp().exponent.clamp(-126, 126)  # (out, groups)
    near = grouped.ldexp(power.unsqueeze(2))  # powers of two change no code
    cost: Tensor | None = None
    for scale, zero in candidates(grouped):
        at = None if zero is None else zero.unsqueeze(2)
        error = _nearest(near, scale.ldexp(power).unsqueeze(2), at, bits).sub_(near).square_()  # (out, groups, group)
        new = (error if importance is None else error.mul_(importance)).sum(2)
        if cost is None:
            cost, best_scale, best_zero = new, scale, zero
            continue
        better = new < cost
        cost, best_scale = torch.where(better, new, cost), torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _nearest(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    codes = (x / scale).round_()
    if zero is None:
        return codes.clamp_(*limits(bits)).mul_(scale)
    return codes.add_(zero).clamp_(*limits(bits)).sub_(zero).mul_(scale)


def _grouped(x: Tensor, group: int) -> Tensor:
    return x.reshape(len(x), -1, group)  # (out, groups, group)


def _stored(scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The nearest scale that can be stored and divided by: positive, finite, and so is what codes make of it."""
    info = torch.finfo(dtype)
    most = min(info.max, torch.finfo(torch.float32).max / 2**bits)
    return scale.clamp_(max(info.smallest_normal * info.eps, SMALLEST), most).to(dtype).float()
