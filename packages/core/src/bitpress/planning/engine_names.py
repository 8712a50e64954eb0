"""Names for a quantization config that the files do not have, and under which an engine looks for
layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from bitpress.checkpoint.engine_facts import (
    EVERY_LINEAR,
    EngineFacts,
    EngineLayer,
    QuantizedLayers,
    facts_of,
)
from bitpress.checkpoint.layer_names import BLOCK, star
from bitpress.checkpoint.reader import Checkpoint
from bitpress.errors import CheckpointError


def names_to_ignore(
    facts: EngineFacts, listed: Sequence[str], plain: Iterable[str], compressed: Iterable[str]
) -> Iterator[str]:
    """Patterns for layers that an engine would take for quantized in spite of what is ignored.

    Args:
        listed: what `ignore` has already.
        plain: layers that are not compressed, by their names in the files.
        compressed: layers that are.
    """
    groups = {"all": {"targets": [EVERY_LINEAR]}}
    reading = QuantizedLayers.read(facts, {"ignore": listed, "config_groups": groups})
    missing: dict[str, list[str]] = {}
    names = [
        name for layer in _asked(facts, plain) if not layer.is_by_name for name in layer.asked_as
    ]
    for name in (*names, *facts.unnamed_examples):
        if reading.group(name) is not None:
            missing.setdefault(star(name), []).append(name)

    if not missing:
        return
    # A pattern takes in all blocks, unless some of them are compressed.
    quantized = {star(name) for layer in _asked(facts, compressed) for name in layer.asked_as}
    for pattern, missed in missing.items():
        for name in missed if pattern in quantized else [pattern]:
            yield _expression(name)


def names_to_target(facts: EngineFacts, listed: Sequence[str]) -> Iterator[str]:
    """Patterns for layers of a group that an engine does not find by their names in the files.

    Args:
        listed: the names in the files.
    """
    groups = {"all": {"targets": listed}}
    reading = QuantizedLayers.read(facts, {"config_groups": groups})
    for layer in _asked(facts, listed):
        for name in layer.asked_as:
            if reading.group(name, by_class=not layer.is_by_name) is None:
                yield _expression(name)


def require_names(source: Checkpoint, layers: Iterable[str]) -> None:
    """Raise CheckpointError where transformers, which runs models, finds no layer of the decoder's
    blocks by the name that it has in its block: a model is run in blocks of the files.

    Args:
        layers: of the blocks, by their names in the files.
    """
    names = {name: BLOCK.fullmatch(f"{name}.weight") for name in layers}
    for facts in facts_of(source.config):
        known = {
            match["inside"]: layer
            for name, match in names.items()
            if match and (layer := facts.layer(name)) is not None
        }
        is_found = any(
            asked.endswith(f".{inside}")
            for inside, layer in known.items()
            for asked in layer.asked_as
        )
        if facts.engine.startswith("transformers") and known and not is_found:
            raise CheckpointError(
                f"{source.folder}: {facts.engine} calls {next(iter(known))} and all other layers "
                "of a block by names that the files have not: a model of this layout cannot be run "
                "yet; schemes and options that need no data can be used (try --effort low)"
            )


def _asked(facts: EngineFacts, layers: Iterable[str]) -> Iterator[EngineLayer]:
    """The layers for which an engine asks how they are quantized."""
    for layer in map(facts.layer, layers):
        if layer is not None and layer.is_quantizable:
            yield layer


def _expression(name: str) -> str:
    return f"re:{re.escape(name)}$".replace(r"\*", r"\d+")
