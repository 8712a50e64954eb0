"""What each rank of a run will do, worked out from headers, and how long that may take on CPUs.

Rates are those of one core of a small virtual machine (docs/scaling.md has the figures): another machine is faster or slower
throughout, so that what is counted here says more than the time that is made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import frozen

from bitpress import stacks, stream
from bitpress.calibrate import memory
from bitpress.calibrate.texts import Choice
from bitpress.calibrate.tokens import FEW
from bitpress.checkpoint.header import Entry
from bitpress.numerics.products import stripes
from bitpress.planning import Plan
from bitpress.ranks import Ranks
from bitpress.shards import Shard, Stack

LOADED = 0.5e9  # bytes of the source that a core reads and converts in a second
PROVED = 0.12e9  # bytes of the source that a core proves in a second, digests included
MULTIPLIED = 70e9  # operations of a core in a second, in products over tokens
SOLVED = 30e9  # operations of a core in a second, in factors and error feedback


@frozen
class Share:
    """What falls to one rank.

    Attributes:
        reads: bytes of the source, before anything is proved.
        writes: bytes of weight files.
        proves: bytes of the source that are held against what was written of them.
        tokens: of calibration.
        products: floating-point operations on tokens (a product and a sum are two): forwards, and sums over layers' inputs.
        solutions: floating-point operations on those sums, counted as if every calibrated step fed errors forward.
    """

    reads: int
    writes: int
    proves: int
    tokens: int = 0
    products: int = 0
    solutions: int = 0

    @property
    def core_seconds(self) -> float:
        """Of one core; several threads take at best their share of it."""
        return self.reads / LOADED + self.proves / PROVED + self.products / MULTIPLIED + self.solutions / SOLVED


def shares(plan: Plan, count: int, choice: Choice | None = None) -> list[Share]:
    """The shares of so many ranks, as a run deals them; raises DataError where there are too few sequences for them.

    Every block is run once for each batch, as it is where memory lets forwards wait inside it.
    """
    everyone, proves = [Ranks(rank, count) for rank in range(count)], plan.bytes_before // count
    if not plan.recipe.calibrated:
        dealt = [stream.own(plan, ranks) for ranks in everyone]
        return [Share(_read(own), sum(shard.header.nbytes for shard in own), proves) for own in dealt]
    choice = choice or Choice()
    batches = memory.batches(torch.zeros(1).expand(choice.samples, choice.length), count)
    return [_calibrated(plan, ranks, [len(batch) * choice.length for batch in batches], proves) for ranks in everyone]


def _calibrated(plan: Plan, ranks: Ranks, batches: Sequence[int], proves: int) -> Share:
    """Every rank reads every block and runs its own batches; the first rank writes, and solutions go round.

    Args:
        batches: tokens of each.
    """
    part = ranks.part(batches)
    tokens = sum(batches[i] for i in part)
    compared = sum(batches[i] for i in part if plan.recipe.compares and i % memory.REFERENCE == 0)
    blocks, outside = ([s for s in plan.shards if (s.block is not None) == inside] for inside in (True, False))
    own = ranks.deal(outside, lambda shard: shard.reads)
    run = [e for shard in outside for e in shard.copies if "lm_head" not in e.name]  # before the blocks; the first of which
    reads = _read(own) + sum(e.nbytes for e in run) + blocks[0].reads  # is asked once more what it returns
    reads += _read(blocks) * (2 if compared else 1)
    if ranks.first:
        reads, own = reads + sum(e.nbytes for shard in blocks for e in shard.copies), [*own, *blocks]
    products = solutions = 0.0
    for shard in blocks:
        sent = _sent(plan, shard)
        matrices = [entry for entry in shard.entries if len(entry.shape) > 1]
        products += sum(2 * entry.numel * sent(entry) for entry in matrices) * (tokens + compared)
        for number, stack in enumerate(stack for stack in shard.stacks if stack.calibrated):
            routed = sent(next(iter(stack.members.values())))  # a part of the tokens: what the source sends there differs
            drifts = plan.recipe.compares and routed == 1
            products += _sums(stack, routed * tokens, compared if drifts else 0)
            if number % ranks.count == ranks.rank and routed * sum(batches) >= FEW:
                solutions += _solution(stack, drifts)
    return Share(reads, sum(s.header.nbytes for s in own), proves, tokens, int(products), int(solutions))


def _read(shards: Sequence[Shard]) -> int:
    return sum(shard.reads for shard in shards)


def _sent(plan: Plan, shard: Shard) -> Callable[[Entry], float]:
    """What part of the tokens comes to a matrix of a block: an expert is sent those that a router chooses it for."""
    places = {entry.name: stacks.OF_EXPERT.fullmatch(entry.name.removesuffix(".weight")) for entry in shard.entries}
    count = len({place["number"] for place in places.values() if place})
    chosen = stacks.experts_of_a_token(plan.source.config)

    def sent(entry: Entry) -> float:
        experts = count if places[entry.name] else entry.shape[0] if ".experts." in entry.name and len(entry.shape) == 3 else 0
        return min((chosen or experts) / experts, 1.0) if experts else 1.0

    return sent


def _sums(stack: Stack, tokens: float, compared: float) -> float:
    """Operations of the sums over a stack's inputs x: x xᵀ, half of which is a mirror image, and of how far they have drifted."""
    width = stack.shape[1]
    gram: int = sum((columns.stop - columns.start) * (width - columns.start) for columns in stripes(width))
    return sum(step.calibrated for step in stack.steps) * 2 * (gram * tokens + width**2 * compared)


def _solution(stack: Stack, drifts: bool) -> float:
    """Operations of a stack's factor and of error feedback: its columns' sweep, its loss, and what makes up for the drift."""
    rows, width = stack.shape
    steps = sum(step.calibrated for step in stack.steps)
    return steps * width * width * (width / 3 + (6 if drifts else 2) * rows)
