"""What there is to choose from, as `--schemes` names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from bitpress.errors import RecipeError
from bitpress.planning import recipe
from bitpress.planning.outer_layers import OUTER_LAYERS
from bitpress.planning.recipe import Recipe, RecipeChanges
from bitpress.planning.search_goal import SearchGoal
from bitpress.schemes.registry import Registry, Step

# The candidate that leaves layers, or the cache, as they are.
UNCOMPRESSED = "none"

# By name the steps of a candidate; none where it leaves layers as they are.
Candidates = Mapping[str, tuple[Step, ...]]


@frozen(eq=False)
class NamedCandidates:
    """What a user has named, its options read.

    Attributes:
        layers: for the decoder blocks.
        outer: for the head and the embeddings, by what a rule calls these: the same schemes with
            the options that they get there.
        cache: the one scheme for the cache by its name; empty where none is named.
        notes: a line for each name that was taken for another, and for each level of effort.
    """

    layers: Candidates
    outer: Mapping[str, Candidates]
    cache: Mapping[str, Step]
    notes: tuple[str, ...]

    @property
    def rotates(self) -> bool:
        """Whether one of them asks for a rotated model."""
        return any(step.options.rotates for steps in self.layers.values() for step in steps)


def read_candidates(goal: SearchGoal, registry: Registry) -> NamedCandidates:
    """The candidates of a goal.

    Raises:
        RecipeError: there are too few, one is not installed, or has an option that is not there.
    """
    steps = {name: _parse_steps(name) for name in goal.schemes}
    shown = f"--schemes {','.join(steps)}"
    if len(steps) < 2:
        raise RecipeError(
            f"{shown}: name two or more to choose from ({UNCOMPRESSED} leaves layers as they are)"
        )
    caches = [name for name in steps if _is_for_cache(steps[name], registry)]
    if any(len(steps[name]) > 1 for name in caches):
        raise RecipeError(
            f"{shown}: a scheme for the cache is a choice of its own: divide it by a comma"
        )
    if len(caches) > 1:
        raise RecipeError(f"{shown}: {' and '.join(caches)} are both for the cache: name one")
    names = [name for name in steps if name not in caches]
    if not any(steps[name] for name in names):
        raise RecipeError(f"{shown}: name a scheme for layers too")

    changes = RecipeChanges(goal.settings, effort=goal.effort)

    def parse(match: str) -> tuple[Candidates, Recipe]:
        table: dict[str, Any] = {
            "layers": [{"match": match, "steps": steps[name]} for name in names]
        }
        if caches:
            table["cache"] = steps[caches[0]][0]
        parsed = recipe.from_json(table, registry, "--schemes", changes)
        return dict(zip(names, (rule.steps for rule in parsed.rules), strict=True)), parsed

    layers, parsed = parse("*")
    # by themselves: beside rules that fit layers to data, a head's would too
    outer = {layer.name: parse(layer.name)[0] for layer in OUTER_LAYERS}
    cache = {} if parsed.cache is None else {caches[0]: parsed.cache}
    return NamedCandidates(layers, outer, cache, parsed.notes)


def _is_for_cache(steps: Sequence[Mapping[str, str]], registry: Registry) -> bool:
    return any(registry.get(step["use"]).quantizes_cache for step in steps)


def _parse_steps(candidate: str) -> list[dict[str, str]]:
    """The steps of a candidate, as a recipe has them."""
    steps = []
    for step in candidate.split("+") if candidate != UNCOMPRESSED else ():
        name, *settings = step.split(":")
        pairs = [setting.partition("=") for setting in settings]
        if not all(equals for _, equals, _ in pairs):
            raise RecipeError(
                f"--schemes {candidate}: options are given as NAME:OPTION=VALUE:OPTION=VALUE"
            )
        steps.append({"use": name} | {option: value for option, _, value in pairs})
    return steps
