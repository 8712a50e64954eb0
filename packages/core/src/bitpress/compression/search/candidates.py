"""What a scheme is chosen for, and what each scheme makes of its size: known from headers."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence

from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.planning.layout import Stack
from bitpress.planning.plan import Plan


@frozen(eq=False)
class Unit:
    """Layers that must get the same steps: those that engines fuse, or all experts of a block.

    Attributes:
        patterns: what matches all of them and no other layers, as a recipe takes it.
        block: the number of their decoder block.
        made: by candidate the stacks that they become; those of one that leaves them as they are
            have no steps.
    """

    name: str
    patterns: tuple[str, ...]
    block: int
    made: Mapping[str, tuple[Stack, ...]]

    @property
    def modules(self) -> list[str]:
        """Their names."""
        return [module for stack in next(iter(self.made.values())) for module in stack.members]

    @property
    def weights(self) -> int:
        """How many there are."""
        return sum(
            entry.numel
            for stack in next(iter(self.made.values()))
            for entry in stack.members.values()
        )

    def size(self, candidate: str) -> int:
        """Bytes of all that is stored of them."""
        return sum(
            stack.stored_bytes(module) if stack.steps else entry.nbytes
            for stack in self.made[candidate]
            for module, entry in stack.members.items()
        )


def units(plans: Mapping[str, Plan], plain: Sequence[str]) -> list[Unit]:
    """What is to be chosen for, block by block.

    Args:
        plans: by candidate what it would do everywhere.
        plain: candidates that leave layers as they are.
    """
    first = next(iter(plans.values()))
    # by unit the first members of its stacks
    found: dict[str, list[str]] = {}
    for stack in first.stacks:
        head = next(iter(stack.members))
        place = layer_names.OF_EXPERT.fullmatch(head)
        found.setdefault(place["experts"] if place else stack.name, []).append(head)
    by_head = {
        name: {next(iter(s.members)): s for s in plan.stacks} for name, plan in plans.items()
    }
    own = by_head[next(iter(plans))]
    kept = {head: Stack(stack.members, ()) for head, stack in own.items()}
    by_head |= dict.fromkeys(plain, kept)
    made = [
        Unit(
            name,
            _patterns(name, [module for head in heads for module in own[head].members]),
            layer_names.block_index(heads[0], first.container) or 0,
            {
                candidate: tuple(known[head] for head in heads)
                for candidate, known in by_head.items()
            },
        )
        for name, heads in found.items()
    ]
    return sorted(made, key=lambda unit: unit.block)


def _patterns(name: str, modules: Sequence[str]) -> tuple[str, ...]:
    if all(layer_names.OF_EXPERT.fullmatch(module) for module in modules):
        return (f"{glob.escape(name)}.*",)
    return tuple(map(glob.escape, modules))
