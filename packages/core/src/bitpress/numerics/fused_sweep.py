"""The sweep over blocks of columns in Triton: a kernel decides those of a wave where torch would
start several kernels for each column.

What becomes of a target is the same to the bit as in `block_sweep`, with leaves and blocks of as
many columns. It has run in Triton's interpreter only, and was compiled for NVIDIA GPUs: not
measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitpress.numerics.fused_rounding import format_arguments, round_to_format
from bitpress.numerics.rounding_rule import RoundingRule
from bitpress.numerics.swept_columns import SweptColumns, Wave
from bitpress.runtime.batching import stack

# Columns that a program decides; between blocks the feedback is a matrix product.
BLOCK = 128

# Rows of one program. Its targets, (BLOCK, ROWS) numbers, are held in registers.
ROWS = 16


class BlockSweep:
    """Decides waves of blocks, as `block_sweep.BlockSweep` does."""

    def __init__(self, columns: SweptColumns, unit: Tensor, rules: Sequence[RoundingRule]) -> None:
        self._columns, self._unit, self._rule = columns, unit, rules[0]
        self._scale = stack([rule.scale for rule in rules])  # (layers, rows, groups)
        zeros = [rule.zero for rule in rules if rule.zero is not None]
        masks = [rule.mask for rule in rules if rule.mask is not None]
        self._zero, self._mask = (
            stack(of_layers) if of_layers else None for of_layers in (zeros, masks)
        )

    def decide(self, wave: Wave) -> None:
        """Decide the blocks of a wave, with error feedback among the columns of each."""
        columns, rule, unit = self._columns, self._rule, self._unit
        scale, zero, mask = self._scale, self._zero, self._mask
        _, num_groups, num_layers, num_rows = columns.original.shape
        first, stop = wave.blocks
        with torch.cuda.device_of(columns.target):  # type: ignore[no-untyped-call]
            _decide[(triton.cdiv(num_rows, ROWS), stop - first, num_layers)](
                columns.original,
                columns.target,
                columns.projected,
                columns.error,
                unit,
                columns.order,
                scale,
                zero,
                mask,
                scale.shape[1],
                num_rows,
                num_layers,
                num_groups,
                wave.number,
                first,
                unit.shape[1],
                *unit.stride()[1:],
                rule.group,
                *scale.stride()[1:],
                *((0, 0) if zero is None else zero.stride()[1:]),
                *((0, 0) if mask is None else mask.stride()[1:]),
                *format_arguments(rule.numbers),
                ROWS=ROWS,
                BLOCK=BLOCK,
                # products and sums round each by itself, but for the one that is fused in torch too
                enable_fp_fusion=False,
            )


# What differs from launch to launch is not compiled in: there are four kernels, with zero points
# and masks or without.
_NUMBERS = [
    *("all_rows", "num_rows", "num_layers", "num_groups", "wave", "first_block", "width"),
    *("unit_row", "unit_column", "group"),
    *("scale_row", "scale_group", "zero_row", "zero_group", "mask_row", "mask_column"),
    *("min_power", "max_power", "to_large"),
]
_TENSORS = ["original", "target", "projected", "error", "unit", "order", "scale", "zero", "mask"]


# A kernel takes tensors, strides and numbers one by one; formatted, each would be a line.
# fmt: off
@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_TENSORS)
def _decide(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    original, target, projected, error, unit, order, scale, zero, mask,
    all_rows, num_rows, num_layers, num_groups, wave, first_block, width, unit_row, unit_column,
    group, scale_row, scale_group, zero_row, zero_group, mask_row, mask_column,
    lowest, highest, min_power, max_power, to_large,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):
    block, columns = first_block + tl.program_id(1), tl.arange(0, BLOCK)
    own_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows, first = own_rows * num_groups + (wave - block), block.to(tl.int64) * BLOCK
    is_row, is_column = (own_rows < num_rows) & (rows < all_rows), first + columns < width
    # layers lie one after the other
    layer = tl.program_id(2).to(tl.int64)
    rows, unit = rows + layer * all_rows, unit + layer * width * unit_row
    order += layer * tl.cdiv(width, BLOCK) * BLOCK
    # the last group lies first
    row_places = ((num_groups - 1 - wave + block) * num_layers + layer) * num_rows + own_rows
    column_size = num_groups * num_layers * num_rows
    places = (first + columns)[:, None] * column_size + row_places[None, :]  # (BLOCK, ROWS)
    targets = tl.load(target + places, mask=is_column[:, None] & is_row[None, :], other=0.0)

    # what the next columns need is loaded while one is decided
    for k in tl.range(0, BLOCK, num_stages=3):
        is_here, place = is_row & (first + k < width), (first + k) * column_size + row_places
        column, is_later = tl.load(order + first + k, first + k < width, other=0), columns > k
        own_group = (column.to(tl.int32) // group).to(tl.int64)
        own_scale = tl.load(scale + rows * scale_row + own_group * scale_group, is_here, other=1.0)
        weight = tl.load(original + place, is_here, other=0.0)
        unit_places = unit + (first + k) * unit_row + (first + columns) * unit_column
        feedback = tl.load(unit_places, mask=is_later & is_column, other=0.0)

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

    tl.store(target + places, targets, mask=is_column[:, None] & is_row[None, :])
# fmt: on
