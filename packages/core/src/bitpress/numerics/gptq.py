"""Rounding with error feedback on calibration statistics: what every calibrated scheme observes,
and how it is used.

Letters: x̃ is a layer's input as the already quantised layers before it make it, x the same token's
in the float model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from bitpress.numerics.columns import column_sweep
from bitpress.numerics.gram import cross, gram
from bitpress.numerics.hessian import Factor, factorize_hessian
from bitpress.numerics.least_squares import masked_least_squares
from bitpress.schemes.values import Layer, Statistic

# every so many tokens the size of what is missing is measured
SAMPLED = 8

# tokens for each input channel, of which a correction is believed; fewer are believed in proportion
ENOUGH = 16


class Grid(Protocol):
    """The numbers a weight may become: scales and zero points already chosen."""

    def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
        """The representable numbers nearest to targets (rows,) of one column."""
        ...

    def rounded(self, weight: Tensor) -> Tensor:
        """The same for a whole weight (out, in)."""
        ...


# a weight (out, in) and what an error costs in each column (in,) -> its grid
Fit = Callable[[Tensor, Tensor | None], Grid]


def gptq_statistics(
    inputs: Tensor, weight: Tensor, reference: Tensor | None = None, residual: Tensor | None = None
) -> dict[str, Statistic]:
    """The sums that `feedback` needs of one batch, as `observe` is given it; all float32.

    "hessian" (in, in): Σ x̃ x̃ᵀ; "tokens": their number. Where the float model's inputs are given,
    of what is missing in the output, e = W (x - x̃) + r: "drift" (in, in): Σ (x - x̃) x̃ᵀ;
    "residual" (out, in): Σ r x̃ᵀ; "drift_tokens"; and of a sample of tokens "missing" (out,): Σ e²,
    and "missing_tokens".
    """
    x = inputs.float()
    found = {"hessian": gram(x), "tokens": torch.tensor(float(len(x)))}
    if reference is not None:
        moved = reference.float() - x
        missing = moved[::SAMPLED] @ weight.T
        if residual is not None:
            found["residual"] = cross(residual.float(), x)
            missing += residual[::SAMPLED]
        found |= {"drift": cross(moved, x), "drift_tokens": found["tokens"]}
        found |= {
            "missing": missing.square().sum(0),
            "missing_tokens": torch.tensor(float(len(missing))),
        }
    return {
        name: Statistic(value, "sum", rows=name in ("residual", "missing"))
        for name, value in found.items()
    }


def gptq_quantize(layer: Layer, stats: Mapping[str, Statistic], fit: Fit) -> tuple[Tensor, Grid]:
    """A layer's weight rounded column by column so that (w - q) x̃ is small, and the grid it was
    rounded on.

    Without statistics (the layer never saw a token, or the plan asks for shapes) every weight is
    rounded to nearest, as is every row on which the feedback does worse than that; where the
    statistics cannot be used, with a warning. Zeros stay zero.

    Args:
        stats: what `moments` returned, merged.
        fit: chooses the grid.
    """
    weight, keep = layer.weight, layer.mask
    if not weight.all():
        keep = weight != 0 if keep is None else keep & (weight != 0)
    factored = _factor(stats) if "hessian" in stats else None
    if factored is None:
        grid = fit(weight, None)
        return _masked(grid.rounded(weight), keep), grid
    wanted = gptq_target(layer, stats, factored)
    target = (
        _masked(wanted, keep)
        if layer.mask is None or keep is None
        else masked_least_squares(weight, wanted, factored, keep)
    )
    grid = fit(target, factored.diagonal)
    kept = None if keep is None else keep.T.contiguous()  # (in, out)

    def project(column_target: Tensor, rows: slice, column: int) -> Tensor:
        found = grid.nearest(column_target, rows, column)
        return found if kept is None else torch.where(kept[column, rows], found, 0.0)

    quantised, cost = column_sweep(target, factored, project)
    plain = _masked(grid.rounded(target), keep)
    # clipping can make feedback blow up, to NaN where numbers are huge
    better = factored.covers(cost, target - plain)
    return torch.where(better.unsqueeze(1), quantised, plain), grid


def gptq_target(layer: Layer, stats: Mapping[str, Statistic], factored: Factor) -> Tensor:
    """What a layer should come near to, whatever steps have made of it so far: the weight that it
    was given, and what makes up for what is missing in its output: (out, in).
    """
    source = layer.weight if layer.original_weight is None else layer.original_weight
    return source + drift(source, stats, factored) if "drift" in stats else source


def drift(weight: Tensor, stats: Mapping[str, Statistic], factored: Factor) -> Tensor:
    """What to add to a weight so that on the quantised model's inputs it gives what is missing
    there: (out, in).

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
    wanted = weight @ stats["drift"].value.div(tokens)
    if "residual" in stats:
        wanted += stats["residual"].value.div(tokens)
    found = factored.solve(wanted)
    explained = (found * wanted).sum(1)  # (out,)
    missing = stats["missing"].value / stats["missing_tokens"].value
    by_chance = missing * (weight.shape[1] / tokens)
    # as far as a sample of normal numbers tells
    most = missing * (1 + 3 * (2 / stats["missing_tokens"].value).sqrt())
    share = (1 - by_chance / explained).clamp_(0, 1) * (most / explained).clamp_(max=1)  # (out,)
    found *= share.mul_(min(tokens / (ENOUGH * weight.shape[1]), 1.0)).unsqueeze(1)
    return torch.where(found.isfinite().all(1, keepdim=True), found, 0.0)


def _factor(stats: Mapping[str, Statistic]) -> Factor | None:
    found = factorize_hessian(stats["hessian"].value, stats["tokens"].value.item())
    if found is None:
        warnings.warn(
            "its calibration statistics are not finite or singular: rounded to nearest",
            stacklevel=3,
        )
    return found


def _masked(weight: Tensor, keep: Tensor | None) -> Tensor:
    return weight if keep is None else torch.where(keep, weight, 0.0)
