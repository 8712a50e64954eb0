"""Scales fitted to codes in Triton: for each group a product and a kernel, where torch would start
25 kernels. It has run in Triton's interpreter only: not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from attrs import frozen
from torch import Tensor

from bitpress.numerics.fused_rounding import format_arguments, round_to_format
from bitpress.numerics.rounding_rule import RoundingRule
from bitpress.runtime.batching import batched, stack

if TYPE_CHECKING:
    from bitpress.numerics.scale_refit import DampedHessian

# Rows of one program, and later columns whose residual it brings up to date.
ROWS, BLOCK = 16, 128


@frozen(eq=False)
class _Refit:
    """Arguments of `refit_groups`."""

    units: Tensor
    residual: Tensor
    hessian: DampedHessian
    rule: RoundingRule

    @property
    def form(self) -> Hashable:
        """What fits have in common that are made together."""
        rule, units = self.rule, self.units
        return units.shape, units.device, rule.stored_scales, rule.divisor is None


def refit_groups(
    units: Tensor, residual: Tensor, hessian: DampedHessian, rule: RoundingRule
) -> Tensor:
    """Scales with which the codes of some rows cost less, as `refit_scales` finds them; together
    with those of other layers that are solved side by side, and are as large.

    Args:
        units: (rows, groups, group) float32, what scales are multiplied with.
        residual: (rows, in) float32, half the negative gradient of the cost; written to.
        hessian: H.
        rule: of the same rows, with a format for scales.

    Returns:
        (rows, groups) float32.
    """
    refit = _Refit(units, residual, hessian, rule)
    return batched(_refit_layers, refit, refit.form)


def _refit_layers(refits: Sequence[_Refit]) -> Sequence[Tensor]:
    """Scales of layers that have the same form, fitted together."""
    first = refits[0].rule
    assert first.stored_scales is not None
    num_rows, num_groups, size = refits[0].units.shape
    width = num_groups * size
    units = stack([refit.units.reshape(num_rows, width).contiguous() for refit in refits])
    residual = stack([refit.residual for refit in refits])  # (layers, rows, in)
    moment = stack([refit.hessian.moment for refit in refits])
    damping = stack([refit.hessian.damping for refit in refits])
    scale = stack([refit.rule.scale for refit in refits])
    divisors = [refit.rule.divisor for refit in refits if refit.rule.divisor is not None]
    divisor = stack(divisors) if divisors else None
    fitted = torch.empty_like(scale, memory_format=torch.contiguous_format)
    for start in range(0, width, size):
        own = slice(start, start + size)
        product = units[:, :, own] @ moment[:, own, start:]  # (layers, rows, in - start)
        num_chunks = max(triton.cdiv(width - own.stop, BLOCK), 1)
        with torch.cuda.device_of(residual):  # type: ignore[no-untyped-call]
            _refit[(triton.cdiv(num_rows, ROWS), num_chunks, len(refits))](
                units,
                residual,
                product,
                damping,
                scale,
                divisor,
                fitted,
                num_rows,
                width,
                start,
                size,
                *scale.stride()[1:],
                *format_arguments(first.stored_scales),
                ROWS=ROWS,
                GROUP=triton.next_power_of_2(size),
                BLOCK=BLOCK,
                enable_fp_fusion=False,
            )
    return fitted.unbind()


_NUMBERS = [
    *("num_rows", "width", "start", "size", "scale_row", "scale_group"),
    *("min_power", "max_power", "to_large"),
]
_TENSORS = ["units", "residual", "product", "damping", "scale", "divisor", "fitted"]


# A kernel takes tensors, strides and numbers one by one; formatted, each would be a line.
# fmt: off
@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_TENSORS)
def _refit(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    units, residual, product, damping, scale, divisor, fitted,
    num_rows, width, start, size, scale_row, scale_group,
    lowest, highest, min_power, max_power, to_large,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):
    layer = tl.program_id(2).to(tl.int64)
    own_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows, own = layer * num_rows + own_rows, tl.arange(0, GROUP)
    is_row = own_rows < num_rows
    is_own = is_row[:, None] & (own < size)[None, :]
    product_row = product + rows * (width - start)

    # (ROWS, GROUP), then (ROWS,)
    places = rows[:, None] * width + start + own[None, :]
    unit = tl.load(units + places, mask=is_own, other=0.0)
    added = tl.load(damping + layer * width + start + own, mask=own < size, other=0.0)
    curved = tl.load(product_row[:, None] + own[None, :], mask=is_own, other=0.0)
    curvature = tl.sum((curved + unit * added[None, :]) * unit, axis=1)
    slope = tl.sum(tl.load(residual + places, mask=is_own, other=0.0) * unit, axis=1)

    group = start // size
    before = tl.load(scale + rows * scale_row + group * scale_group, is_row, other=1.0)
    best = before + tl.where(curvature > 0, tl.div_rn(slope, curvature), 0.0)
    if divisor is None:
        best = round_to_format(best, lowest, highest, min_power, max_power, to_large)
    else:
        divided_by = tl.load(divisor + layer)
        best = round_to_format(
            best * divided_by, lowest, highest, min_power, max_power, to_large
        )
        best = tl.div_rn(best, divided_by)
    change = best - before
    is_better = change * (2 * slope - change * curvature) > 0
    change = tl.where(is_better, change, 0.0)
    if tl.program_id(1) == 0:
        num_groups = width // size
        tl.store(fitted + rows * num_groups + group, tl.where(is_better, best, before), is_row)

    # an own group's residual is not needed again
    later = size + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_later = is_row[:, None] & (later < width - start)[None, :]
    places = residual + rows[:, None] * width + start + later[None, :]
    moved = tl.load(product_row[:, None] + later[None, :], mask=is_later, other=0.0)
    left = tl.load(places, mask=is_later, other=0.0)
    tl.store(places, left - change[:, None] * moved, mask=is_later)
# fmt: on
