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

# Exponents α that are tried.
EXPONENTS = tuple(i / 20 for i in range(20))

# Scale ratios that are searched while exponents are compared.
RATIOS = (0.7, 0.8, 0.9, 1.0)

# Rows of the weight on which exponents are compared.
NUM_SAMPLED_ROWS = 256

# Added to E[x²], as a part of its mean, for channels that were hardly active.
DAMPING = 0.01


def factors(
    weight: Tensor, stats: Mapping[str, Statistic], bits: int, group_size: int, symmetric: bool
) -> Tensor | None:
    """AWQ's factors for the columns of a weight, E[x²]^(α/2) with the best α.

    Args:
        weight: (out, in) float32.
        stats: as `numerics.gptq_statistics` gives them, merged over batches.
        bits: bits per code.
        group_size: columns that share a scale.
        symmetric: whether there are no zero points.

    Returns:
        (in,) by which columns are multiplied; None where none are better than 1.
    """
    import torch

    input_power = importance(stats)  # (in,), E[x²]
    if input_power is None:
        return None
    hessian = _mean(stats["hessian"].value, stats)
    num_rows = min(len(weight), NUM_SAMPLED_ROWS)
    # on the CPU: what is nearly a whole number, a GPU may round to the next row
    rows = torch.linspace(0, len(weight) - 1, num_rows).long()
    sample = weight[rows.to(weight.device)]
    fit = numerics.fit_symmetric if symmetric else numerics.fit_asymmetric

    best, least_loss = None, torch.inf
    for alpha in EXPONENTS:
        # around a geometric mean of 1
        s = input_power.log().mul(alpha / 2)
        s = (s - s.mean()).exp()
        scaled = sample * s
        grid = fit(scaled, input_power / s.square(), bits, group_size, RATIOS)
        error = grid.rounded(scaled) / s - sample
        loss = float(((error @ hessian) * error).sum())
        if loss < least_loss:
            best, least_loss = s, loss
    return None if best is None or (best == 1).all() else best


def importance(stats: Mapping[str, Statistic]) -> Tensor | None:
    """What an error costs in each column, the damped diagonal of H: (in,); None without statistics,
    or without usable ones.
    """
    if "hessian" not in stats:
        return None
    diagonal = _mean(stats["hessian"].value.diagonal(), stats)
    if not diagonal.isfinite().all() or not diagonal.any():
        warnings.warn(
            "its calibration statistics are not finite, or all zero: rounded without them",
            stacklevel=2,
        )
        return None
    return diagonal + DAMPING * diagonal.mean()


def _mean(total: Tensor, stats: Mapping[str, Statistic]) -> Tensor:
    """What a sum over tokens is for each of them."""
    return total / stats["tokens"].value.clamp(min=1).to(total.device)
