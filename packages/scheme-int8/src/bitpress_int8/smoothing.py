"""SmoothQuant's factors, their strength searched on statistics (Xiao et al., "SmoothQuant", arXiv
2211.10438, equation 4).

Large input channels are divided by s_j = a_jᵅ / w_j¹⁻ᵅ, and the weight's columns multiplied by it:
a_j and w_j are the largest magnitudes of channel j among inputs and weights. α is the one with the
least expected error of the layer's output, if that is well below the error without smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitpress import Statistic, numerics
from bitpress_int8.activations import HALF_RANGE

if TYPE_CHECKING:
    from torch import Tensor

# Exponents α that are tried.
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

# A token's largest input is bounded by the eighth root of the sum of its eighth powers.
POWER = 8

# Inputs are divided by it first, so that their eighth powers stay within float32.
UNIT = 256.0

# With a scale per token, smoothing must leave at most this part of the expected error: that is a
# bound, and a small gain in it may be none.
MAX_ERROR_LEFT = 0.25


def observe_channels(inputs: Tensor) -> dict[str, Statistic]:
    """What `factors` needs of inputs (tokens, in): per channel the largest magnitude, the sum of
    squares and that of eighth powers, (in,) each; and the number of tokens.
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
    """SmoothQuant's factors for the columns of a weight.

    Args:
        weight: (out, in) float32.
        stats: as `observe_channels` gives them, merged over batches.
        strength: α; None searches it.
        static: whether activations have one scale for all tokens.

    Returns:
        (in,) powers of two, by which columns are multiplied; None where the error is well enough
        without them.
    """
    if "channel_amax" not in stats:
        return None
    input_amax = stats["channel_amax"].value  # (in,), a_j
    weight_amax = numerics.absmax(weight, dim=0).squeeze(0)  # (in,), w_j
    is_used = (input_amax > 0) & (weight_amax > 0)

    best = None
    least_error = expected_error(weight, stats, None, static) * (1 if static else MAX_ERROR_LEFT)
    for alpha in STRENGTHS if strength is None else (strength,):
        s = (input_amax**alpha / weight_amax ** (1 - alpha)).masked_fill(~is_used, 1.0)
        # Around a geometric mean of 1, so that unused channels stand in the middle.
        if is_used.any():
            s = (s / s[is_used].log().mean().exp()).masked_fill(~is_used, 1.0)
        s = s.clamp(1e-4, 1e4).log2().round().exp2()
        error = expected_error(weight, stats, s, static)
        if strength is not None or error < least_error:
            best, least_error = s, error
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
    squares = stats["channel_squares"].value / tokens
    powers = stats["channel_powers"].value / tokens
    input_amax = stats["channel_amax"].value
    if s is not None:
        weight = weight * s
        squares, powers = squares / s**2, powers / s**POWER
        input_amax = input_amax / s

    if static:
        token_amax_squared = input_amax.amax().square()
    else:
        token_amax_squared = powers.sum() ** (2 / POWER) * UNIT**2
    row_amax_squared = numerics.absmax(weight, dim=1).square().sum()
    weight_error = row_amax_squared * squares.sum()
    input_error = token_amax_squared * weight.square().sum()
    return float(weight_error + input_error) / HALF_RANGE**2
