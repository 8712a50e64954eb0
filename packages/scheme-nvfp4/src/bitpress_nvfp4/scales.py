"""The two levels of NVFP4's scales: an E4M3 number for every 16 weights, and one float32 divisor for all of a stack.

A weight is e2m1 · local / global. Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149, appendix B,
which takes the local scale from the group's largest magnitude. Here every E4M3 number within an octave is tried, which contains
that one and the scale of Cook et al., "Four Over Six", arXiv 2512.02010.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from attrs import frozen

from bitpress import numerics

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 16
ROOM = 256.0  # the local scale of the largest group, below E4M3's 448: there are larger ones to try
NEIGHBOURS = (0, *(k for k in range(-7, 9) if k))  # E4M3 numbers to try, counted from the one that reaches the largest weight
LARGEST, SMALLEST = 0x7E, 0x01  # E4M3 codes: 448 and 2^-9


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
        return _nearest(numerics.grouped(weight, GROUP), self.scale.unsqueeze(2)).view_as(weight)

    def codes(self, weight: Tensor) -> Tensor:
        """(out, in) uint8: the codes of representable numbers."""
        units = numerics.grouped(weight, GROUP) / self.scale.unsqueeze(2)
        return numerics.encode_e2m1(numerics.round_e2m1(units)).view_as(weight)


def global_scale(amax: Tensor, largest: float) -> Tensor:
    """What divides, float32: largest · 6 / amax; 1 where amax is 0.

    Args:
        largest: the local scale that reaches amax.
    """
    import torch

    most = torch.finfo(torch.float32).max
    scale = largest * numerics.E2M1_MAX / amax.float()
    scale = scale.clamp(numerics.E4M3_MAX * numerics.E2M1_MAX / most * (1 + 2.0**-20), 2.0**126)  # nothing overflows, or is lost
    return scale.masked_fill(amax == 0, 1.0)


def fit(weight: Tensor, importance: Tensor | None, divisor: Tensor) -> Grid:
    """The grid of the least Σ importance (w - q)².

    Args:
        weight: (out, in) float32, the width a multiple of 16.
        importance: (in,) what an error costs in each column; None where all cost the same.
        divisor: the global scale.
    """
    import torch

    def candidates(groups: Tensor) -> Generator[tuple[Tensor, Tensor], object, None]:
        amax = numerics.absmax(groups, dim=2).squeeze(2)  # (out, groups)
        reaching = numerics.encode_e4m3(amax * divisor, amax.new_tensor(numerics.E2M1_MAX)).view(torch.int8)
        beside = torch.tensor(NEIGHBOURS, dtype=torch.int16, device=amax.device).view(-1, 1, 1)
        local = (reaching + beside).clamp_(SMALLEST, LARGEST).to(torch.uint8)  # (neighbours, out, groups)
        scale = numerics.decode_e4m3(local.view(torch.float8_e4m3fn)) / divisor
        for found in zip(scale, local, strict=True):  # noqa: UP028 (a zip cannot be sent anything)
            yield found

    scale, local = numerics.search(weight, importance, GROUP, candidates, lambda x, scale, _: _nearest(x, scale))
    return Grid(local.view(torch.float8_e4m3fn), scale)


def _nearest(x: Tensor, scale: Tensor) -> Tensor:
    return numerics.round_e2m1(x / scale).mul_(scale)
