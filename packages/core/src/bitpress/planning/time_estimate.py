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

from bitpress.numerics.gram import stripes
from bitpress.numerics.rows import ROW_TILE, count_columns
from bitpress.numerics.scale_refit import count_passes
from bitpress.planning import memory_estimate
from bitpress.planning.calibration_config import MIN_EXPERT_TOKENS, CalibrationConfig
from bitpress.planning.layout import Shard
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
        solutions_by_tiles: the solutions, by how many tiles of rows may be solved side by side.
    """

    reads: int
    writes: int
    proves: int
    tokens: int = 0
    products: int = 0
    solutions: int = 0
    columns: int = 0
    solutions_by_tiles: Mapping[int, int] = field(factory=dict)


@frozen
class _Operations:
    """Floating-point operations of a calibrated run.

    Attributes:
        per_token: forwards and statistics.
        per_compared_token: of a token that is run through the source's weights too, beside those.
        per_gradient_token: of a token that is run backward, beside those.
        solutions: what each rank solves, by how many tiles of rows may be solved side by side.
        columns: of these, decided one after the other.
    """

    per_token: float
    per_compared_token: float
    per_gradient_token: float
    solutions: Sequence[Mapping[int, int]]
    columns: Sequence[int]


def estimate_seconds(ranks: Sequence[RankWork], threads: int) -> float:
    """Until the last rank is done, at best; all of them wait for every solution, which the next
    layers' inputs depend on. Threads that share a solution take turns at its columns.
    """
    longest = max(
        rank.reads / READ_RATE + rank.proves / VERIFY_RATE + rank.products / PRODUCT_RATE
        for rank in ranks
    )
    solving = sum(
        operations / min(threads, num_tiles) / SOLVE_RATE
        for rank in ranks
        for num_tiles, operations in rank.solutions_by_tiles.items()
    )
    columns = sum(rank.columns for rank in ranks) * COLUMN_SECONDS
    return longest / threads + solving + columns


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
    interval = memory_estimate.reference_interval(plan, sum(batch_tokens))
    for group in process_groups:
        batches = group.partition_evenly(batch_tokens)
        tokens = sum(batch_tokens[i] for i in batches)
        compared = sum(
            batch_tokens[i] for i in batches if plan.needs_reference and i % interval == 0
        )
        backward = sum(
            batch_tokens[i]
            for i in batches
            if memory_estimate.is_gradient_batch(plan, i, interval, batch_tokens[0])
        )

        # Where tokens are compared, a block's own weights are read again; on the way to gradients,
        # twice.
        shards = group.partition_by_size(outside, lambda shard: shard.source_bytes)
        num_reads = 1 + (compared > 0) + 2 * (backward > 0)
        reads = recording_bytes + fitted_bytes * num_reads + _file_bytes_of(shards)
        if group.is_rank_zero:
            reads += sum(entry.file_bytes for shard in blocks for entry in shard.copies)
            shards = [*shards, *fitted]
        products = operations.per_token * tokens + operations.per_compared_token * compared
        products += operations.per_gradient_token * backward
        yield RankWork(
            reads,
            sum(shard.header.nbytes for shard in shards),
            proved_bytes,
            tokens,
            int(products),
            sum(operations.solutions[group.rank].values()),
            operations.columns[group.rank],
            operations.solutions[group.rank],
        )


def _count_operations(
    plan: Plan, shards: Sequence[Shard], tokens: int, num_ranks: int
) -> _Operations:
    """Those of blocks, and of fitting a head, which is not run."""
    per_token, per_compared_token, per_gradient_token = 0.0, 0.0, 0.0
    solutions: list[Counter[int]] = [Counter() for _ in range(num_ranks)]
    columns = [0] * num_ranks
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
            rows, width = stack.shape
            share = share_of(next(iter(stack.members.values())))
            # Largest inputs, and other numbers for each channel, take next to no time.
            steps = [step for step in stack.steps if pipeline.takes_second_moments(step)]
            num_drifts = sum(map(pipeline.takes_reference, steps))
            # x xᵀ, the columns of each stripe from its first one on.
            gram = sum((c.stop - c.start) * (width - c.start) for c in stripes(width))
            per_token += share * len(steps) * 2 * gram
            # The product of x with how far it has moved.
            per_compared_token += share * num_drifts * 2 * width * width
            # A factor of the Hessian; the sweep over columns and its loss; with drift, what makes
            # up for it.
            if share * tokens >= MIN_EXPERT_TOKENS:
                factor_and_sweep = len(steps) * (width / 3 + 2 * rows) + num_drifts * 4 * rows
                num_tiles = math.ceil(rows / ROW_TILE)
                solutions[number % num_ranks][num_tiles] += int(width * width * factor_and_sweep)
                for step in steps:
                    bits, tokens_back = step.options.bits, 0
                    if pipeline.takes_gradient(step):
                        tokens_back = gradient_tokens
                    # what has no codes is decided by a mask, which no rule says
                    count = count_columns(rows, width, tokens_back, bits is not None)
                    columns[number % num_ranks] += count_passes(bits) * count
    return _Operations(per_token, per_compared_token, per_gradient_token, solutions, columns)


def _file_bytes_of(shards: Sequence[Shard]) -> int:
    return sum(entry.file_bytes for shard in shards for entry in shard.entries)
