"""The order in which the rows of a weight are decided: all side by side, or in groups of which each
makes up for the errors of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bitpress.numerics.output_hessian import RowFactor, count_row_groups
from bitpress.runtime.lanes import offered_lanes

# Rows decided together: a few columns of so many rows stay in a core's cache.
ROW_TILE = 2048

# Rows whose errors are held while they make up for each other's, a multiple of every block of them.
ROWS_TOGETHER = 8192

# On a GPU more are decided together, as each launch costs the same for any number of them: so many
# weights. A sweep holds four numbers for each, 2 GiB in all.
WEIGHTS_TOGETHER_ON_GPU = 1 << 27

# (targets (rows, in), the rows) -> what they become (rows, in)
Decide = Callable[[Tensor, slice], Tensor]


def decide_rows(target: Tensor, row_factor: RowFactor | None, decide: Decide) -> Tensor:
    """What a weight becomes, whose rows are decided a few at a time.

    Args:
        target: (out, in) float32, what the weight should come near to.
        row_factor: how rows make up for each other's errors; None: they do not.
        decide: given the targets (rows, in) of some rows, moved by the errors of rows before them,
            and which rows they are, returns what they become. The rows are a slice, with a step
            where there is a `row_factor`.

    Returns:
        (out, in) float32.
    """
    if row_factor is None:
        return compute_rows(target, lambda rows: decide(target[rows], rows))

    def decide_coupled(rows: slice) -> Tensor:
        return _decide_coupled(target, row_factor, decide, rows)

    return compute_rows(target, decide_coupled, _rows_together(target, ROWS_TOGETHER))


def compute_rows(
    like: Tensor, compute: Callable[[slice], Tensor], num_rows: int | None = None
) -> Tensor:
    """A matrix whose rows are computed a few at a time: side by side where lanes are offered, and
    the same for any number of these.

    Args:
        like: (out, in), of the same shape, dtype and device.
        compute: gives some of its rows (rows, in).
        num_rows: that are computed together; None: `ROW_TILE`, more on a GPU.
    """
    step = num_rows or _rows_together(like, ROW_TILE)
    whole = torch.empty_like(like)
    tiles = [slice(i, min(i + step, len(like))) for i in range(0, len(like), step)]
    computed = offered_lanes().map(compute, tiles)
    for rows in tiles:
        whole[rows] = next(computed)
    return whole


def _rows_together(target: Tensor, on_cpu: int) -> int:
    """How many rows of a weight (out, in) are decided together, at least as many as on a CPU."""
    if target.device.type == "cpu":
        return on_cpu
    return on_cpu * max(WEIGHTS_TOGETHER_ON_GPU // target.shape[1] // on_cpu, 1)


def count_sweeps(num_rows: int, gradient_tokens: int) -> int:
    """How many parts of so many rows `decide_rows` decides one after the other on a CPU.

    Args:
        gradient_tokens: that a `row_factor` is known from; 0 where there is none.
    """
    if gradient_tokens:
        num_groups = min(count_row_groups(gradient_tokens), num_rows)
        return num_groups * math.ceil(num_rows / ROWS_TOGETHER)
    return math.ceil(num_rows / ROW_TILE)


def _decide_coupled(target: Tensor, row_factor: RowFactor, decide: Decide, tile: slice) -> Tensor:
    """What some rows of a weight become, group after group: (rows, in).

    Args:
        target: (out, in), of all rows.
        tile: which rows, from the first of a block on.
    """
    decided = torch.empty_like(target[tile])
    blocks = slice(tile.start // row_factor.block, -(-tile.stop // row_factor.block))
    feedback = _RowFeedback(row_factor, blocks, target.shape[1])
    for group in range(min(row_factor.num_groups, len(decided))):
        rows = slice(tile.start + group, tile.stop, row_factor.num_groups)
        own_target = target[rows]
        own = decide(own_target - feedback.shift(group, len(own_target)), rows)
        decided[group :: row_factor.num_groups] = own
        feedback.add(group, own - own_target)
    return decided


class _RowFeedback:
    """The errors of the rows of some blocks, while group after group of them is decided.

    Args:
        blocks: which blocks.
        width: columns of the weight.
    """

    def __init__(self, factor: RowFactor, blocks: slice, width: int) -> None:
        self._coupling = factor.coupling[blocks]
        self._errors = self._coupling.new_zeros(*self._coupling.shape[:2], width)
        self._step = factor.block // factor.num_groups

    def shift(self, group: int, num_rows: int) -> Tensor:
        """What the targets of a group lose for the errors so far: (rows, in)."""
        first = group * self._step
        rows = slice(first, first + self._step)
        shift = self._coupling[:, rows, :first] @ self._errors[:, :first]  # (blocks, step, in)
        return shift.flatten(0, 1)[:num_rows]

    def add(self, group: int, error: Tensor) -> None:
        """Take the errors (rows, in) of a group."""
        blocks, _, width = self._errors.shape
        padded = error.new_zeros(blocks * self._step, width)
        padded[: len(error)] = error
        rows = slice(group * self._step, (group + 1) * self._step)
        self._errors[:, rows] = padded.view(blocks, self._step, width)
