"""The sweep over blocks of columns compiled by Numba for a CPU: one call decides the blocks of a
wave, and other threads work meanwhile, where torch would be called a dozen times for each column.

What becomes of a target is the same to the bit as in `block_sweep`, with leaves and blocks of as
many columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba import config, njit
from torch import Tensor

from bitpress.numerics import block_sweep, fp4
from bitpress.numerics.rounding_rule import RoundingRule
from bitpress.numerics.swept_columns import SweptColumns, Wave, by_groups

# as Python they would give the same, in hours
if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")

# in 32 bits, as the numbers that they are taken from
EXPONENT_BITS = np.int32(fp4.EXPONENT_BITS)

# Columns of a block: groups of rows follow each other at this distance.
BLOCK = block_sweep.BLOCK


class BlockSweep:
    """Decides waves of blocks, as `block_sweep.BlockSweep` does."""

    def __init__(self, columns: SweptColumns, unit: Tensor, rules: Sequence[RoundingRule]) -> None:
        numbers, num_groups = rules[0].numbers, columns.num_groups
        scale = by_groups([rule.scale.T for rule in rules], num_groups, 1.0)
        zeros = [rule.zero.T for rule in rules if rule.zero is not None]
        pruned = [~rule.mask.T for rule in rules if rule.mask is not None]
        tensors = [
            *(columns.original, columns.target, columns.projected, columns.error, columns.order),
            *(block_sweep.diagonal_blocks(unit, columns.block), scale),
            by_groups(zeros, num_groups) if zeros else torch.zeros_like(scale),
            by_groups(pruned, num_groups) if pruned else torch.empty(0, 0, 0, 0, dtype=torch.bool),
        ]
        self._arrays = [tensor.contiguous().numpy() for tensor in tensors]
        bounds = (np.float32(bound) for bound in (numbers.lowest, numbers.highest))
        self._numbers = *bounds, *map(np.int32, (*numbers.powers, numbers.to_large))
        self._group = rules[0].group

    def decide(self, wave: Wave) -> None:
        """Decide the blocks of a wave, with error feedback among the columns of each."""
        _decide(*self._arrays, self._group, self._numbers, wave.number, *wave.blocks)


@njit
def _round(x: Any, zero: Any, numbers: Any) -> Any:
    """The number of a format nearest to x, as `NumberFormat.round_` gives it."""
    lowest, highest, min_power, max_power, to_large = numbers
    lowest, highest = lowest - zero, highest - zero
    # comparisons, as NaN is neither below nor above
    clipped = lowest if x < lowest else highest if x > highest else x
    power = min(max(np.float32(clipped).view(np.int32) & EXPONENT_BITS, min_power), max_power)
    # a sum of 32 bits is one of 64
    large = np.int32(power + to_large).view(np.float32)
    return np.copysign((clipped + large) - large, clipped)


# A product is added as torch does it, rounded once: this function alone may do so.
@njit(fastmath={"contract"})
def _add_product(target: Any, feedback: Any, error: Any) -> Any:
    return target + feedback * error


# A kernel takes tensors and numbers one by one; formatted, each would be a line.
# fmt: off
@njit(nogil=True, error_model="numpy")
def _decide(  # noqa: PLR0913, PLR0917
    original: Any, target: Any, projected: Any, error: Any, order: Any, unit: Any,
    scale: Any, zero: Any, pruned: Any, group: Any, numbers: Any, wave: Any, first: Any, stop: Any,
) -> None:
    _, num_groups, num_layers, num_rows = original.shape
    size = unit.shape[2]
    for block in range(first, stop):
        # the last group lies first
        place = num_groups - 1 - (wave - block)
        for layer in range(num_layers):
            for k in range(size):
                column = block * size + k
                own = column, place, layer
                own_original, own_target = original[own], target[own]
                own_projected, own_error = projected[own], error[own]
                source = order[layer, column]
                shared = source // group, place, layer
                own_scale, own_zero = scale[shared], zero[shared]
                for row in range(num_rows):
                    step = own_target[row] / own_scale[row]
                    own_projected[row] = _round(step, own_zero[row], numbers) * own_scale[row]
                if len(pruned) > 0:
                    own_pruned = pruned[source, place, layer]
                    for row in range(num_rows):
                        if own_pruned[row]:
                            own_projected[row] = 0.0
                for row in range(num_rows):
                    own_error[row] = own_original[row] - own_projected[row]
                for later in range(k + 1, size):
                    feedback = unit[block, layer, k, later]
                    later_target = target[block * size + later, place, layer]
                    for row in range(num_rows):
                        later_target[row] = _add_product(
                            later_target[row], feedback, own_error[row]
                        )
# fmt: on
