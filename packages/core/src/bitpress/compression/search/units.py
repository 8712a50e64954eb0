"""What a candidate is chosen for, and what each makes of its size: known from headers."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence

from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.reader import Checkpoint
from bitpress.compression.search.candidates import UNCOMPRESSED, Candidates
from bitpress.errors import BitpressError
from bitpress.planning import outer_layers
from bitpress.planning.attention_caches import AttentionCache, count_token_bytes
from bitpress.planning.layout import Stack
from bitpress.planning.linear_layers import linear_layers
from bitpress.planning.outer_layers import OUTER_LAYERS
from bitpress.planning.plan import Plan
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe import Recipe, Rule
from bitpress.schemes.registry import Step

# What the cache is called beside the layers.
CACHE = "cache"


@frozen(eq=False)
class SearchUnit:
    """Layers that must get the same steps: those that engines fuse, all experts of a block, or the
    head or the embeddings alone.

    Attributes:
        patterns: what matches all of them and no other layers, as a recipe takes it.
        block: the number of their decoder block; None of the head and the embeddings.
        stacks: by candidate the stacks that they become; those of one that leaves them as they are
            have no steps.
    """

    name: str
    patterns: tuple[str, ...]
    block: int | None
    stacks: Mapping[str, tuple[Stack, ...]]

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of what there is to choose from."""
        return tuple(self.stacks)

    @property
    def trials(self) -> tuple[str, ...]:
        """Names of the candidates that compress."""
        return tuple(name for name, (stack, *_) in self.stacks.items() if stack.steps)

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
    def source_bytes(self) -> int:
        """Bytes of the source's weights."""
        return sum(stack.source_bytes for stack in self._any_stacks)

    @property
    def _any_stacks(self) -> tuple[Stack, ...]:
        """Those of one candidate: all have the same layers."""
        return next(iter(self.stacks.values()))


@frozen(eq=False)
class CacheUnit:
    """The keys and values that an engine keeps of so many tokens, all in one format.

    Attributes:
        scheme: the candidate that is a scheme for them; None where there is none.
        caches: as they become by it.
        plain_bytes: of a token, where they are kept as the model computes them.
        tokens: that are counted.
    """

    scheme: str | None
    caches: tuple[AttentionCache, ...]
    plain_bytes: int
    tokens: int

    @property
    def name(self) -> str:
        """What it is called beside the layers."""
        return CACHE

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of what there is to choose from."""
        return (UNCOMPRESSED, *self.trials)

    @property
    def trials(self) -> tuple[str, ...]:
        """Names of the candidates that are schemes."""
        return () if self.scheme is None else (self.scheme,)

    def token_bytes(self, candidate: str) -> int:
        """Bytes that a candidate keeps of a token."""
        if candidate == UNCOMPRESSED:
            return self.plain_bytes
        return sum(cache.token_bytes[1] for cache in self.caches)

    def stored_bytes(self, candidate: str) -> int:
        """Bytes that a candidate stores beside the weights."""
        if candidate == UNCOMPRESSED:
            return 0
        return sum(spec.nbytes for cache in self.caches for spec in cache.specs.values())

    def num_bytes(self, candidate: str) -> int:
        """Bytes of all tokens, and of what is stored for them."""
        return self.tokens * self.token_bytes(candidate) + self.stored_bytes(candidate)


def find_units(plans: Mapping[str, Plan], uncompressed: Sequence[str]) -> list[SearchUnit]:
    """The layers of the decoder blocks that are to be chosen for, block by block.

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
    return sorted(units, key=lambda unit: unit.block or 0)


def find_outer_units(
    source: Checkpoint, outer_candidates: Mapping[str, Candidates], ignore: Sequence[str]
) -> tuple[list[SearchUnit], list[str]]:
    """The head and the embeddings, each with the candidates that a recipe may give it and the one
    that leaves it alone; and a line for each candidate that it may not, or for all.

    Args:
        outer_candidates: by what a rule calls them.
        ignore: patterns of layers to leave alone.
    """
    units, remarks = [], []
    for outer in OUTER_LAYERS:
        if reason := outer_layers.why_left_alone(outer, source, ignore):
            remarks.append(f"{outer.what} left alone: {reason}")
            continue
        stacks = {}
        for name, steps in outer_candidates[outer.name].items():
            if not steps:
                continue
            if any(step.calibrated for step in steps):
                remarks.append(
                    f"{name} is no choice for the {outer.what}: search rounds both head and "
                    "embeddings without data, and it needs data with these options"
                )
                continue
            try:
                stacks[name] = make_plan(source, Recipe((Rule(outer.name, steps),))).stacks
            except BitpressError as e:
                remarks.append(f"{name} is no choice for the {outer.what}: {e}")
        if stacks:
            members = next(iter(stacks.values()))[0].members
            stacks[UNCOMPRESSED] = (Stack(members, ()),)
            units.append(SearchUnit(next(iter(members)), (outer.name,), None, stacks))
    return units, remarks


def find_cache_unit(source: Checkpoint, schemes: Mapping[str, Step], tokens: int) -> CacheUnit:
    """The cache of so many tokens, as the model computes it or by a scheme for it.

    Args:
        schemes: by name; none, or one.

    Raises:
        CheckpointError: the model's attentions keep no keys and values, as far as is known.
    """
    plain_bytes = count_token_bytes(source, linear_layers(source), "--cache-tokens")
    for name, step in schemes.items():
        caches = make_plan(source, Recipe((), cache=step)).caches
        return CacheUnit(name, caches, plain_bytes, tokens)
    return CacheUnit(None, (), plain_bytes, tokens)


def _match_patterns(name: str, modules: Sequence[str]) -> tuple[str, ...]:
    """Patterns that match the layers of a unit alone: one for all experts of a block."""
    if all(layer_names.OF_EXPERT.fullmatch(module) for module in modules):
        return (f"{glob.escape(name)}.*",)
    return tuple(map(glob.escape, modules))
