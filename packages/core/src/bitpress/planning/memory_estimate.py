"""Memory and disk space that a run of a plan needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from attrs import evolve, frozen

from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.rotated_source import estimate_reading
from bitpress.checkpoint.views import View
from bitpress.checkpoint.writer import format_json
from bitpress.errors import DataError
from bitpress.numerics.kernel_trial import compiler_bytes
from bitpress.planning import numbers_held
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.layout import Stack
from bitpress.planning.plan import Plan
from bitpress.runtime.devices import count_cores
from bitpress.runtime.memory import (
    TORCH_BYTES,
    TRANSFORMERS_BYTES,
    available_bytes,
)
from bitpress.schemes import pipeline, stored_layout

# Tokens that are run through a block together.
BATCH_TOKENS = 2048

# Tokens of which statistics are taken together.
STATISTICS_TOKENS = 4096

# Numbers for each of those tokens and each channel of the widest input: intermediate results.
TEMPORARIES = 4

# Numbers for each token that runs through a block: for each channel of the widest input, and for
# each of the hidden states.
WIDE_ACTIVATIONS, HIDDEN_ACTIVATIONS = 3, 8

# Numbers for each of those tokens and each channel that wait to be looked at: inputs, those of the
# source, and a residual.
WAITING_INPUTS = 3

# Hidden states that a forward waiting inside a block holds for each token, beside the input that it
# waits with.
WAITING_STATES = 3

# Bytes that Python, torch and a tokenizer take, and those of a token while a text is tokenized.
TOKENIZER_BYTES, TOKENIZING_BYTES = 350_000_000, 1200

# At least every so many batches are run through the source's weights too, to measure how far inputs
# drift; more of them where there are fewer tokens than so many for each input channel.
REFERENCE_INTERVAL = 8
REFERENCE_TOKENS_PER_CHANNEL = 64

# Tokens of which gradients are taken, from the first batch on; and where a step asks for all texts
# to be run through the source.
GRADIENT_TOKENS, FULL_GRADIENT_TOKENS = 8192, 65536

# Logits that a model makes at a time, and how many times they are held while their loss is run
# backward. Those of a whole batch would take gigabytes: 2.1 GB for 4096 tokens and a vocabulary of
# 128 Ki in float32.
MAX_LOGITS = 1 << 23
LOGITS_COPIES = 6

# Bytes of a model card, front matter of the source's included, and of a manifest that describes
# nothing.
CARD_BYTES = 1 << 17

# Bytes in which the manifest describes a layer (or a file), beside its name: its figures, and what
# it is warned of.
DESCRIPTION_BYTES = 1000

# Bytes that the exponent of a channel's factor takes in the manifest, and in a block's notes.
CHANNEL_BYTES = 20

# Bytes of a number: statistics are in float32, and on a CPU blocks are computed in that, or in half
# of it.
NUMBER_BYTES = 4


@frozen
class CalibrationMemory:
    """What a calibrated run holds, in bytes, beyond what the interpreter and its libraries take.

    Attributes:
        on_disk: with all hidden states on disk.
        in_memory: with all hidden states in memory.
        per_lane: for each further batch that is run at the same time.
        per_waiting_token: for each token whose forward waits inside a block.
        per_expert: for each further expert that is solved at the same time.
    """

    on_disk: int
    in_memory: int
    per_lane: int
    per_waiting_token: int
    per_expert: int

    def spilled_bytes(self, max_bytes: int | None) -> int:
        """Bytes of hidden states that go to disk; None allows half of what is free."""
        limit = available_bytes() // 2 if max_bytes is None else max_bytes
        return self.in_memory - self.on_disk if self.in_memory > limit else 0

    def num_lanes(self, max_bytes: int, num_threads: int) -> int:
        """How many of so many threads may each run a batch at the same time, at least one."""
        held_bytes = self.on_disk if self.spilled_bytes(max_bytes) else self.in_memory
        return min(1 + max(max_bytes - held_bytes, 0) // self.per_lane, num_threads)

    def num_experts(self, free_bytes: int, max_experts: int) -> int:
        """How many of so many experts may be solved at the same time, in what nothing else holds;
        at least one.
        """
        return min(1 + max(free_bytes, 0) // (self.per_expert or 1), max_experts)

    def num_waiting(self, free_bytes: int, tokens: int) -> int:
        """How many forwards of so many tokens may wait inside a block, in what nothing else
        holds.
        """
        return max(free_bytes, 0) // (self.per_waiting_token * tokens)


def split_batches(ids: torch.Tensor, num_ranks: int, batch_tokens: int) -> Sequence[torch.Tensor]:
    """Calibration sequences in batches: of as many tokens as are run together, or of fewer where
    there would be none for some rank.

    Args:
        ids: token ids (sequences, length).
        batch_tokens: that are run together.

    Raises:
        DataError: there are fewer sequences than ranks.
    """
    num_sequences, length = ids.shape
    if num_sequences < num_ranks:
        raise DataError(
            f"{num_sequences} calibration sequences for {num_ranks} ranks: each needs one; give "
            "more, or start fewer"
        )
    return torch.split(ids, max(min(batch_tokens // length, num_sequences // num_ranks), 1))


def reference_interval(plan: Plan, num_tokens: int) -> int:
    """Every how many batches the source is run too: 1 where tokens are few for the widest layer or
    for an expert, or a step asks for all.

    Args:
        num_tokens: of all ranks.
    """
    if plan.full_reference:
        return 1
    interval = int(num_tokens * plan.tokens_per_channel / REFERENCE_TOKENS_PER_CHANNEL)
    return min(max(interval, 1), REFERENCE_INTERVAL)


def gradient_tokens(plan: Plan) -> int:
    """Of how many tokens a run takes gradients at most; 0 where no step takes any."""
    if not plan.needs_gradients:
        return 0
    return FULL_GRADIENT_TOKENS if plan.full_reference else GRADIENT_TOKENS


def is_gradient_batch(plan: Plan, number: int, interval: int, batch_tokens: int) -> bool:
    """Whether gradients are taken of a batch: of the first of those that the source is run on.

    Args:
        number: of the batch among those of all ranks.
        interval: every how many batches the source is run too.
        batch_tokens: of every batch.
    """
    num_batches = math.ceil(gradient_tokens(plan) / batch_tokens)
    return number % interval == 0 and number < num_batches * interval


def estimate_device(
    plan: Plan, tokens: int, length: int = 1, *, by_layer: bool = False
) -> CalibrationMemory:
    """What a run of the plan on so many tokens, in sequences of so many, holds on a GPU, where
    blocks are computed in the model's dtype: with hidden states elsewhere (`on_disk`) but for those
    of the next batch, and with all of them there (`in_memory`).

    Args:
        by_layer: whether blocks stay in the host's memory, and are brought layer by layer.
    """
    number_bytes = plan.dtype.itemsize
    estimate = estimate_calibration(plan, tokens, length, number_bytes, by_layer=by_layer)
    # of the source's states too
    num_states = numbers_held.num_blocks_held(plan) * max(BATCH_TOKENS, length) * plan.hidden_size
    ahead = num_states * number_bytes
    return evolve(estimate, on_disk=estimate.on_disk + ahead, in_memory=estimate.in_memory + ahead)


def brought_bytes(plan: Plan) -> int:
    """Bytes that a GPU has of the weights of blocks that are brought layer by layer: of the largest
    layer group, and of the source's.
    """
    return (
        numbers_held.num_blocks_held(plan) * numbers_held.count_brought(plan) * plan.dtype.itemsize
    )


def host_block_bytes(plan: Plan) -> int:
    """Bytes of blocks that stay in the host's memory, the source's included."""
    return numbers_held.num_blocks_held(plan) * numbers_held.count_block(plan) * plan.dtype.itemsize


def estimate_calibration(
    plan: Plan,
    tokens: int,
    length: int = 1,
    number_bytes: int = NUMBER_BYTES,
    *,
    by_layer: bool = False,
) -> CalibrationMemory:
    """What a run of the plan on so many tokens, in sequences of so many, holds.

    What comes before the blocks, and a block, once; later the widest block as it was and as it
    becomes, the statistics and the solution of its largest stack, what is made of a batch, and the
    hidden states of all tokens, a share of them twice.

    Args:
        number_bytes: of a number that a block is computed in.
        by_layer: whether there is one layer group of a block at a time.
    """
    embeddings = sum(
        entry.numel
        for shard in plan.shards
        if shard.block is None
        for entry in shard.entries
        if "lm_head" not in entry.name
    )
    block = numbers_held.count_block(plan, by_layer=by_layer)
    solution, width = numbers_held.count_largest_solution(plan.block_stacks), plan.width
    batch_tokens = max(BATCH_TOKENS, length)
    forward = batch_tokens * (WIDE_ACTIVATIONS * width + HIDDEN_ACTIVATIONS * plan.hidden_size)
    observing = TEMPORARIES * max(STATISTICS_TOKENS, length) * width
    states = tokens * plan.hidden_size * (1 + 1 / reference_interval(plan, tokens))
    backward_bytes = kept = logits = 0
    if plan.needs_gradients:
        kept = numbers_held.count_kept(plan, batch_tokens, by_layer)
        head = numbers_held.count_head(plan)
        logits = LOGITS_COPIES * min(MAX_LOGITS, batch_tokens * head // plan.hidden_size)
        backward_bytes = max(
            NUMBER_BYTES * (head + logits), number_bytes * block + NUMBER_BYTES * kept
        )
        states += numbers_held.count_gradients(plan, min(tokens, gradient_tokens(plan)))
    solving_bytes = NUMBER_BYTES * (solution + observing)
    on_disk = max(
        number_bytes * (embeddings + block + forward),
        number_bytes * numbers_held.num_blocks_held(plan) * block
        + max(solving_bytes, number_bytes * forward, backward_bytes),
        NUMBER_BYTES * (numbers_held.count_fitted_head(plan) + observing),
    )
    on_disk += _reading_bytes(plan.source) + _compiler_bytes(plan)
    return CalibrationMemory(
        on_disk,
        int(on_disk + number_bytes * states),
        # a tile of rows that is solved takes less
        per_lane=NUMBER_BYTES
        * max(forward + observing + _count_in_flight(plan, length), kept, logits),
        per_waiting_token=number_bytes * (WAITING_STATES * plan.hidden_size + width),
        # of all that are sent each token once, a batch takes no more than an MLP of all tokens does
        per_expert=NUMBER_BYTES * numbers_held.count_expert(plan.expert_stacks),
    )


def _compiler_bytes(plan: Plan) -> int:
    """Bytes of what compiles kernels, where the plan has a step that uses them."""
    steps = (step for stack in plan.stacks for step in stack.steps)
    return compiler_bytes() if any(map(pipeline.takes_second_moments, steps)) else 0


def _count_in_flight(plan: Plan, length: int) -> int:
    """Numbers that wait for a lane, or for what a lane has made to be added up: a group's inputs,
    and the statistics of others.
    """
    inputs, statistics = 0, 0
    for stack in plan.stacks:
        rows, width = stack.shape
        num_steps = sum(step.calibrated for step in stack.steps)
        inputs = max(inputs, WAITING_INPUTS * max(STATISTICS_TOKENS, length) * width)
        observed = numbers_held.count_moments(rows, width) + rows * width
        statistics = max(statistics, num_steps * observed)
    return inputs + statistics


def estimate_memory(
    plan: Plan, threads: int | None = None, shape: tuple[int, int] | None = None
) -> int:
    """Bytes that a process of a run of the plan holds at least, Python and its libraries included.

    A calibrated run takes more where it may, for speed.

    Args:
        threads: of a run without data.
        shape: (sequences, length) of the calibration data of all ranks; None: as many as are used
            where nobody says.
    """
    if not plan.calibrated:
        return TORCH_BYTES + (threads or count_cores()) * _thread_bytes(plan, plan.stacks)
    num_sequences, length = shape or CalibrationConfig().shape
    tokenizing_bytes = TOKENIZER_BYTES + num_sequences * length * TOKENIZING_BYTES
    running_bytes = TRANSFORMERS_BYTES + estimate_calibration(plan, length, length).on_disk
    shards = (s for s in plan.shards if s.block is None and not s.has_fitted_head)
    outside = [stack for shard in shards for stack in shard.stacks]
    outside_bytes = TRANSFORMERS_BYTES + _thread_bytes(plan, outside) if outside else 0
    return max(tokenizing_bytes, running_bytes, outside_bytes)


def estimate_scratch(plan: Plan, tokens: int = math.prod(CalibrationConfig().shape)) -> int:
    """Bytes that a run may keep on disk beside the output, where it is allowed no more memory than
    it needs at least.

    Args:
        tokens: of one rank.
    """
    if not plan.calibrated:
        return 0
    memory = estimate_calibration(plan, tokens)
    return memory.in_memory - memory.on_disk


def estimate_disk(
    plan: Plan,
    shape: tuple[int, int] | None = None,
    max_memory: int | None = None,
    num_ranks: int = 1,
) -> int:
    """Bytes that a run of the plan needs room for in its output folder: files, what is noted while
    it runs, and hidden states that do not fit into memory.

    Args:
        shape: (sequences, length) of the calibration data of all ranks.
        max_memory: bytes of one rank, Python and its libraries included.
    """
    output_bytes = sum(plan.file_sizes.values()) + estimate_descriptions(plan)
    if shape is None:
        return output_bytes
    num_sequences, length = shape
    limit = None if max_memory is None else max_memory - TRANSFORMERS_BYTES
    rank_tokens = math.ceil(num_sequences / num_ranks) * length
    memory = estimate_calibration(plan, rank_tokens, length)
    return output_bytes + num_ranks * memory.spilled_bytes(limit)


def estimate_descriptions(plan: Plan) -> int:
    """Bytes of the manifest, the model card and the notes of finished blocks, at most: they hold
    what the run measures, of every layer, file and, where columns are rescaled, channel.
    """
    names = [*plan.files, *plan.source.headers]
    names += [module for stack in plan.stacks for module in stack.members]
    num_bytes = CARD_BYTES + len(names) * DESCRIPTION_BYTES + sum(len(n.encode()) for n in names)
    num_bytes += 2 * len(format_json(plan.recipe.as_json()).encode())
    if any(step.rescales for step in plan.steps):
        num_channels = sum(
            sum(entry.shape)
            for shard in plan.shards
            if shard.block is not None
            for entry in shard.entries
        )
        num_bytes += num_channels * CHANNEL_BYTES
    return num_bytes


def _thread_bytes(plan: Plan, stacks: Sequence[Stack]) -> int:
    """Bytes that a thread holds at most which writes stacks without data.

    A layer as it is stored, whole and in the row tiles that were proved, what is made of a row tile
    on the way, and what a matrix takes that is turned, dequantized or rotated while it is read.
    """
    stored = (stack.stored_bytes(module) for stack in stacks for module in stack.members)
    return 2 * max(stored, default=0) + tile_bytes() + _reading_bytes(plan.source)


def tile_bytes() -> int:
    """Bytes of what is made of a row tile that is rounded: 16 float32 tensors of its size."""
    return 16 * NUMBER_BYTES * stored_layout.WEIGHTS_PER_TILE


def _reading_bytes(source: Checkpoint) -> int:
    """Bytes that reading a tensor takes at most, beside its rows."""
    views = (entry for entry in source.entries.values() if isinstance(entry, View))
    return max((view.held_bytes for view in views), default=0) + estimate_reading(source)
