"""The order in which the rows of a weight are decided: all side by side, or in groups of which each
makes up for the errors of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from bitpress.numerics import kernel_trial
from bitpress.numerics.block_sweep import BLOCK
from bitpress.numerics.output_hessian import RowFactor, count_row_groups
from bitpress.runtime.lanes import offered_lanes

# Rows computed together, a multiple of every block of a row factor: enough for products to be fast,
# and few enough that there are some for each lane.
ROW_TILE = 512

# Rows that a loop over columns decides together on a CPU: calls of torch cost little beside so many
# numbers, and a few columns of them stay in a core's cache.
LOOP_ROWS = 2048

# Layers that a CPU solves together have at most so many rows: with more, calls of torch take no
# part of the time that is worth a batch.
ROWS_PER_BATCH = 4096

# On a GPU more are decided together, as each launch costs the same for any number of them: so many
# weights. A sweep holds five numbers for each, 2.5 GiB in all.
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

    def compute(rows: slice, own: RowFactor | None) -> Tensor:
        if own is None:
            return decide(target[rows], rows)
        return _decide_coupled(target[rows], own, decide, rows)

    return compute_coupled_rows(target, row_factor, compute)


def compute_coupled_rows(
    like: Tensor,
    row_factor: RowFactor | None,
    compute: Callable[[slice, RowFactor | None], Tensor],
    *,
    has_rule: bool = False,
) -> Tensor:
    """A matrix whose rows are computed a few at a time, as `compute_rows` does it, and whole blocks
    of a row factor together.

    Args:
        compute: gives some of its rows (rows, in), which have that factor.
        has_rule: whether compiled kernels can decide columns, where there are any.
    """
    return compute_rows(
        like,
        lambda rows: compute(rows, row_factor and row_factor.of_rows(rows)),
        rows_decided_together(like, has_rule=has_rule),
    )


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
    step = num_rows or _rows_together(like)
    whole = torch.empty_like(like)
    tiles = [slice(i, min(i + step, len(like))) for i in range(0, len(like), step)]
    computed = offered_lanes().map(compute, tiles)
    for rows in tiles:
        whole[rows] = next(computed)
    return whole


def rows_decided_together(target: Tensor, *, has_rule: bool) -> int:
    """How many rows of a weight (out, in) are decided together.

    Args:
        has_rule: whether compiled kernels can decide columns, where there are any.
    """
    is_on_cpu = target.device.type == "cpu"
    if is_on_cpu and not (has_rule and kernel_trial.can_compile(target.device)):
        return LOOP_ROWS
    return _rows_together(target)


def _rows_together(target: Tensor) -> int:
    if target.device.type == "cpu":
        return ROW_TILE
    return ROW_TILE * max(WEIGHTS_TOGETHER_ON_GPU // target.shape[1] // ROW_TILE, 1)


def count_columns(num_rows: int, width: int, gradient_tokens: int, has_rule: bool) -> int:
    """How many columns of so many rows a CPU decides one after the other, whatever the rows of
    each.

    Args:
        gradient_tokens: that a `row_factor` is known from; 0 where there is none.
        has_rule: whether groups of rows follow each other, or wait for each other.
    """
    num_groups = count_row_groups(gradient_tokens) if gradient_tokens else 1
    num_columns = min(num_groups, num_rows) * width
    if has_rule:
        num_columns = (math.ceil(width / BLOCK) + num_groups - 1) * BLOCK
    return num_columns * math.ceil(num_rows / LOOP_ROWS)


def _decide_coupled(target: Tensor, row_factor: RowFactor, decide: Decide, tile: slice) -> Tensor:
    """What some rows of a weight become, group after group: (rows, in).

    Args:
        target: (rows, in).
        row_factor: of these rows.
        tile: which rows they are.
    """
    decided = torch.empty_like(target)
    feedback = _RowFeedback(row_factor, target.shape[1])
    for group in range(min(row_factor.num_groups, len(target))):
        rows = slice(group, len(target), row_factor.num_groups)
        own = decide(
            target[rows] - feedback.shift(group, len(target[rows])),
            slice(tile.start + group, tile.stop, row_factor.num_groups),
        )
        decided[rows] = own
        feedback.add(group, own - target[rows])
    return decided


class _RowFeedback:
    """The errors of some rows, while group after group of them is decided.

    Args:
        factor: of the rows.
        width: columns of the weight.
    """

    def __init__(self, factor: RowFactor, width: int) -> None:
        self._coupling = factor.coupling
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
