"""The head and the embeddings of a model, which are compressed only where a rule names them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import attrs
from attrs import frozen

from bitpress.checkpoint.engine_facts import EngineFacts, facts_of, is_embedding, is_head
from bitpress.checkpoint.layer_names import BLOCK, OUTSIDE
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import RecipeError
from bitpress.planning import draft_blocks, linear_layers
from bitpress.planning.layer_pattern import matches
from bitpress.planning.recipe import EMBEDDINGS, HEAD, Recipe


@frozen
class OuterLayer:
    """A layer outside the decoder blocks that a rule may name.

    Attributes:
        name: what a rule may call it in any model.
        what: the same in a sentence.
        option: that names a scheme for it.
        is_one: whether a layer of the files is one, as engines say, or else its name.
    """

    name: str
    what: str
    option: str
    is_one: Callable[[str, Iterable[EngineFacts]], bool]


OUTER_LAYERS = (
    OuterLayer(HEAD, "head", "--head", is_head),
    OuterLayer(EMBEDDINGS, "embeddings", "--embeddings", is_embedding),
)


def name_outer_layers(recipe: Recipe, source: Checkpoint, engines: Sequence[EngineFacts]) -> Recipe:
    """A recipe whose rules for the head and the embeddings have the names that these have in the
    files.

    Args:
        engines: the facts of engines for the model.

    Raises:
        RecipeError: there is a rule for one that is not stored.
    """
    for outer in OUTER_LAYERS:
        if not recipe.names(outer.name):
            continue
        found = _find_entry(outer, source, engines)
        if found is None:
            tied = ", which is tied to the embeddings" if outer.name == HEAD else ""
            raise RecipeError(
                f"{source.folder}: it stores no {outer.what}{tied}: leave {outer.name} out"
            )
        rules = (
            attrs.evolve(rule, match=_module(found)) if rule.match == outer.name else rule
            for rule in recipe.rules
        )
        recipe = attrs.evolve(recipe, rules=tuple(rules))
    return recipe


def find_outer_layers(
    recipe: Recipe, source: Checkpoint, engines: Sequence[EngineFacts]
) -> dict[str, Entry]:
    """The head and the embeddings, by their names, where rules name them: to compress them, or to
    leave them alone.

    Raises:
        RecipeError: an engine does not read one compressed, the embeddings' steps need data, or
            several of the head's do.
    """
    named = {}
    for outer in OUTER_LAYERS:
        entry = _find_entry(outer, source, engines)
        if entry is None or not recipe.names(_module(entry)):
            continue
        named[_module(entry)] = entry
        steps = recipe.steps(_module(entry))
        for step in steps if outer.name == EMBEDDINGS else ():
            if step.calibrated:
                raise RecipeError(
                    f"{_module(entry)} is compressed without data, and {step.scheme.name} needs "
                    "data with these options: set others, or take another scheme for it"
                )
        if len(steps) > 1 and any(step.calibrated for step in steps):
            raise RecipeError(
                f"{_module(entry)} can be fitted to data by one scheme alone, and not by "
                f"{'+'.join(step.scheme.name for step in steps)}: name one, or set options that "
                "need no data"
            )
        reason = _why_not_read(outer, entry, source, engines) if steps else None
        if reason:
            raise RecipeError(f"{source.folder}: {_module(entry)} cannot be compressed: {reason}")
    return named


def find_plain(source: Checkpoint, compressed: Collection[str]) -> list[tuple[OuterLayer, Entry]]:
    """What a rule could name, and is not compressed, though engines would read it so.

    Args:
        compressed: modules that are compressed already.
    """
    engines = facts_of(source.config)
    found = ((outer, _find_entry(outer, source, engines)) for outer in OUTER_LAYERS)
    return [
        (outer, entry)
        for outer, entry in found
        if entry is not None
        and _module(entry) not in compressed
        and not _why_not_read(outer, entry, source, engines)
    ]


def why_left_alone(outer: OuterLayer, source: Checkpoint, ignore: Sequence[str]) -> str | None:
    """Why no rule can compress such a layer of a checkpoint; None where one can.

    Args:
        ignore: patterns of layers to leave alone.
    """
    engines = facts_of(source.config)
    entry = _find_entry(outer, source, engines)
    if entry is None:
        is_tied = outer.name == HEAD and source.model_config.is_tied
        return "it is tied to the embeddings" if is_tied else "the model stores none"
    pattern = next((pattern for pattern in ignore if matches(_module(entry), pattern)), None)
    if pattern is not None:
        return f"ignored by {pattern!r}"
    return _why_not_read(outer, entry, source, engines)


def _find_entry(
    outer: OuterLayer, source: Checkpoint, engines: Sequence[EngineFacts]
) -> Entry | None:
    """The stored matrix with the most rows: a model may have embeddings of positions too."""
    entries = [
        entry
        for name, entry in source.entries.items()
        if name.endswith(".weight")
        and len(entry.shape) == 2
        and entry.dtype in linear_layers.FLOAT_DTYPES
        and not OUTSIDE.search(name)
        and not BLOCK.fullmatch(name)
        and outer.is_one(_module(entry), engines)
    ]
    return max(entries, key=lambda entry: entry.shape[0], default=None)


def _why_not_read(
    outer: OuterLayer, entry: Entry, source: Checkpoint, engines: Sequence[EngineFacts]
) -> str | None:
    """Why engines do not read a layer compressed; None where they do."""
    if source.model_config.is_tied:
        return "the head is tied to the embeddings, and engines do not read it compressed then"
    if draft_blocks.read_plain_layers(source.entries):
        return "vLLM's class for drafts reads it as it is"
    reasons = (facts.why_not_quantized(_module(entry)) for facts in engines)
    return next(filter(None, reasons), None)


def _module(entry: Entry) -> str:
    return entry.name.removesuffix(".weight")
