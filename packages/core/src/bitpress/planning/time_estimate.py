"""What each rank of a run will do, worked out from headers, and how long that may take on CPUs.

Rates are those of one core of a small virtual machine (docs/scaling.md has the figures): another
machine is faster or slower throughout, so that what is counted here says more than the time that is
made of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from attrs import frozen

from bitpress.checkpoint import layer_names, model_config
from bitpress.checkpoint.safetensors import BITS, Entry
from bitpress.checkpoint.views import View
from bitpress.numerics.gram import stripes
from bitpress.planning import memory_estimate
from bitpress.planning.calibration_config import FEW, CalibrationConfig
from bitpress.planning.layout import Shard
from bitpress.planning.plan import Plan
from bitpress.runtime.process_group import Ranks

# bytes of the source that a core reads and converts in a second
LOADED = 0.25e9

# bytes of the source that a core proves in a second, digests included
PROVED = 0.075e9

# operations of a core in a second, in products over tokens
MULTIPLIED = 45e9

# operations of a core in a second, in factors and error feedback
SOLVED = 25e9


@frozen
class Share:
    """What falls to one rank.

    Attributes:
        reads: bytes of the source, before anything is proved.
        writes: bytes of weight files.
        proves: bytes of the source that are held against what was written of them.
        tokens: of calibration.
        products: floating-point operations on tokens (a product and a sum are two): forwards, and
            sums over layers' inputs.
        solutions: floating-point operations on those sums, counted as if every calibrated step fed
            errors forward.
    """

    reads: int
    writes: int
    proves: int
    tokens: int = 0
    products: int = 0
    solutions: int = 0


def seconds(shares: Sequence[Share], threads: int) -> float:
    """Until the last rank is done, at best; all of them wait for every solution, which the next
    layers' inputs depend on.
    """
    longest = max(s.reads / LOADED + s.proves / PROVED + s.products / MULTIPLIED for s in shares)
    return (longest + sum(s.solutions for s in shares) / SOLVED) / threads


def shares(plan: Plan, count: int, choice: CalibrationConfig | None = None) -> list[Share]:
    """The shares of so many ranks, as a run deals them; raises DataError where there are too few
    sequences for them.

    Every block is run once for each batch, as it is where memory lets forwards wait inside it.
    """
    everyone, proves = [Ranks(rank, count) for rank in range(count)], plan.source_bytes // count
    if not plan.recipe.calibrated:
        dealt = [ranks.deal(plan.shards, lambda shard: shard.source_bytes) for ranks in everyone]
        return [
            Share(_read(own), sum(shard.header.nbytes for shard in own), proves) for own in dealt
        ]
    choice = choice or CalibrationConfig()
    batches = memory_estimate.batches(torch.zeros(1).expand(choice.samples, choice.length), count)
    return list(
        _calibrated(plan, everyone, [len(batch) * choice.length for batch in batches], proves)
    )


def _calibrated(
    plan: Plan, everyone: Sequence[Ranks], batches: Sequence[int], proves: int
) -> Iterator[Share]:
    """Every rank reads every block and runs its own batches; the first rank writes, and solutions
    go round.

    Args:
        batches: tokens of each.
    """
    blocks, outside = (
        [s for s in plan.shards if (s.block is not None) == inside] for inside in (True, False)
    )
    # before the blocks; the first of which
    run = [e for shard in outside for e in shard.copies if "lm_head" not in e.name]
    # is asked once more what it returns
    once, all_blocks = sum(map(_stored, run)) + _read(blocks[:1]), _read(blocks)
    of_token, of_compared, solutions = _operations(plan, blocks, sum(batches), len(everyone))
    for ranks in everyone:
        part, own = ranks.part(batches), ranks.deal(outside, lambda shard: shard.source_bytes)
        tokens = sum(batches[i] for i in part)
        compared = sum(
            batches[i] for i in part if plan.recipe.compares and i % memory_estimate.REFERENCE == 0
        )
        reads = once + all_blocks * (2 if compared else 1) + _read(own)
        if ranks.first:
            reads, own = (
                reads + sum(_stored(e) for shard in blocks for e in shard.copies),
                [*own, *blocks],
            )
        writes, products = (
            sum(shard.header.nbytes for shard in own),
            of_token * tokens + of_compared * compared,
        )
        yield Share(reads, writes, proves, tokens, int(products), int(solutions[ranks.rank]))


def _operations(
    plan: Plan, blocks: Sequence[Shard], tokens: int, ranks: int
) -> tuple[float, float, list[float]]:
    """Of each token, of each that is run through the source's weights too, and of the solutions
    that each rank owns.
    """
    of_token, of_compared, solutions = 0.0, 0.0, [0.0] * ranks
    for shard in blocks:
        sent = _sent(plan, shard)
        forward = sum(
            2 * entry.numel * sent(entry) for entry in shard.entries if len(entry.shape) > 1
        )
        of_token, of_compared = of_token + forward, of_compared + forward
        for number, stack in enumerate(stack for stack in shard.stacks if stack.calibrated):
            steps, (rows, width) = sum(step.calibrated for step in stack.steps), stack.shape
            routed = sent(next(iter(stack.members.values())))
            # where a router sends tokens, the source sends others
            drifts = plan.recipe.compares and routed == 1
            # x xᵀ
            of_token += (
                routed
                * steps
                * 2
                * sum((c.stop - c.start) * (width - c.start) for c in stripes(width))
            )
            # how far x has moved
            of_compared += drifts * steps * 2 * width * width
            # a factor; the columns' sweep and its loss; what makes up for x having moved
            if routed * tokens >= FEW:
                solutions[number % ranks] += (
                    steps * width * width * (width / 3 + (6 if drifts else 2) * rows)
                )
    return of_token, of_compared, solutions


def _read(shards: Sequence[Shard]) -> int:
    return sum(_stored(entry) for shard in shards for entry in shard.entries)


def _stored(entry: Entry) -> int:
    """Bytes of a tensor as it lies in its file; scales of a source in FP8 are not counted."""
    return entry.numel * BITS[entry.stored.dtype if isinstance(entry, View) else entry.dtype] // 8


def _sent(plan: Plan, shard: Shard) -> Callable[[Entry], float]:
    """What part of the tokens comes to a matrix of a block: an expert is sent those that a router
    chooses it for.
    """
    places = {
        entry.name: layer_names.OF_EXPERT.fullmatch(entry.name.removesuffix(".weight"))
        for entry in shard.entries
    }
    count = len({place["number"] for place in places.values() if place})
    chosen = model_config.experts_of_a_token(plan.source.config)

    def sent(entry: Entry) -> float:
        experts = (
            count
            if places[entry.name]
            else entry.shape[0]
            if ".experts." in entry.name and len(entry.shape) == 3
            else 0
        )
        return min((chosen or experts) / experts, 1.0) if experts else 1.0

    return sent
