"""The sweep over columns in Triton: a kernel decides a block of columns where torch would start
several kernels for each of them.

What becomes of a target is the same to the bit as with the grids' own functions, and so is the
feedback within a block as the loop of `columns` computes it with leaves of `BLOCK` columns. It has
run in Triton's interpreter only, and was compiled for NVIDIA GPUs: not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitpress.numerics.fused_rounding import format_arguments, round_to_format
from bitpress.numerics.rounding_rule import NumberFormat, RoundingRule
from bitpress.numerics.swept_columns import SweptColumns

# Columns that one launch decides; between blocks the feedback is a matrix product.
BLOCK = 128

# Rows of one program. Its targets, (BLOCK, ROWS) numbers, are held in registers.
ROWS = 16


def decide_block(columns: SweptColumns, unit: Tensor, rule: RoundingRule, positions: slice) -> None:
    """Decide a block of columns, with error feedback among them.

    Args:
        columns: of which `target`, `projected` and `error` are written at the positions.
        unit: (in, in) float32, U of the factor.
        rule: of the same rows.
        positions: at most `BLOCK` of the factor's order.
    """
    num_rows = columns.target.shape[1]
    num_programs = triton.cdiv(num_rows, ROWS)
    with torch.cuda.device_of(columns.target):  # type: ignore[no-untyped-call]
        _decide[(num_programs,)](
            columns.original,
            columns.target,
            columns.projected,
            columns.error,
            unit,
            columns.order,
            rule.scale,
            rule.zero,
            rule.mask,
            num_rows,
            positions.start,
            positions.stop - positions.start,
            unit.stride(0),
            unit.stride(1),
            rule.group,
            *rule.scale.stride(),
            *((0, 0) if rule.zero is None else rule.zero.stride()),
            *((0, 0) if rule.mask is None else rule.mask.stride()),
            *format_arguments(rule.numbers),
            ROWS=ROWS,
            BLOCK=BLOCK,
            # products and sums round each by itself, but for the one that is fused in torch too
            enable_fp_fusion=False,
        )


def is_exact_on(device: torch.device) -> bool:
    """Whether a block of a small weight becomes what torch's functions make of it on a CPU."""
    draw = torch.Generator().manual_seed(0)
    unit = torch.randn(BLOCK, BLOCK, generator=draw).mul_(0.1)
    weight = torch.randn(BLOCK, 2 * ROWS, generator=draw)  # (in, rows)
    scale = torch.rand(2 * ROWS, 1, generator=draw).add_(0.1)
    target, expected = weight.clone(), torch.empty_like(weight)
    for k in range(BLOCK):
        expected[k] = (target[k] / scale[:, 0]).round_().clamp_(-8, 7).mul_(scale[:, 0])
        target[k + 1 :].addcmul_(unit[k, k + 1 :].unsqueeze(1), weight[k] - expected[k])

    columns = SweptColumns.undecided(weight.T.to(device), torch.arange(BLOCK, device=device))
    rule = RoundingRule(NumberFormat(-8, 7), scale.to(device), BLOCK)
    decide_block(columns, unit.to(device), rule, slice(0, BLOCK))
    return torch.equal(columns.projected.cpu(), expected)


# What differs from launch to launch is not compiled in: there are four kernels, with zero points
# and masks or without.
_NUMBERS = [
    *("num_rows", "start", "num_columns", "unit_row", "unit_column", "group"),
    *("scale_row", "scale_group", "zero_row", "zero_group", "mask_row", "mask_column"),
    *("min_power", "max_power", "to_large"),
]
_TENSORS = ["original", "target", "projected", "error", "unit", "order", "scale", "zero", "mask"]


# A kernel takes tensors, strides and numbers one by one; formatted, each would be a line.
# fmt: off
@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_TENSORS)
def _decide(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    original, target, projected, error, unit, order, scale, zero, mask,
    num_rows, start, num_columns, unit_row, unit_column, group,
    scale_row, scale_group, zero_row, zero_group, mask_row, mask_column,
    lowest, highest, min_power, max_power, to_large,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    is_row, is_column = rows < num_rows, columns < num_columns
    first = start.to(tl.int64)
    places = (first + columns)[:, None] * num_rows + rows[None, :]
    is_inside = is_column[:, None] & is_row[None, :]
    targets = tl.load(target + places, mask=is_inside, other=0.0)  # (BLOCK, ROWS)

    # what the next columns need is loaded while one is decided
    for k in tl.range(0, BLOCK, num_stages=3):
        is_here = is_row & (k < num_columns)
        place = (first + k) * num_rows + rows
        column = tl.load(order + first + k, k < num_columns, other=0)
        own_group = (column.to(tl.int32) // group).to(tl.int64)
        own_scale = tl.load(scale + rows * scale_row + own_group * scale_group, is_here, other=1.0)
        weight = tl.load(original + place, is_here, other=0.0)
        is_later = columns > k
        feedback = tl.load(
            unit + (first + k) * unit_row + (first + columns) * unit_column,
            mask=is_later & is_column,
            other=0.0,
        )

        # As whole numbers, of which all but one are 0, bits are added up as they are.
        bits = tl.where((columns == k)[:, None], targets.to(tl.int32, bitcast=True), 0)
        steps = tl.div_rn(tl.sum(bits, axis=0).to(tl.float32, bitcast=True), own_scale)

        low, high = lowest, highest
        if zero is not None:
            own_zero = tl.load(zero + rows * zero_row + own_group * zero_group, is_here, other=0.0)
            low, high = lowest - own_zero, highest - own_zero
        number = round_to_format(steps, low, high, min_power, max_power, to_large) * own_scale
        if mask is not None:
            is_kept = tl.load(mask + rows * mask_row + column * mask_column, is_here, other=0)
            number = tl.where(is_kept != 0, number, 0.0)
        tl.store(projected + place, number, is_here)
        difference = weight - number
        tl.store(error + place, difference, is_here)
        moved = tl.fma(feedback[:, None], difference[None, :], targets)
        targets = tl.where(is_later[:, None], moved, targets)

    tl.store(target + places, targets, mask=is_inside)
# fmt: on
