"""AWQ: input channels that matter are scaled up before rounding (Lin et al., "AWQ", arXiv
2306.00978, equations 4 and 5).

The paper runs the block once for each exponent tried. The layer's own error needs no run: with H =
E[x xᵀ] it is tr((W - Q(W s) / s) H (W - Q(W s) / s)ᵀ).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitpress import Statistic, numerics

if TYPE_CHECKING:
    from torch import Tensor

EXPONENTS = tuple(i / 20 for i in range(20))
# of scales, while exponents are compared
RATIOS = (0.7, 0.8, 0.9, 1.0)
# on which they are compared
ROWS = 256
# of the mean, for channels that were hardly active
DAMPING = 0.01


def factors(
    weight: Tensor, stats: Mapping[str, Statistic], bits: int, group: int, symmetric: bool
) -> Tensor | None:
    """The factors (in,) of the columns, powers of two: E[x²]^(α/2) with the best α; None where none
    is better.

    Args:
        weight: (out, in) float32.
    """
    import torch

    costs = importance(stats)
    if costs is None:
        return None
    sample = weight[
        torch.linspace(0, len(weight) - 1, min(len(weight), ROWS), device=weight.device).long()
    ]
    hessian = stats["hessian"].value / stats["tokens"].value.clamp(min=1)
    tried: dict[tuple[float, ...], float] = {}
    best, least = None, torch.inf
    for alpha in EXPONENTS:
        s = costs.log2().mul(alpha / 2)
        # as they will be folded
        s = (s - s.mean()).round().exp2()
        known = tuple(s.tolist())
        if known in tried:
            continue
        scaled = sample * s
        fit = numerics.fit_symmetric if symmetric else numerics.fit_asymmetric
        error = fit(scaled, costs / s.square(), bits, group, RATIOS).rounded(scaled) / s - sample
        tried[known] = float(((error @ hessian) * error).sum())
        if tried[known] < least:
            best, least = s, tried[known]
    return None if best is None or (best == 1).all() else best


def importance(stats: Mapping[str, Statistic]) -> Tensor | None:
    """(in,) what an error costs in each column, the damped diagonal of H; None without statistics,
    or without usable ones.
    """
    if "hessian" not in stats:
        return None
    diagonal = stats["hessian"].value.diagonal() / stats["tokens"].value.clamp(min=1)
    if not diagonal.isfinite().all() or not diagonal.any():
        warnings.warn(
            "its calibration statistics are not finite, or all zero: rounded without them",
            stacklevel=2,
        )
        return None
    return diagonal + DAMPING * diagonal.mean()
