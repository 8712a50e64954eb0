"""The head of a model, which is compressed only where a rule names it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs

from bitpress.checkpoint.engine_facts import EngineFacts, facts_of, is_head
from bitpress.checkpoint.layer_names import OUTSIDE
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import RecipeError
from bitpress.planning import linear_layers
from bitpress.planning.recipe import HEAD, Recipe


def name_head(recipe: Recipe, source: Checkpoint, engines: Sequence[EngineFacts]) -> Recipe:
    """A recipe whose rule for the head has the name that the head has in the files.

    Args:
        engines: the facts of engines for the model.

    Raises:
        RecipeError: there is a rule for a head, and no head.
    """
    if not recipe.names(HEAD):
        return recipe
    heads = _find_heads(source, engines)
    if not heads:
        raise RecipeError(
            f"{source.folder}: it stores no head, which is tied to the embeddings: engines do not "
            f"read one compressed; leave {HEAD} out"
        )
    rules = (
        attrs.evolve(rule, match=next(iter(heads)) if rule.match == HEAD else rule.match)
        for rule in recipe.rules
    )
    return attrs.evolve(recipe, rules=tuple(rules))


def find_head(
    recipe: Recipe, source: Checkpoint, engines: Sequence[EngineFacts]
) -> dict[str, Entry]:
    """The head, by its name, where a rule names it: to compress it, or to leave it alone.

    Raises:
        RecipeError: an engine does not read it compressed, or the steps need data.
    """
    heads = _find_heads(source, engines)
    named = {name: head for name, head in heads.items() if recipe.names(name)}
    for module in filter(recipe.steps, named):
        for step in recipe.steps(module):
            if step.calibrated:
                raise RecipeError(
                    f"{module} is compressed without data, and {step.scheme.name} needs data with "
                    "these options: set others, or take another scheme for it"
                )
        if source.model_config.is_tied:
            raise RecipeError(
                f"{source.folder}: {module} is tied to the embeddings, and engines do not read it "
                "compressed then: leave it out"
            )
        for facts in engines:
            if reason := facts.why_not_quantized(module):
                raise RecipeError(f"{module} cannot be compressed: {reason}")
    return named


def find_plain_head(source: Checkpoint, compressed: Collection[str]) -> Entry | None:
    """A head that a rule could name; None where engines would not read it compressed.

    Args:
        compressed: modules that are compressed already.
    """
    engines = facts_of(source.config)
    for module, entry in _find_heads(source, engines).items():
        is_read = not any(facts.why_not_quantized(module) for facts in engines)
        if is_read and not source.model_config.is_tied and module not in compressed:
            return entry
    return None


def _find_heads(source: Checkpoint, engines: Sequence[EngineFacts]) -> dict[str, Entry]:
    """Stored matrices whose outputs are logits of the text."""
    return {
        name.removesuffix(".weight"): entry
        for name, entry in source.entries.items()
        if name.endswith(".weight")
        and len(entry.shape) == 2
        and entry.dtype in linear_layers.FLOAT_DTYPES
        and not OUTSIDE.search(name)
        and is_head(name.removesuffix(".weight"), engines)
    }
