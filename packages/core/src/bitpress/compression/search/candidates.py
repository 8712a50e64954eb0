"""What a scheme is chosen for, and what each candidate makes of its size: known from headers."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence

from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.planning.layout import Stack
from bitpress.planning.plan import Plan


@frozen(eq=False)
class SearchUnit:
    """Layers that must get the same steps: those that engines fuse, or all experts of a block.

    Attributes:
        patterns: what matches all of them and no other layers, as a recipe takes it.
        block: the number of their decoder block.
        stacks: by candidate the stacks that they become; those of one that leaves them as they are
            have no steps.
    """

    name: str
    patterns: tuple[str, ...]
    block: int
    stacks: Mapping[str, tuple[Stack, ...]]

    @property
    def modules(self) -> list[str]:
        """Names of the layers."""
        return [module for stack in self._any_stacks for module in stack.members]

    @property
    def num_weights(self) -> int:
        """Weights of all layers."""
        return sum(entry.numel for stack in self._any_stacks for entry in stack.members.values())

    def num_bytes(self, candidate: str) -> int:
        """Bytes of all that a candidate stores of them."""
        return sum(
            stack.stored_bytes(module) if stack.steps else entry.nbytes
            for stack in self.stacks[candidate]
            for module, entry in stack.members.items()
        )

    @property
    def _any_stacks(self) -> tuple[Stack, ...]:
        """Those of one candidate: all have the same layers."""
        return next(iter(self.stacks.values()))


def find_units(plans: Mapping[str, Plan], uncompressed: Sequence[str]) -> list[SearchUnit]:
    """What is to be chosen for, block by block.

    Args:
        plans: by candidate what it would do everywhere.
        uncompressed: candidates that leave layers as they are.
    """
    first = next(iter(plans.values()))
    # stacks by their first layers, which are the same for every candidate
    stacks = {
        candidate: {next(iter(stack.members)): stack for stack in plan.stacks}
        for candidate, plan in plans.items()
    }
    layers = {next(iter(stack.members)): stack for stack in first.stacks}
    as_they_are = {layer: Stack(stack.members, ()) for layer, stack in layers.items()}
    stacks |= dict.fromkeys(uncompressed, as_they_are)

    first_layers: dict[str, list[str]] = {}
    for layer, stack in layers.items():
        expert = layer_names.OF_EXPERT.fullmatch(layer)
        name = expert["experts"] if expert else stack.name
        first_layers.setdefault(name, []).append(layer)

    units = []
    for name, unit_layers in first_layers.items():
        modules = [module for layer in unit_layers for module in layers[layer].members]
        block = layer_names.block_index(unit_layers[0], first.container) or 0
        stacks_of_unit = {
            candidate: tuple(by_layer[layer] for layer in unit_layers)
            for candidate, by_layer in stacks.items()
        }
        units.append(SearchUnit(name, _match_patterns(name, modules), block, stacks_of_unit))
    return sorted(units, key=lambda unit: unit.block)


def _match_patterns(name: str, modules: Sequence[str]) -> tuple[str, ...]:
    """Patterns that match the layers of a unit alone: one for all experts of a block."""
    if all(layer_names.OF_EXPERT.fullmatch(module) for module in modules):
        return (f"{glob.escape(name)}.*",)
    return tuple(map(glob.escape, modules))
