"""The two levels of NVFP4's scales: an E4M3 number for every 16 weights, and one float32 divisor
for all of a stack.

A weight is e2m1 · local / global. Source: NVIDIA, "Pretraining Large Language Models with NVFP4",
arXiv 2509.25149, appendix B, which takes the local scale from the group's largest magnitude. Here
all E4M3 numbers up to an octave away are looked at, among them the scale of Cook et al., "Four Over
Six", arXiv 2512.02010.

Weights that come from MXFP4 stay as they are. Their largest magnitude is 1 or 1.5 times a power of
two, and so is the divisor. Local scales of that kind then hold the groups' powers of two, as long
as these are no more than 2^15 apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
from attrs import frozen

from bitpress import numerics

if TYPE_CHECKING:
    from torch import Tensor

# Weights that share a local scale: fixed by the format.
GROUP_SIZE = 16

# The local scale of the group with the largest weight. Of E4M3's numbers up to 448 it leaves larger
# ones to try.
LARGEST_LOCAL_SCALE = 256.0

# E4M3 numbers that are tried, eight to the octave, counted from the power of two at or below the
# scale that just reaches the group's largest weight.
CANDIDATES = range(-7, 17)

# The exponent of E4M3's greatest power of two, above which there are but six more numbers: to 448.
MAX_EXPONENT = 8

# E4M3's least number, a subnormal.
SMALLEST_LOCAL_SCALE = 2.0**-9

# How far groups reach at most, in units of that power of two; at the greatest one, as far as a
# local scale of 448 reaches.
SPAN, TOP_SPAN = 12.0, 10.5


# How far beyond 6 a weight may be clipped, in units of its scale: the smallest scale that is tried
# is 9/16 of a power of two, of which the group's largest weight is less than twelve; and rounded to
# E4M3's smallest numbers, a scale may lose a third.
MAX_CLIPPED = 12 * 16 / 9 * 1.5 - 6


@frozen(eq=False)
class Grid:
    """E2M1 numbers times scales.

    Attributes:
        scale: (out, groups) float32: local / global, what a loader multiplies with.
        global_scale: without axes.
    """

    scale: Tensor
    global_scale: Tensor

    @property
    def rounding_rule(self) -> numerics.RoundingRule:
        """What `nearest` gives, as a rule."""
        return numerics.RoundingRule(
            numerics.E2M1,
            self.scale,
            GROUP_SIZE,
            stored_scales=attrs.evolve(numerics.E4M3, lowest=SMALLEST_LOCAL_SCALE),
            divisor=self.global_scale,
        )

    @property
    def refits(self) -> bool:
        """Whether scales gain by being fitted to codes."""
        return True

    @property
    def local(self) -> Tensor:
        """(out, groups) E4M3."""
        import torch

        return (self.scale * self.global_scale).to(torch.float8_e4m3fn)

    def nearest_scale(self, scale: Tensor) -> Tensor:
        """The nearest scales that can be stored."""
        import torch

        local = (scale * self.global_scale).clamp_(SMALLEST_LOCAL_SCALE, numerics.E4M3_MAX)
        return numerics.decode_e4m3(local.to(torch.float8_e4m3fn)) / self.global_scale

    def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
        """The representable numbers nearest to targets (rows,) of one column."""
        return _round(target, self.scale[rows, column // GROUP_SIZE])

    def rounded(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """The representable numbers nearest to all columns of some rows (rows, in)."""
        groups = numerics.to_groups(weight, GROUP_SIZE)  # (rows, groups, 16)
        return _round(groups, self.scale[rows].unsqueeze(2)).view_as(weight)

    def codes(self, weight: Tensor) -> Tensor:
        """(out, in) uint8: the codes of representable numbers."""
        units = numerics.to_groups(weight, GROUP_SIZE) / self.scale.unsqueeze(2)
        return numerics.encode_e2m1(numerics.round_e2m1(units)).view_as(weight)


def global_scale(amax: Tensor, largest_local_scale: float) -> Tensor:
    """The divisor of a stack, largest_local_scale · 6 / amax.

    Args:
        amax: the largest magnitude of the stack, without axes.
        largest_local_scale: the local scale that reaches it.

    Returns:
        float32 without axes; 1 where amax is 0.
    """
    import torch

    float32_max = torch.finfo(torch.float32).max
    scale = largest_local_scale * numerics.E2M1_MAX / amax.float()
    # Within these bounds 448 · 6 / scale does not overflow, and 1 / scale is a normal number.
    smallest = numerics.E4M3_MAX * numerics.E2M1_MAX / float32_max * (1 + 2.0**-20)
    return scale.clamp(smallest, 2.0**126).masked_fill(amax == 0, 1.0)


def fit(weight: Tensor, importance: Tensor | None, global_scale: Tensor) -> Grid:
    """The grid of the least Σ importance (w - q)².

    Args:
        weight: (out, in) float32, the width a multiple of 16.
        importance: (in,) what an error costs in each column; None where all cost the same.
        global_scale: without axes.
    """
    import torch

    groups = numerics.to_groups(weight, GROUP_SIZE)  # (out, groups, 16)
    amax = numerics.absmax(groups, dim=2).squeeze(2)  # (out, groups)
    # The power of two at or below the local scale amax · global / 6.
    largest = numerics.scalar_like(amax, numerics.E2M1_MAX)
    exponent = (amax * global_scale / largest).frexp().exponent.sub_(1)
    exponent.clamp_(-MAX_EXPONENT, MAX_EXPONENT)
    power = numerics.power_of_two(exponent)
    is_top = exponent == MAX_EXPONENT

    span = torch.where(is_top, TOP_SPAN, SPAN).mul_(power) / global_scale
    table = numerics.table_for_device(weight.device, _rounding_costs)
    best = numerics.search_scales(weight, importance, GROUP_SIZE, table, span, kind=is_top)
    candidates = numerics.table_for_device(weight.device, _candidates)
    local = candidates[best].mul_(power).clamp_(min=SMALLEST_LOCAL_SCALE)

    # E4M3's smallest numbers lie further apart than eight to the octave: there the nearest is
    # taken. A sweep reads scales column by column.
    local = local.to(torch.float8_e4m3fn).T.contiguous().T
    return Grid(numerics.decode_e4m3(local) / global_scale, global_scale)


def _candidates() -> Tensor:
    """E4M3 numbers around 1, as they are around every power of two: (candidates,)."""
    import torch

    return torch.tensor([(1 + k % 8 / 8) * 2.0 ** (k // 8) for k in CANDIDATES])


def _rounding_costs() -> Tensor:
    """Rounding costs of weights in units of the span, below the greatest power of two and at it:
    (2, places, candidates).
    """
    import torch

    local = _candidates()
    below = numerics.rounding_costs(lambda x: _round(x, local / SPAN))
    top = numerics.rounding_costs(lambda x: _round(x, local / TOP_SPAN))
    # Beyond 448 there is no scale: such candidates cost more than any error within the span.
    return torch.stack([below, top.where(local < 2, 2.0)])


def _round(x: Tensor, scale: Tensor) -> Tensor:
    return numerics.round_e2m1(x / scale).mul_(scale)
