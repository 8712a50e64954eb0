"""How many numbers a calibrated run of a plan holds: of blocks, of solutions, and for gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bitpress.numerics.gptq import has_few_outputs
from bitpress.numerics.rows import LOOP_ROWS
from bitpress.planning.layout import Shard, Stack
from bitpress.planning.plan import Plan
from bitpress.schemes import stored_layout

# Numbers for each of a batch's tokens that are kept for gradients: for each channel of the widest
# input, and for each of the hidden states.
WIDE_GRADIENTS, HIDDEN_GRADIENTS = 6, 16

# Numbers that are observed of the gradients of a row's outputs.
GRADIENT_ROW_NUMBERS = 512

# Numbers that are made of a row's outputs while the errors of these are observed: of an eighth of
# the tokens of which statistics are taken together.
OBSERVED_ROW_NUMBERS = 512


def num_blocks_held(plan: Plan) -> int:
    """Blocks that are there at a time: the source's too where it is run."""
    return 2 if plan.needs_reference else 1


def _block_shards(plan: Plan) -> list[Shard]:
    return [shard for shard in plan.shards if shard.block is not None]


def count_block(plan: Plan, *, by_layer: bool = False) -> int:
    """Numbers of the largest block, or, where it is brought layer by layer, of what is there of it
    at a time.
    """
    shards = _block_shards(plan)
    if not by_layer:
        return max(sum(entry.numel for entry in shard.entries) for shard in shards)
    vectors = (
        sum(entry.numel for entry in shard.copies if len(entry.shape) == 1) for shard in shards
    )
    return count_brought(plan) + max(vectors)


def count_brought(plan: Plan) -> int:
    """Numbers of the largest layer group, or of the largest matrix that no group has."""
    shards = _block_shards(plan)
    groups = (math.prod(stack.shape) for shard in shards for stack in shard.stacks)
    # experts in one tensor are brought one by one
    matrices = (
        math.prod(entry.shape[-2:])
        for shard in shards
        for entry in shard.copies
        if len(entry.shape) > 1
    )
    return max(*groups, *matrices, 0)


def count_kept(plan: Plan, batch_tokens: int, by_layer: bool) -> int:
    """Numbers that a batch leaves in a block on the way to gradients, and that are observed of
    these.
    """
    width = plan.width
    observed_rows = max if by_layer else sum
    num_rows = max(
        observed_rows([0, *(stack.shape[0] for stack in shard.stacks if stack.calibrated)])
        for shard in _block_shards(plan)
    )
    kept = batch_tokens * (WIDE_GRADIENTS * width + HIDDEN_GRADIENTS * plan.hidden_size)
    return kept + num_rows * GRADIENT_ROW_NUMBERS


def count_head(plan: Plan) -> int:
    """Numbers of a model's head."""
    outside = [entry for shard in plan.shards if shard.block is None for entry in shard.entries]
    matrices = [entry for entry in outside if len(entry.shape) == 2]
    # Without a head of its own, a model has that of its embeddings.
    heads = [entry.numel for entry in matrices if "lm_head" in entry.name]
    return max(heads or [entry.numel for entry in matrices], default=0)


def count_fitted_head(plan: Plan) -> int:
    """Numbers that fitting the head to data takes: its weight, as the model has it and as it is
    observed, and the solution of a row tile; 0 where it is not fitted.
    """
    heads = [stack for shard in plan.shards if shard.has_fitted_head for stack in shard.stacks]
    held = 0
    for stack in heads:
        rows, width = stack.shape
        observing = 2 * rows * width + rows * OBSERVED_ROW_NUMBERS
        tiles = stored_layout.row_tiles(stack.shape, stack.steps, stored_layout.FITTED_TILE_WEIGHTS)
        # beside a tile, what is stored of all of them
        solving = max(count_solution(last - first, width, 1) for first, last in tiles)
        held = max(held, observing, solving + rows * width)
    return held


def count_gradients(plan: Plan, tokens: int) -> int:
    """Numbers of the hidden states before and after every block, and of what is observed of all
    gradients.
    """
    num_blocks = sum(shard.block is not None for shard in plan.shards)
    statistics = sum(
        stack.shape[0] * GRADIENT_ROW_NUMBERS for stack in plan.block_stacks if stack.calibrated
    )
    return (num_blocks + 1) * tokens * plan.hidden_size + statistics


def count_largest_solution(stacks: Iterable[Stack]) -> int:
    """Numbers of the statistics and the solution of the stack that has most of them."""
    solutions = (
        count_solution(*stack.shape, sum(step.calibrated for step in stack.steps))
        for stack in stacks
    )
    return max(solutions, default=0)


def count_expert(stacks: Iterable[Stack]) -> int:
    """Numbers of one more expert that is solved with others: of the stack that has most of them its
    solution, and its columns and factor in the batch.
    """
    stacks = list(stacks)
    batched = (4 * rows * width + width**2 for rows, width in (stack.shape for stack in stacks))
    return count_largest_solution(stacks) + max(batched, default=0)


def count_solution(rows: int, width: int, steps: int) -> int:
    """Numbers of the statistics and the solution of a stack, of which so many steps look at
    data.
    """
    # a tile of rows is swept in columns of its own
    swept = 2 * min(rows, LOOP_ROWS) * width
    observed = steps * count_moments(rows, width)
    return observed + 3 * width * width + 6 * max(steps, 1) * rows * width + swept


def count_moments(rows: int, width: int) -> int:
    """Numbers of the second moments of a stack's inputs, and of those with their drift where the
    outputs are not few.
    """
    return (1 if has_few_outputs(rows, width) else 2) * width * width
