"""Rounding with error feedback on calibration statistics: what every calibrated scheme observes,
and how it is used.

Letters: x̃ is a layer's input as the already quantized layers before it make it, x the same token's
in the float model.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from bitpress.numerics.columns import column_sweep
from bitpress.numerics.exact import scalar_like
from bitpress.numerics.gram import TallMatrix, cross, gram, product_dtype, project
from bitpress.numerics.hessian import Factor, factorize_hessian
from bitpress.numerics.least_squares import masked_least_squares
from bitpress.numerics.output_hessian import (
    RowFactor,
    damped_output_hessian,
    factorize_output_hessian,
)
from bitpress.numerics.rounding_rule import RuledGrid
from bitpress.numerics.rows import compute_coupled_rows, compute_rows, decide_rows
from bitpress.numerics.scale_refit import DampedHessian, ScaledGrid, refit_scales
from bitpress.numerics.wavefront import Swept, sweep_waves
from bitpress.runtime.batching import read_number
from bitpress.schemes.values import Layer, Statistic

# The error of a layer's output is measured on every eighth token: enough to know its mean square,
# at an eighth of the products.
SAMPLE_STRIDE = 8

# With this many tokens for each input channel a correction is believed in full; with fewer it is
# shrunk in proportion.
TOKENS_PER_CHANNEL = 16

# A correction that would be shrunk to less than this share of it gains nothing: SmolLM2-135M loses
# as much without it, or less.
LEAST_SHARE = 0.1

# A correction nearly as large as the row that it corrects is not believed: in a model whose
# outputs are hardly sensitive to a layer, it may be hundreds of times the weight.
MAX_CORRECTION = 0.7

# Such a row is corrected on a Hessian damped further, by so many times the mean of its diagonal,
# one after the other: most of the correction lies in directions that inputs hardly have, and makes
# up for next to nothing.
CORRECTION_DAMPINGS = (0.01, 0.1)

# Feedback has blown up in a row that costs so many times as much as rounded to nearest.
BLOWN_UP = 2


class Grid(Protocol):
    """The numbers a weight may become: scales and zero points already chosen."""

    def nearest(self, target: Tensor, rows: slice, column: int) -> Tensor:
        """The representable numbers nearest to targets (rows,) of one column."""
        ...

    def rounded(self, weight: Tensor, rows: slice = slice(None)) -> Tensor:
        """The representable numbers nearest to all columns of some rows (rows, in)."""
        ...


AnyGrid = TypeVar("AnyGrid", bound=Grid)

# From a weight (out, in) and what an error costs in each column (in,) to the grid for it.
Fit = Callable[[Tensor, Tensor | None], AnyGrid]


def gptq_statistics(
    inputs: Tensor, weight: Tensor, reference: Tensor | None = None, residual: Tensor | None = None
) -> dict[str, Statistic]:
    """The sums over one batch that `gptq_quantize` needs; call it from `observe`.

    Args:
        inputs: (tokens, in) floating, x̃.
        weight: (out, in) float32, W.
        reference: (tokens, in) floating, x; None where the float model was not run.
        residual: (tokens, out) floating, r: what the residual stream lacks before this layer's
            output is added to it; None where the output is not added to it.

    Returns:
        Statistics by name, all sums in float32: "hessian" (in, in), Σ x̃ x̃ᵀ, and "tokens", their
        number. With a reference, of what the output lacks, e = W (x - x̃) + r, also
        "cross_moment" (out, in), Σ e x̃ᵀ, or what makes it where `has_few_outputs` says no: "drift"
        (in, in), Σ (x - x̃) x̃ᵀ, and "residual" (out, in), Σ r x̃ᵀ; "drift_tokens"; and of these
        tokens, or of a sample of them, "missing" (out,), Σ e², and "missing_tokens".
    """
    dtype = product_dtype(inputs)
    x = inputs.to(dtype)  # (tokens, in)
    tall = TallMatrix.of(x)
    sums = {"hessian": gram(tall), "tokens": torch.tensor(float(len(x)))}
    if reference is not None:
        # In 16 bits the difference of two numbers is exact while one is at most twice the other,
        # and rounded to 2**-9 of itself otherwise, in bfloat16: less than 8-bit codes lose.
        drift = reference.to(dtype) - x  # (tokens, in)
        projects = has_few_outputs(*weight.shape)
        # a mean square of samples need not be known better
        sampled = slice(None, None, 1 if projects else SAMPLE_STRIDE)
        output_error = project(drift[sampled], weight)  # (tokens or fewer, out)
        if residual is not None:
            output_error += residual[sampled]
        if projects:
            sums["cross_moment"] = cross(output_error.to(dtype), tall)
        else:
            sums["drift"] = cross(drift, tall)
            if residual is not None:
                sums["residual"] = cross(residual.to(dtype), tall)
        sums["drift_tokens"] = sums["tokens"]
        sums["missing"] = output_error.square().sum(0)
        sums["missing_tokens"] = torch.tensor(float(len(output_error)))

    has_rows = ("cross_moment", "residual", "missing")
    return {name: Statistic(value, "sum", rows=name in has_rows) for name, value in sums.items()}


def has_few_outputs(num_rows: int, width: int) -> bool:
    """Whether the drift of a layer's inputs is multiplied with its weight (out, in) token by token.

    That takes 2 · out · in FLOPs of a token, and then 2 · out · in for the sum with the inputs;
    2 · in² for the sum alone, whose product with the weight is taken later.
    """
    return 2 * num_rows <= width


def gptq_quantize(
    layer: Layer, stats: Mapping[str, Statistic], fit: Fit[AnyGrid]
) -> tuple[Tensor, AnyGrid]:
    """A layer's weight rounded column by column so that (w - q) x̃ is small.

    Without statistics (the layer never saw a token, or the plan asks for shapes) every weight is
    rounded to nearest, as is every row on which the feedback does worse than that; where the
    statistics cannot be used, with a warning. Zeros stay zero. With statistics of the gradients of
    the outputs, rows make up for each other's errors too, so that a single one may do worse.

    Args:
        layer: its weight (out, in), and its mask if it has one.
        stats: what `gptq_statistics` returned, and `output_statistics`, merged over batches.
        fit: chooses the grid, given a weight (out, in) and what an error costs in each column
            (in,); None where that is not known.

    Returns:
        The rounded weight (out, in) float32, and the grid it was rounded on.
    """
    weight, mask = layer.weight, layer.mask
    if not read_number(weight.all()):
        mask = weight != 0 if mask is None else mask & (weight != 0)

    factor = _factorize(stats) if "hessian" in stats else None
    if factor is None:
        grid = fit(weight, None)
        return _apply_mask(grid.rounded(weight), mask), grid

    # Under a mask, the best weight that has it is what rounding starts from, not the dense one.
    target = gptq_target(layer, stats, factor)
    if layer.mask is None or mask is None:
        target = _apply_mask(target, mask)
    else:
        output_hessian = damped_output_hessian(stats)
        target = masked_least_squares(weight, target, factor, mask, output_hessian)
    grid = fit(target, factor.diagonal)
    moment, tokens = stats["hessian"].value, max(read_number(stats["tokens"].value), 1.0)
    hessian = DampedHessian(moment, factor.diagonal * tokens - moment.diagonal())
    rounding = _RowRounding(factor, hessian, grid, mask)
    rounded = compute_coupled_rows(
        target,
        factorize_output_hessian(stats),
        lambda rows, own: rounding.round_rows(target[rows], rows, own),
        has_rule=isinstance(grid, RuledGrid),
    )
    return rounded, grid


class _RowRounding:
    """Rounds rows with error feedback, and fits their scales to that."""

    def __init__(
        self, factor: Factor, hessian: DampedHessian, grid: Grid, mask: Tensor | None
    ) -> None:
        self._factor, self._hessian, self._grid, self._mask = factor, hessian, grid, mask
        self._mask_of_column = None if mask is None else mask.T.contiguous()  # (in, out)

    def round_rows(
        self, target: Tensor, rows: slice, row_factor: RowFactor | None = None
    ) -> Tensor:
        """What targets (rows, in) become: representable numbers.

        Args:
            target: (rows, in) float32.
            rows: which rows of the grid they are.
            row_factor: of these rows; None: they do not make up for each other's errors.
        """
        sweep = functools.partial(self._sweep, target, rows, row_factor)
        swept = sweep()
        if isinstance(self._grid, ScaledGrid) and self._grid.refits:
            block = 1 if row_factor is None else row_factor.block
            swept = self._refit(self._grid, swept, rows, block, sweep)

        # Clipping can make the feedback blow up, to NaN where numbers are huge: such rows are
        # rounded to nearest.
        mask = None if self._mask is None else self._mask[rows]
        nearest = _apply_mask(self._grid.rounded(swept.target, rows), mask)
        error = swept.target - nearest
        if row_factor is None:
            is_swept = self._factor.covers(swept.cost, error)  # (rows,)
            return torch.where(is_swept.unsqueeze(1), swept.numbers, nearest)

        # Rows that others have made up for are left as they are, unless they cost far more: then
        # the rows are decided anew, group after group.
        if read_number(self._factor.covers(swept.cost / BLOWN_UP, error).all()):
            return swept.numbers

        def round_group(own_target: Tensor, own: slice) -> Tensor:
            return self.round_rows(own_target, _within(rows, own))

        return decide_rows(target, row_factor, round_group)

    def _sweep(self, target: Tensor, rows: slice, row_factor: RowFactor | None) -> Swept:
        if isinstance(self._grid, RuledGrid):
            mask = None if self._mask_of_column is None else self._mask_of_column.T
            rule = attrs.evolve(self._grid.rounding_rule, mask=mask).of_rows(rows)
            return sweep_waves(target, self._factor, rule, row_factor)

        project = functools.partial(self._project, rows)
        numbers, cost = column_sweep(target, self._factor, project, row_factor=row_factor)
        moved = target if row_factor is None else row_factor.move(target, numbers)
        return Swept(numbers, cost, moved)

    def _project(self, rows: slice, column_target: Tensor, own: slice, column: int) -> Tensor:
        own_rows = _within(rows, own)
        number = self._grid.nearest(column_target, own_rows, column)
        if self._mask_of_column is None:
            return number
        return torch.where(self._mask_of_column[column, own_rows], number, 0.0)

    def _refit(
        self,
        grid: ScaledGrid,
        swept: Swept,
        rows: slice,
        block: int,
        sweep: Callable[[], Swept],
    ) -> Swept:
        """The rows swept again with scales fitted to what they have become, where those of a block
        cost less that way.
        """
        scale = grid.scale[rows].clone()
        fitted = refit_scales(swept.target, swept.numbers, self._hessian, grid, rows)
        if not read_number((fitted != scale).any()):
            return swept
        grid.scale[rows] = fitted
        again = sweep()
        gain = pad(swept.cost - again.cost, (0, -len(scale) % block)).view(-1, block).sum(1)
        is_better = (gain > 0).repeat_interleave(block)[: len(scale)]  # (rows,)
        grid.scale[rows] = torch.where(is_better.unsqueeze(1), fitted, scale)
        return Swept(
            *(
                torch.where(is_better.view(-1, *[1] * (old.ndim - 1)), new, old)
                for old, new in zip(attrs.astuple(swept), attrs.astuple(again), strict=True)
            )
        )


def gptq_target(layer: Layer, stats: Mapping[str, Statistic], factor: Factor) -> Tensor:
    """The weight that a layer should come near to, whatever earlier steps made of it.

    It is the original weight, plus what makes up for what its output lacks by now; unless so little
    of that would be believed that it gains nothing.

    Args:
        layer: its weight (out, in), and the original one.
        stats: what `gptq_statistics` returned, merged over batches.
        factor: of the statistics' Hessian.

    Returns:
        (out, in) float32.
    """
    weight = layer.weight if layer.original_weight is None else layer.original_weight
    if "drift_tokens" not in stats:
        return weight
    tokens, width = read_number(stats["drift_tokens"].value), weight.shape[1]
    if tokens < LEAST_SHARE * TOKENS_PER_CHANNEL * width:
        return weight
    return weight + drift_correction(weight, stats, factor)


def drift_correction(weight: Tensor, stats: Mapping[str, Statistic], factor: Factor) -> Tensor:
    """What to add to a weight to make up for the drift of its inputs: (out, in).

    min_V ||W x + r - V x̃||² has V = W + C H⁻¹ with C = W E[(x - x̃) x̃ᵀ] + E[r x̃ᵀ]. Without r
    this is where Zhang et al., "Qronos", arXiv 2505.11695, and Li et al., "GPTAQ", arXiv
    2504.02692, start; r is how far the residual stream has moved by then.

    C is estimated from N tokens. If what the output lacks, e, had nothing to do with x̃, a row of
    C H⁻¹ would still seem to explain E[e²] in / N of it: it is shrunk by the share that what it
    explains has beyond that. These are few of the tokens that H comes from: where it seems to
    explain more than E[e²], H is too small for them, and by Cauchy and Schwarz the best multiple of
    the row is at most E[e²] over what it seems to explain. A few tokens larger than all others can
    still mislead, and what is wrong in one layer is drift in the next: where tokens are few for the
    width the whole is shrunk. A row that it would move by more than `MAX_CORRECTION` of its norm is
    corrected on a Hessian with more damping; one that it would still move that far gets none, with
    a warning.
    """
    tokens = read_number(stats["drift_tokens"].value)
    cross_moment = _cross_moment(weight, stats) / scalar_like(weight, tokens)  # (out, in), C above
    correction = compute_rows(
        weight, lambda rows: _correct_rows(cross_moment[rows], rows, stats, factor)
    )

    largest = MAX_CORRECTION * weight.norm(dim=1)  # (out,)
    hessian, hessian_tokens = stats["hessian"].value, read_number(stats["tokens"].value)
    for damping in CORRECTION_DAMPINGS:
        is_large = correction.norm(dim=1) > largest  # (out,)
        if not read_number(is_large.any()):
            return correction
        rows = is_large.nonzero().squeeze(1)
        damped_factor = factorize_hessian(hessian, hessian_tokens, damping=damping)
        if damped_factor is not None:
            correction[rows] = _correct_rows(cross_moment[rows], rows, stats, damped_factor)
    is_large = correction.norm(dim=1) > largest
    if read_number(is_large.any()):
        warnings.warn(
            f"{int(is_large.sum())} of its {len(weight)} rows would move by more than "
            f"{MAX_CORRECTION:.0%} of their norm to make up for errors before them: they are "
            "fitted without that",
            stacklevel=3,
        )
    return torch.where(is_large.unsqueeze(1), 0.0, correction)


def _cross_moment(weight: Tensor, stats: Mapping[str, Statistic]) -> Tensor:
    """Σ e x̃ᵀ of `gptq_statistics`, (out, in)."""
    if "cross_moment" in stats:
        return stats["cross_moment"].value
    drift = stats["drift"].value
    cross_moment = compute_rows(weight, lambda rows: weight[rows] @ drift)
    if "residual" in stats:
        cross_moment += stats["residual"].value
    return cross_moment


def _correct_rows(
    cross_moment: Tensor, rows: Tensor | slice, stats: Mapping[str, Statistic], factor: Factor
) -> Tensor:
    """The correction of some rows, as far as it is believed: (rows, in).

    Args:
        cross_moment: (rows, in), C of `drift_correction`.
        rows: which of the layer's.
    """
    width, tokens = cross_moment.shape[1], read_number(stats["drift_tokens"].value)
    correction = factor.solve(cross_moment)
    explained = (correction * cross_moment).sum(1)  # (rows,)
    sample_tokens = stats["missing_tokens"].value
    missing = stats["missing"].value[rows]
    squared_error = missing / scalar_like(missing, read_number(sample_tokens))  # (rows,), E[e²]
    explained_by_chance = squared_error * (width / tokens)

    # E[e²] is known from a sample: of normal numbers its mean square lies within three standard
    # deviations of this bound.
    error_bound = squared_error * (1 + 3 * (2 / sample_tokens).sqrt())
    shrinkage = (1 - explained_by_chance / explained).clamp_(0, 1)  # (rows,)
    shrinkage = shrinkage * (error_bound / explained).clamp_(max=1)
    shrinkage.mul_(min(tokens / (TOKENS_PER_CHANNEL * width), 1.0))
    correction *= shrinkage.unsqueeze(1)
    # Numbers too large for float32 give no correction, and where there is no drift it is 0 / 0.
    return torch.where(correction.isfinite().all(1, keepdim=True), correction, 0.0)


def _factorize(stats: Mapping[str, Statistic]) -> Factor | None:
    factor = factorize_hessian(stats["hessian"].value, read_number(stats["tokens"].value))
    if factor is None:
        warnings.warn(
            "its calibration statistics are not finite or singular: rounded to nearest",
            stacklevel=3,
        )
    return factor


def _within(rows: slice, own: slice) -> slice:
    """Which rows some of given rows are."""
    chosen = range(rows.start, rows.stop, rows.step or 1)[own]
    return slice(chosen.start, chosen.stop, chosen.step)


def _apply_mask(weight: Tensor, mask: Tensor | None) -> Tensor:
    return weight if mask is None else torch.where(mask, weight, 0.0)
