"""The two levels of NVFP4's scales: an E4M3 number for every 16 weights, and one float32 divisor
for all of a stack.

A weight is e2m1 · local / global. Source: NVIDIA, "Pretraining Large Language Models with NVFP4",
arXiv 2509.25149, appendix B, which takes the local scale from the group's largest magnitude. Here
all E4M3 numbers up to an octave away are looked at, among them the scale of Cook et al., "Four Over
Six", arXiv 2512.02010.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from attrs import frozen

from bitpress import numerics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP = 16
# the local scale of the largest group, below E4M3's 448: there are larger ones to try
ROOM = 256.0
# E4M3 numbers to try, counted from the power of two below the one that reaches the largest weight
NEIGHBORS = range(-7, 17)
# exponent of E4M3's greatest power of two, from which there are but seven numbers, up to 448
TOP = 8
# of E4M3
SMALLEST = 2.0**-9
# how far groups reach, in units of that power of two; at the top only a scale of 448 is for more
SPAN, TOP_SPAN = 12.0, 10.5


@frozen(eq=False)
class Grid:
    """E2M1 numbers with scales.

    Attributes:
        local: (out, groups) E4M3.
        scale: (out, groups) float32: local / global, what a loader multiplies with.
    """

    local: Tensor
    scale: Tensor

    def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
        """The representable numbers nearest to targets (rows,) of one column."""
        return _nearest(target, self.scale[rows, column // GROUP])

    def rounded(self, weight: Tensor) -> Tensor:
        """The same for a whole weight (out, in)."""
        return _nearest(numerics.to_groups(weight, GROUP), self.scale.unsqueeze(2)).view_as(weight)

    def codes(self, weight: Tensor) -> Tensor:
        """(out, in) uint8: the codes of representable numbers."""
        units = numerics.to_groups(weight, GROUP) / self.scale.unsqueeze(2)
        return numerics.encode_e2m1(numerics.round_e2m1(units)).view_as(weight)


def global_scale(amax: Tensor, largest: float) -> Tensor:
    """What divides, float32: largest · 6 / amax; 1 where amax is 0.

    Args:
        largest: the local scale that reaches amax.
    """
    import torch

    most = torch.finfo(torch.float32).max
    scale = largest * numerics.E2M1_MAX / amax.float()
    # nothing overflows, or is lost
    scale = scale.clamp(numerics.E4M3_MAX * numerics.E2M1_MAX / most * (1 + 2.0**-20), 2.0**126)
    return scale.masked_fill(amax == 0, 1.0)


def fit(weight: Tensor, importance: Tensor | None, divisor: Tensor) -> Grid:
    """The grid of the least Σ importance (w - q)².

    Args:
        weight: (out, in) float32, the width a multiple of 16.
        importance: (in,) what an error costs in each column; None where all cost the same.
        divisor: the global scale.
    """
    import torch

    amax = numerics.absmax(numerics.to_groups(weight, GROUP), dim=2).squeeze(2)  # (out, groups)
    exponent = (amax * divisor / numerics.E2M1_MAX).frexp().exponent.sub_(1).clamp_(-TOP, TOP)
    top = exponent == TOP
    span = torch.where(top, TOP_SPAN, SPAN).ldexp(exponent) / divisor
    best = numerics.search_scales(weight, importance, GROUP, _costs(weight.device), span, kind=top)
    found = _beside().to(weight.device)[best].ldexp(exponent).clamp_(min=SMALLEST)
    # the smallest scales of E4M3 lie further apart: there the nearest is taken. A sweep reads
    # column by column
    local = found.to(torch.float8_e4m3fn).T.contiguous().T
    return Grid(local, numerics.decode_e4m3(local) / divisor)


def _beside() -> Tensor:
    """E4M3 numbers around 1, as they are around every power of two (NEIGHBORS,)."""
    import torch

    return torch.tensor([(1 + k % 8 / 8) * 2.0 ** (k // 8) for k in NEIGHBORS])


@functools.lru_cache
def _costs(device: torch.device) -> Tensor:
    """Of weights in units of the span, below the top and at the top: (2, places, NEIGHBORS)."""
    import torch

    scale = _beside()
    below = numerics.rounding_costs(lambda x: _nearest(x, scale / SPAN))
    top = numerics.rounding_costs(lambda x: _nearest(x, scale / TOP_SPAN))
    # no error is as large as the span
    return torch.stack([below, top.where(scale < 2, 2.0)]).to(device)


def _nearest(x: Tensor, scale: Tensor) -> Tensor:
    return numerics.round_e2m1(x / scale).mul_(scale)
