"""Rounding with error feedback on calibration statistics: what every calibrated scheme observes,
and how it is used.

Letters: x̃ is a layer's input as the already quantized layers before it make it, x the same token's
in the float model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from bitpress.numerics.columns import column_sweep
from bitpress.numerics.gram import cross, gram
from bitpress.numerics.hessian import Factor, factorize_hessian
from bitpress.numerics.least_squares import masked_least_squares
from bitpress.schemes.values import Layer, Statistic

# The size of what is missing in the output is measured on every eighth token.
SAMPLE_STRIDE = 8

# With this many tokens for each input channel a correction is believed in full; with fewer it is
# shrunk in proportion.
TOKENS_PER_CHANNEL = 16


class Grid(Protocol):
    """The numbers a weight may become: scales and zero points already chosen."""

    def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
        """The representable numbers nearest to targets (rows,) of one column."""
        ...

    def rounded(self, weight: Tensor) -> Tensor:
        """The same for a whole weight (out, in)."""
        ...


AnyGrid = TypeVar("AnyGrid", bound=Grid)

# From a weight (out, in) and what an error costs in each column (in,) to the grid for it.
Fit = Callable[[Tensor, Tensor | None], AnyGrid]


def gptq_statistics(
    inputs: Tensor, weight: Tensor, reference: Tensor | None = None, residual: Tensor | None = None
) -> dict[str, Statistic]:
    """The sums that `gptq_quantize` needs of one batch, as `observe` is given it; all float32.

    "hessian" (in, in): Σ x̃ x̃ᵀ; "tokens": their number. Where the float model's inputs are given,
    of what is missing in the output, e = W (x - x̃) + r: "drift" (in, in): Σ (x - x̃) x̃ᵀ;
    "residual" (out, in): Σ r x̃ᵀ; "drift_tokens"; and of a sample of tokens "missing" (out,): Σ e²,
    and "missing_tokens".
    """
    x = inputs.float()  # (tokens, in)
    sums = {"hessian": gram(x), "tokens": torch.tensor(float(len(x)))}
    if reference is not None:
        drifted = reference.float() - x  # (tokens, in)
        missing = drifted[::SAMPLE_STRIDE] @ weight.T  # (sampled tokens, out)
        if residual is not None:
            sums["residual"] = cross(residual.float(), x)
            missing += residual[::SAMPLE_STRIDE]
        sums |= {"drift": cross(drifted, x), "drift_tokens": sums["tokens"]}
        sums |= {
            "missing": missing.square().sum(0),
            "missing_tokens": torch.tensor(float(len(missing))),
        }
    return {
        name: Statistic(value, "sum", rows=name in ("residual", "missing"))
        for name, value in sums.items()
    }


def gptq_quantize(
    layer: Layer, stats: Mapping[str, Statistic], fit: Fit[AnyGrid]
) -> tuple[Tensor, AnyGrid]:
    """A layer's weight rounded column by column so that (w - q) x̃ is small, and the grid it was
    rounded on.

    Without statistics (the layer never saw a token, or the plan asks for shapes) every weight is
    rounded to nearest, as is every row on which the feedback does worse than that; where the
    statistics cannot be used, with a warning. Zeros stay zero.

    Args:
        stats: what `gptq_statistics` returned, merged.
        fit: chooses the grid.
    """
    weight, mask = layer.weight, layer.mask
    if not weight.all():
        mask = weight != 0 if mask is None else mask & (weight != 0)
    factor = _factor(stats) if "hessian" in stats else None
    if factor is None:
        grid = fit(weight, None)
        return _masked(grid.rounded(weight), mask), grid

    target = gptq_target(layer, stats, factor)
    if layer.mask is None or mask is None:
        target = _masked(target, mask)
    else:
        target = masked_least_squares(weight, target, factor, mask)
    grid = fit(target, factor.diagonal)
    column_mask = None if mask is None else mask.T.contiguous()  # (in, out)

    def project(column_target: Tensor, rows: slice, column: int) -> Tensor:
        nearest = grid.nearest(column_target, rows, column)
        if column_mask is None:
            return nearest
        return torch.where(column_mask[column, rows], nearest, 0.0)

    swept, cost = column_sweep(target, factor, project)  # (out, in), (out,)

    # Clipping can make the feedback blow up, to NaN where numbers are huge: such rows are rounded
    # to nearest.
    nearest = _masked(grid.rounded(target), mask)
    is_better = factor.covers(cost, target - nearest)  # (out,)
    return torch.where(is_better.unsqueeze(1), swept, nearest), grid


def gptq_target(layer: Layer, stats: Mapping[str, Statistic], factor: Factor) -> Tensor:
    """The weight (out, in) that a layer should come near to, whatever steps made of it so far.

    It is the original weight, and what makes up for what is missing in the layer's output.
    """
    weight = layer.weight if layer.original_weight is None else layer.original_weight
    return weight + drift_correction(weight, stats, factor) if "drift" in stats else weight


def drift_correction(weight: Tensor, stats: Mapping[str, Statistic], factor: Factor) -> Tensor:
    """What to add to a weight to make up for the drift of its inputs: (out, in).

    min_V ||W x + r - V x̃||² has V = W + C H⁻¹ with C = W E[(x - x̃) x̃ᵀ] + E[r x̃ᵀ]. Without r
    this is where Zhang et al., "Qronos", arXiv 2505.11695, and Li et al., "GPTAQ", arXiv
    2504.02692, start; r is how far the residual stream has moved by then.

    C is estimated from N tokens. If what is missing, e, had nothing to do with x̃, a row of C H⁻¹
    would still seem to explain E[e²] in / N of it: it is shrunk by the share that what it explains
    has beyond that. These are few of the tokens that H comes from: where it seems to explain more
    than E[e²], H is too small for them, and by Cauchy and Schwarz the best multiple of the row is
    at most E[e²] over what it seems to explain. A few tokens larger than all others can still
    mislead, and what is wrong in one layer is drift in the next: where tokens are few for the width
    the whole is shrunk.
    """
    tokens = stats["drift_tokens"].value.item()
    cross_moment = weight @ stats["drift"].value.div(tokens)  # (out, in), C above
    if "residual" in stats:
        cross_moment += stats["residual"].value.div(tokens)
    correction = factor.solve(cross_moment)
    explained = (correction * cross_moment).sum(1)  # (out,)
    missing = stats["missing"].value / stats["missing_tokens"].value  # (out,), E[e²]
    by_chance = missing * (weight.shape[1] / tokens)

    # E[e²] is known from a sample: of normal numbers its mean square lies within three standard
    # deviations of this bound.
    largest = missing * (1 + 3 * (2 / stats["missing_tokens"].value).sqrt())
    share = (1 - by_chance / explained).clamp_(0, 1) * (largest / explained).clamp_(max=1)  # (out,)
    correction *= share.mul_(min(tokens / (TOKENS_PER_CHANNEL * weight.shape[1]), 1.0)).unsqueeze(1)
    return torch.where(correction.isfinite().all(1, keepdim=True), correction, 0.0)


def _factor(stats: Mapping[str, Statistic]) -> Factor | None:
    factor = factorize_hessian(stats["hessian"].value, stats["tokens"].value.item())
    if factor is None:
        warnings.warn(
            "its calibration statistics are not finite or singular: rounded to nearest",
            stacklevel=3,
        )
    return factor


def _masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight if mask is None else torch.where(mask, weight, 0.0)
