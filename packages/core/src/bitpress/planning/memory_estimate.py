"""Memory and disk space that a run of a plan needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import frozen

from bitpress.checkpoint.views import View
from bitpress.errors import DataError
from bitpress.planning.calibration_config import CalibrationConfig
from bitpress.planning.plan import Plan
from bitpress.runtime.devices import cores
from bitpress.runtime.memory import (
    TORCH_BYTES,
    TRANSFORMERS_BYTES as CALIBRATED_RUNTIME,
    available,
)
from bitpress.schemes import stored_layout

# tokens that are run through a block together
BATCH = 2048

# tokens of which statistics are taken together
OBSERVED = 4096

# numbers for each of those and each channel of the widest input: what is made of a batch on the way
TEMPORARY = 4

# hidden states that a forward waiting inside a block holds for each token, beside the input it
# waits with
WAITING = 3

# every so many batches are run through the source's weights too
REFERENCE = 8

# bytes: blocks are computed in float32, or in half of it
NUMBER = 4


@frozen
class Need:
    """Bytes: with hidden states on disk, with them in memory, and of each token whose forward
    waits inside a block.
    """

    least: int
    held: int
    waiting: int

    def spilled(self, allowed: int | None) -> int:
        """Bytes of hidden states that go to disk; None allows half of what is free."""
        return (
            self.held - self.least
            if self.held > (available() // 2 if allowed is None else allowed)
            else 0
        )

    def waits(self, allowed: int, tokens: int) -> int:
        """How many forwards of so many tokens may wait inside a block."""
        return max(allowed - self.held, 0) // (self.waiting * tokens)


def batches(ids: torch.Tensor, ranks: int) -> Sequence[torch.Tensor]:
    """All batches: of as many tokens as are run together, or of fewer where there would be none for
    some rank.
    """
    if len(ids) < ranks:
        raise DataError(
            f"{len(ids)} calibration sequences for {ranks} ranks: each needs one; give more, or "
            "start fewer"
        )
    return torch.split(ids, max(min(BATCH // ids.shape[1], len(ids) // ranks), 1))


def estimate_calibration(plan: Plan, tokens: int) -> Need:
    """What a run of the plan holds, beyond what the interpreter, torch and transformers take.

    What comes before the blocks, and a block, once; later the widest block as it was and as it
    becomes, the statistics and the solution of its largest site, what is made of a batch, and the
    hidden states of so many tokens, a share of them twice.
    """
    before = sum(
        e.numel for s in plan.shards if s.block is None for e in s.copies if "lm_head" not in e.name
    )
    block = max(
        sum(e.numel for e in shard.entries) for shard in plan.shards if shard.block is not None
    )
    site = max(
        _site(*stack.shape, sum(step.calibrated for step in stack.steps)) for stack in plan.stacks
    )
    width = max(stack.shape[1] for stack in plan.stacks)
    least = NUMBER * max(before + block, 2 * block + site + TEMPORARY * OBSERVED * width)
    states = NUMBER * tokens * plan.hidden_size * (1 + 1 / REFERENCE)
    return Need(least, int(least + states), NUMBER * (WAITING * plan.hidden_size + width))


def _site(rows: int, width: int, steps: int) -> int:
    """Numbers of the statistics and the solution of a stack, of which so many steps look at
    data.
    """
    return (3 + 2 * steps) * width * width + 6 * max(steps, 1) * rows * width


def estimate_memory(
    work: Plan,
    threads: int | None = None,
    tokens: int = CalibrationConfig().samples * CalibrationConfig().length,
) -> int:
    """Bytes that a run of the plan holds at least, Python and its libraries included.

    A calibrated run takes more where it may, for speed.
    """
    if work.recipe.calibrated:
        return CALIBRATED_RUNTIME + estimate_calibration(work, tokens).least
    return TORCH_BYTES + (threads or cores()) * _thread_bytes(work)


def _thread_bytes(plan: Plan) -> int:
    """Bytes that a thread of a data-free run holds at most.

    A layer as it is stored and as it is written, a row tile and what is made of it on the way (ten
    float32 tensors of its size), and a matrix that is turned while it is read, twice.
    """
    stored = (stack.stored_bytes(module) for stack in plan.stacks for module in stack.members)
    transposed = (
        entry.stored.nbytes
        for entry in plan.source.entries.values()
        if isinstance(entry, View) and entry.transposed
    )
    tile_bytes = NUMBER * stored_layout.TILE
    return 2 * max(stored, default=0) + 10 * tile_bytes + 2 * max(transposed, default=0)


def estimate_scratch(
    work: Plan, tokens: int = CalibrationConfig().samples * CalibrationConfig().length
) -> int:
    """Bytes that a run may keep on disk beside the output, where it is allowed no more memory than
    it needs at least.
    """
    if not work.recipe.calibrated:
        return 0
    need = estimate_calibration(work, tokens)
    return need.held - need.least


def estimate_disk(
    work: Plan, tokens: int = 0, max_memory: int | None = None, ranks: int = 1
) -> int:
    """Bytes that a run of the plan needs room for in its output folder, hidden states that do not
    fit into memory included.

    Args:
        tokens: of one rank.
        max_memory: of one rank.
    """
    limit = None if max_memory is None else max_memory - CALIBRATED_RUNTIME
    return sum(work.file_sizes.values()) + (
        ranks * estimate_calibration(work, tokens).spilled(limit) if tokens else 0
    )
