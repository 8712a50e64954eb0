"""SmoothQuant's factors, their strength searched on statistics (Xiao et al., "SmoothQuant", arXiv
2211.10438, equation 4).

Large input channels are divided by s_j = a_jᵅ / w_j¹⁻ᵅ, and the weight's columns multiplied by it:
a_j and w_j are the largest magnitudes of channel j among inputs and weights. α is the one with the
least expected error of a layer's output, if it is well below that without smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitpress import Statistic, numerics

if TYPE_CHECKING:
    from torch import Tensor

STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# of the sums that stand for a token's largest input
POWER = 8
# inputs are divided by it first, so that their eighth powers stay within float32
UNIT = 256.0
# of the error expected with a scale per token must be left: it is a bound, and a small gain in it
# may be none
WORTH = 0.25
# between zero and the largest number
STEPS = 127.5


def observe_channels(inputs: Tensor) -> dict[str, Statistic]:
    """Per channel the largest magnitude, the sum of squares and that of eighth powers; and the
    number of tokens.
    """
    x = inputs.float()
    return {
        "channel_amax": Statistic(x.abs().amax(0), "max"),
        "channel_squares": Statistic(x.square().sum(0), "sum"),
        "channel_powers": Statistic((x / UNIT).square().square().square().sum(0), "sum"),
        "channel_tokens": Statistic(x.new_tensor(float(len(x))), "sum"),
    }


def factors(
    weight: Tensor, stats: Mapping[str, Statistic], strength: float | None, static: bool
) -> Tensor | None:
    """The factors (in,) of the columns, powers of two; None where no factors are better.

    Args:
        weight: (out, in) float32.
        strength: α; None searches it.
        static: whether activations have one scale for all tokens.
    """
    if "channel_amax" not in stats:
        return None
    largest = stats["channel_amax"].value
    columns = numerics.absmax(weight, dim=0).squeeze(0)
    known = (largest > 0) & (columns > 0)
    best, least = None, (1 if static else WORTH) * expected_error(weight, stats, None, static)
    for alpha in STRENGTHS if strength is None else (strength,):
        s = (largest**alpha / columns ** (1 - alpha)).masked_fill(~known, 1.0)
        s = (s / s[known].log().mean().exp()).masked_fill(~known, 1.0) if known.any() else s
        s = s.clamp(1e-4, 1e4).log2().round().exp2()
        error = expected_error(weight, stats, s, static)
        if strength is not None or error < least:
            best, least = s, error
    return best


def expected_error(
    weight: Tensor, stats: Mapping[str, Statistic], s: Tensor | None, static: bool
) -> float:
    """E ||error of the output||² per token, in units of step² / 12, of rounding weight s and inputs
    / s to INT8.

    A step of a row is its largest magnitude / 127.5; that of a token its largest input / 127.5,
    whose square's mean is at most (Σ_j E[(x_j / s_j)⁸])^(1/4).
    """
    tokens = stats["channel_tokens"].value.clamp(min=1)
    squares, powers = (
        stats["channel_squares"].value / tokens,
        stats["channel_powers"].value / tokens,
    )
    largest = stats["channel_amax"].value
    if s is not None:
        weight, squares, powers, largest = (
            weight * s,
            squares / s**2,
            powers / s**POWER,
            largest / s,
        )
    token = largest.amax().square() if static else powers.sum() ** (2 / POWER) * UNIT**2
    rows = numerics.absmax(weight, dim=1).square().sum()
    return float(rows * squares.sum() + token * weight.square().sum()) / STEPS**2
