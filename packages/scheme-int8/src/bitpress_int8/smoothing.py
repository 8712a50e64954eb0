"""SmoothQuant's factors, their strength searched on statistics (Xiao et al., "SmoothQuant", arXiv
2211.10438, equation 4).

Input channels are divided by s_j = a_jᵅ / w_j¹⁻ᵅ, and the weight's columns multiplied by it. In the
paper a_j and w_j are largest magnitudes. Here w_j is the norm of column j. Where each token has its
own scale, a_j is E[x_j⁴]^(1/4): the error of rounding inputs is then at most

    (Σ_j a_j⁴ / s_j⁴)^(1/2) Σ_j s_j² w_j²

Its derivatives vanish where a_j⁴ / s_j⁴ is proportional to s_j² w_j², and so s_j to (a_j⁴ /
w_j²)^(1/6): that is α = 2/3. The error of rounding the weight asks for less. α is the one with the
least expected error of both.
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

# Smoothing must leave at most this part of the expected error: a smaller gain may be none.
MAX_ERROR_LEFT = 0.9

# A channel that calibration hardly used does not become the largest where it is used.
MIN_FACTOR = 1 / 64


def observe_channels(inputs: Tensor) -> dict[str, Statistic]:
    """What `factors` needs of inputs (tokens, in): per channel the largest magnitude, the sum of
    squares and that of fourth powers, (in,) each; and the number of tokens.
    """
    x = inputs.float()
    squares = x.square()
    return {
        "channel_amax": Statistic(x.abs().amax(0), "max"),
        "channel_squares": Statistic(squares.sum(0), "sum"),
        "channel_powers": Statistic(squares.square_().sum(0), "sum"),
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
        (in,) by which columns are multiplied; None where the error is hardly less with them.
    """
    if "channel_amax" not in stats:
        return None
    size = stats["channel_amax"].value
    if not static:
        tokens = stats["channel_tokens"].value.clamp(min=1)
        size = (stats["channel_powers"].value / tokens).pow(0.25)
    norm = weight.norm(dim=0)
    is_used = (size > 0) & (norm > 0)  # (in,)

    best = None
    least_error = expected_error(weight, stats, None, static) * MAX_ERROR_LEFT
    for alpha in STRENGTHS if strength is None else (strength,):
        s = (size**alpha / norm ** (1 - alpha)).masked_fill(~is_used, 1.0)
        # Around a geometric mean of 1, so that unused channels stand in the middle.
        if is_used.any():
            s = (s / s[is_used].log().mean().exp()).masked_fill(~is_used, 1.0)
        s = s.clamp(min=MIN_FACTOR)
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
    whose square's mean is at most (Σ_j E[(x_j / s_j)⁴])^(1/2).
    """
    tokens = stats["channel_tokens"].value.clamp(min=1)
    squares = stats["channel_squares"].value / tokens
    powers = stats["channel_powers"].value / tokens
    input_amax = stats["channel_amax"].value
    if s is not None:
        weight = weight * s
        squares, powers = squares / s**2, powers / s**4
        input_amax = input_amax / s

    token_amax_squared = input_amax.amax().square() if static else powers.sum().sqrt()
    row_amax_squared = numerics.absmax(weight, dim=1).square().sum()
    weight_error = row_amax_squared * squares.sum()
    input_error = token_amax_squared * weight.square().sum()
    return float(weight_error + input_error) / HALF_RANGE**2
