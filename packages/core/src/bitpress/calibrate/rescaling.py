"""Factors that schemes choose for the columns of a block's layers, folded into the block before its
sites are compressed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from bitpress import chain, stacks
from bitpress.calibrate import folding
from bitpress.calibrate.notes import BlockNotes
from bitpress.calibrate.observing import nothing, observe
from bitpress.calibrate.sites import Site
from bitpress.calibrate.streams import Arrival, Streams
from bitpress.calibrate.walk import Doors
from bitpress.layer import Layer

# of a block's output that a fold may seem to move it by, through roundings alone
UNCHANGED = 1e-2


def rescale(
    sites: Sequence[Site], prefix: str, streams: Streams, head: int | None, notes: BlockNotes
) -> None:
    """Fold the factors that schemes choose into the block, one pass of all batches through its
    float weights deciding them.
    """
    numbered = [
        site for site in sites if site.entrance and any(step.rescales for step in site.stack.steps)
    ]
    if not numbered:
        return
    doors = Doors(streams.block, [str(site.entrance) for site in numbered])
    observed = [nothing(site) for site in numbered]
    for batch in range(len(streams.calls)):
        walk = streams.walk(batch)
        for number, site in enumerate(numbered):
            # and then it is over
            inputs, _ = walk.input(number, keep=number + 1 < len(numbered))
            found, _, _ = observe(site, [] if inputs is None else [Arrival(inputs)])
            for merged, of_batch in zip(observed[number], found, strict=True):
                chain.merge(merged, of_batch)
    doors.close()
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in streams.block.named_parameters(remove_duplicate=False)
    }
    unknown = []
    for site, stats in zip(numbered, observed, strict=True):
        members = [name.removeprefix(prefix) for name in site.modules]
        made_by = folding.producer(members, shapes, head)
        stats = streams.ranks.add_up(stats, 0, streams.device)
        layer = Layer(site.stack.name, site.weight, site.stack.dtype)
        factors = (
            chain.rescale(layer, site.stack.steps, stats)
            if made_by and streams.ranks.first
            else None
        )
        factors = streams.ranks.same(factors)
        if made_by is None:
            unknown.append(site.stack.name)
        elif factors is not None and not _fold(members, made_by, factors, streams, prefix, notes):
            notes.warnings.append(
                f"{site.stack.name}: {made_by.module} feeds more than this; its inputs are not "
                "rescaled"
            )
    # experts follow one another
    for _, alike in itertools.groupby(unknown, lambda name: stacks.PLACE.sub("*", name)):
        first, *more = alike
        others = f" and {len(more)} like it" if more else ""
        notes.warnings.append(
            f"{first}{others}: nothing is known that could take a rescaling of its inputs; not "
            "rescaled"
        )


def _fold(
    members: Sequence[str],
    made_by: folding.Producer,
    factors: Tensor,
    streams: Streams,
    prefix: str,
    notes: BlockNotes,
) -> bool:
    """Fold into the block and its source alike; undone, to the bit, where the block's output
    moves.
    """
    factors = folding.powers_of_two(factors, made_by.heads)
    call, hidden = streams.sample()
    before = call(streams.block, hidden)
    changes = folding.fold(streams.block, members, made_by, factors)
    moved = (call(streams.block, hidden) - before).norm()
    if not streams.ranks.same(bool(moved <= UNCHANGED * before.norm())):
        folding.fold(streams.block, members, made_by, 1 / factors)
        return False
    if streams.source is not None:
        folding.fold(streams.source, members, made_by, factors)
    for change in changes:
        notes.rescaled.setdefault(prefix + change.tensor, {})[change.axis] = change.exponents
    return True
