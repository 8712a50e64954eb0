"""What each rank of a run will do, worked out from headers, and how long that may take on CPUs.

Rates are those of one core of a small virtual machine (docs/scaling.md has the figures): another
machine is faster or slower throughout, so that what is counted here says more than the time that is
made of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import field, frozen

from bitpress.numerics.gptq import has_few_outputs
from bitpress.numerics.gram import stripes
from bitpress.numerics.rows import LOOP_ROWS, count_columns
from bitpress.numerics.scale_refit import count_passes
from bitpress.planning import memory_estimate
from bitpress.planning.calibration_config import MIN_EXPERT_TOKENS, CalibrationConfig
from bitpress.planning.layout import Shard, Stack
from bitpress.planning.plan import Plan
from bitpress.planning.routing import token_shares
from bitpress.runtime.process_group import ProcessGroup
from bitpress.schemes import pipeline

# What one core does in a second.
# Bytes of the source that are read and converted.
READ_RATE = 0.25e9

# Bytes of the source that are proved, digests included.
VERIFY_RATE = 0.075e9

# Floating-point operations in products over tokens.
PRODUCT_RATE = 45e9

# Floating-point operations in factors and error feedback.
SOLVE_RATE = 25e9

# Seconds that a column takes which is decided after others, whatever its rows and its threads: a
# dozen calls of torch.
COLUMN_SECONDS = 6e-5


@frozen
class RankWork:
    """What falls to one rank.

    Attributes:
        reads: bytes of the source, before anything is proved.
        writes: bytes of weight files.
        proves: bytes of the source that are held against what was written of them.
        tokens: of calibration.
        products: floating-point operations on tokens (a product and a sum are two): forwards, and
            sums over layers' inputs.
        solutions: floating-point operations on those sums, counted as if every step that takes
            second moments fed errors forward.
        columns: that are decided one after the other.
        solutions_by_tiles: the solutions that wait for each other, by how many tiles of rows may be
            solved side by side.
        expert_solutions: those of experts, by how many of these all ranks may solve side by side.
        expert_columns: of the columns, those of experts, likewise.
    """

    reads: int
    writes: int
    proves: int
    tokens: int = 0
    products: int = 0
    solutions: int = 0
    columns: int = 0
    solutions_by_tiles: Mapping[int, int] = field(factory=dict)
    expert_solutions: Mapping[int, int] = field(factory=dict)
    expert_columns: Mapping[int, int] = field(factory=dict)


@frozen
class _Fits:
    """Operations and columns of what one rank solves, as a `RankWork` has them."""

    by_tiles: Counter[int] = field(factory=Counter)
    of_experts: Counter[int] = field(factory=Counter)
    columns: Counter[int] = field(factory=Counter)

    @property
    def num_operations(self) -> int:
        """All of them."""
        return self.by_tiles.total() + self.of_experts.total()

    @property
    def expert_columns(self) -> dict[int, int]:
        """Columns of experts, by how many of these may be solved side by side."""
        return {number: self.columns[number] for number in self.of_experts}


@frozen
class _Operations:
    """Floating-point operations of a calibrated run.

    Attributes:
        per_token: forwards and statistics.
        per_compared_token: of a token that is run through the source's weights too, beside those.
        per_gradient_token: of a token that is run backward, beside those.
        fits: what each rank solves.
    """

    per_token: float
    per_compared_token: float
    per_gradient_token: float
    fits: Sequence[_Fits]


def estimate_seconds(ranks: Sequence[RankWork], threads: int) -> float:
    """Until the last rank is done, at best; all of them wait for every solution, which the next
    layers' inputs depend on, but for those of experts. Threads that share a solution, or solve
    experts side by side, take turns at columns.
    """
    longest = max(
        rank.reads / READ_RATE + rank.proves / VERIFY_RATE + rank.products / PRODUCT_RATE
        for rank in ranks
    )
    seconds, num_ranks = longest / threads, len(ranks)
    for rank in ranks:
        for num_tiles, operations in rank.solutions_by_tiles.items():
            seconds += operations / min(threads, num_tiles) / SOLVE_RATE
        for num_experts, operations in rank.expert_solutions.items():
            seconds += operations / min(threads * num_ranks, num_experts) / SOLVE_RATE
        seconds += (rank.columns - sum(rank.expert_columns.values())) * COLUMN_SECONDS
        for num_experts, columns in rank.expert_columns.items():
            seconds += columns / min(num_ranks, num_experts) * COLUMN_SECONDS
    return seconds


def estimate_ranks(
    plan: Plan, num_ranks: int, calibration: CalibrationConfig | None = None
) -> list[RankWork]:
    """What each of so many ranks will do, as a run deals the work.

    Every block is counted once for each batch, as it is run where memory lets forwards wait inside
    it.

    Raises:
        DataError: there are too few sequences for the ranks.
    """
    process_groups = [ProcessGroup(rank, num_ranks) for rank in range(num_ranks)]
    proved_bytes = plan.source_bytes // num_ranks
    if not plan.calibrated:
        return [_data_free_work(plan, group, proved_bytes) for group in process_groups]
    calibration = calibration or CalibrationConfig()
    # One number that looks like (samples, length) takes no memory.
    ids = torch.zeros(1).expand(calibration.samples, calibration.sequence_length)
    batches = memory_estimate.split_batches(ids, num_ranks, memory_estimate.BATCH_TOKENS)
    batch_tokens = [len(batch) * calibration.sequence_length for batch in batches]
    return list(_calibrated_work(plan, process_groups, batch_tokens, proved_bytes))


def _data_free_work(plan: Plan, group: ProcessGroup, proved_bytes: int) -> RankWork:
    shards = group.partition_by_size(plan.shards, lambda shard: shard.source_bytes)
    return RankWork(
        _file_bytes_of(shards), sum(shard.header.nbytes for shard in shards), proved_bytes
    )


def _calibrated_work(
    plan: Plan,
    process_groups: Sequence[ProcessGroup],
    batch_tokens: Sequence[int],
    proved_bytes: int,
) -> Iterator[RankWork]:
    """Every rank reads every block and runs its own batches; the first rank writes, and solutions
    go round.
    """
    blocks = [shard for shard in plan.shards if shard.block is not None]
    fitted = [*blocks, *(shard for shard in plan.shards if shard.has_fitted_head)]
    outside = [shard for shard in plan.shards if shard not in fitted]

    # What runs before the blocks is read once, and so is the first block, to record how blocks are
    # called. Every block is then read to be compressed, and a head that is fitted.
    embeddings = [e for shard in outside for e in shard.copies if "lm_head" not in e.name]
    recording_bytes = sum(entry.file_bytes for entry in embeddings) + _file_bytes_of(blocks[:1])
    fitted_bytes = _file_bytes_of(fitted)

    operations = _count_operations(plan, fitted, sum(batch_tokens), len(process_groups))
    for group in process_groups:
        batches = group.partition_evenly(batch_tokens)
        tokens = sum(batch_tokens[i] for i in batches)
        compared, backward = _count_source_tokens(plan, batches, batch_tokens)

        # On the way to gradients, a block's weights are read twice more.
        shards = group.partition_by_size(outside, lambda shard: shard.source_bytes)
        num_reads = 1 + 2 * (backward > 0)
        reads = recording_bytes + fitted_bytes * num_reads + _file_bytes_of(shards)
        if group.is_rank_zero:
            reads += sum(entry.file_bytes for shard in blocks for entry in shard.copies)
            shards = [*shards, *fitted]
        products = operations.per_token * tokens + operations.per_compared_token * compared
        products += operations.per_gradient_token * backward
        fits = operations.fits[group.rank]
        yield RankWork(
            reads,
            sum(shard.header.nbytes for shard in shards),
            proved_bytes,
            tokens,
            int(products),
            fits.num_operations,
            fits.columns.total(),
            fits.by_tiles,
            fits.of_experts,
            fits.expert_columns,
        )


def _count_source_tokens(
    plan: Plan, batches: range, batch_tokens: Sequence[int]
) -> tuple[int, int]:
    """How many tokens of some batches are run through the source too, and how many backward.

    Args:
        batches: their numbers.
        batch_tokens: of all batches.
    """
    interval = memory_estimate.reference_interval(plan, sum(batch_tokens))
    compared = sum(batch_tokens[i] for i in batches if plan.needs_reference and i % interval == 0)
    backward = sum(
        batch_tokens[i]
        for i in batches
        if memory_estimate.is_gradient_batch(plan, i, interval, batch_tokens[0])
    )
    return compared, backward


def _count_operations(
    plan: Plan, shards: Sequence[Shard], tokens: int, num_ranks: int
) -> _Operations:
    """Those of blocks, and of fitting a head, which is not run."""
    per_token, per_compared_token, per_gradient_token = 0.0, 0.0, 0.0
    fits = [_Fits() for _ in range(num_ranks)]
    gradient_tokens = min(memory_estimate.gradient_tokens(plan), tokens)
    experts_per_token = plan.source.model_config.experts_per_token
    for shard in shards:
        share_of = token_shares(shard.entries, experts_per_token)
        run = shard.entries if shard.block is not None else ()
        forward = sum(2 * entry.numel * share_of(entry) for entry in run if len(entry.shape) > 1)
        per_token, per_compared_token = per_token + forward, per_compared_token + forward
        # Forward for the states before each block, forward again, and backward.
        per_gradient_token += 3 * forward

        for number, stack in enumerate(stack for stack in shard.stacks if stack.calibrated):
            width = stack.shape[1]
            share = share_of(next(iter(stack.members.values())))
            # Largest inputs, and other numbers for each channel, take next to no time.
            steps = [step for step in stack.steps if pipeline.takes_second_moments(step)]
            num_drifts = sum(map(pipeline.takes_reference, steps))
            # x xᵀ, the columns of each stripe from its first one on.
            gram = sum((c.stop - c.start) * (width - c.start) for c in stripes(width))
            per_token += share * len(steps) * 2 * gram
            # The product of x with how far it has moved, or of that with the weight, then with x.
            drift = 4 * stack.shape[0] if has_few_outputs(*stack.shape) else 2 * width
            per_compared_token += share * num_drifts * drift * width
            if share * tokens >= MIN_EXPERT_TOKENS:
                _count_fit(fits[number % num_ranks], plan, stack, gradient_tokens)
    return _Operations(per_token, per_compared_token, per_gradient_token, fits)


def _count_fit(fits: _Fits, plan: Plan, stack: Stack, gradient_tokens: int) -> None:
    """Add what solving a stack takes.

    Args:
        gradient_tokens: that gradients are taken of.
    """
    rows, width = stack.shape
    together, per_batch = 1, 1
    if stack.is_of_expert:
        together, per_batch = plan.max_experts_together, plan.experts_per_batch
    steps = [step for step in stack.steps if pipeline.takes_second_moments(step)]
    num_drifts = sum(map(pipeline.takes_reference, steps))
    # a factor of the Hessian; the sweep over columns and its loss; with drift, what makes up for it
    correction = (2 if has_few_outputs(rows, width) else 4) * rows
    factor_and_sweep = len(steps) * (width / 3 + 2 * rows) + num_drifts * correction
    operations = int(width * width * factor_and_sweep)
    if together > 1:
        fits.of_experts[together] += operations
    else:
        fits.by_tiles[math.ceil(rows / LOOP_ROWS)] += operations
    for step in steps:
        tokens = gradient_tokens if pipeline.takes_gradient(step) else 0
        # what has no codes is decided by a mask, which no rule says
        count = count_columns(rows, width, tokens, step.options.bits is not None)
        # those of a batch at once
        fits.columns[together] += math.ceil(count_passes(step.options.bits) * count / per_batch)


def _file_bytes_of(shards: Sequence[Shard]) -> int:
    return sum(entry.file_bytes for shard in shards for entry in shard.entries)
