"""Whether engines take for quantized what a checkpoint stores so, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from bitpress.checkpoint.engine_facts import (
    EMBEDDING_KIND,
    EngineFacts,
    EngineLayer,
    QuantizedLayers,
)
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import Fault

# compressed-tensors' format of integers in 32-bit words.
PACKED_FORMAT = "pack-quantized"

# Tensors that hold a layer's codes.
CODES = ("weight", "weight_packed")

# The tensor that says where a layer's codes are, if its zeros are not stored.
BITMASK = "bitmask"

# The tensors of one module, by the last part of their names.
ModuleTensors = Mapping[str, Entry]

ConfigGroup = Mapping[str, Any]


@frozen
class LinearLayers:
    """The linear layers of a checkpoint, and what its config says of them.

    Attributes:
        tensors: of every linear layer, the compressed ones first.
        groups: the config's groups by name.
        groups_of: names of the groups that a layer belongs to; one for a compressed layer.
        engines: the facts of the engines that know the model.
    """

    tensors: Mapping[str, ModuleTensors]
    groups: Mapping[str, ConfigGroup]
    groups_of: Mapping[str, Sequence[str]]
    engines: Sequence[EngineFacts]


def is_compressed(tensors: ModuleTensors) -> bool:
    """Whether a layer is stored compressed."""
    return not tensors.keys().isdisjoint(("weight_scale", "weight_packed", BITMASK))


def names_in_engines(layers: LinearLayers, entries: Mapping[str, Entry]) -> set[str]:
    """What engines call the layers of the files, and heads that files need not hold."""
    names = {name for facts in layers.engines for name in (*facts.tied, *facts.unnamed_examples)}
    for name in {*layers.tensors, *(name.removesuffix(".weight") for name in entries)}:
        for layer in filter(None, (facts.layer(name) for facts in layers.engines)):
            names.update(layer.asked_as)
    return names


def check_engine(
    config: QuantizedLayers, layers: LinearLayers, entries: Mapping[str, Entry]
) -> Iterator[Fault]:
    """Whether an engine takes for quantized what is stored so, and nothing else."""
    for module in layers.tensors:
        if layer := config.facts.layer(module):
            yield from _check_engine_layer(config, layers, module, layer)
    for example in config.facts.unnamed_examples:
        if config.group(example) is not None:
            yield Fault(
                example,
                f"{config.facts.engine} makes it of other tensors, and takes it for quantized, "
                "since the config does not ignore it",
            )
    for head, embedding in config.facts.tied.items():
        if f"{head}.weight" not in entries and config.group(head) is not None:
            yield Fault(
                head,
                f"it is tied to {embedding} and not stored, and {config.facts.engine} takes it for "
                "quantized, since the config does not ignore it",
            )


def _check_engine_layer(
    config: QuantizedLayers, layers: LinearLayers, module: str, layer: EngineLayer
) -> Iterator[Fault]:
    engine = config.facts.engine
    is_stored_compressed = is_compressed(layers.tensors[module])
    reason = config.facts.why_not_quantized(module)
    if is_stored_compressed:
        if reason is not None:
            yield Fault(module, f"it is compressed, and must be stored as it was: {reason}")
        yield from _check_limits(config.facts, module, layers.tensors[module])
        for group in layers.groups_of[module] if layer.kind == EMBEDDING_KIND else ():
            if text := explain_embedding_layout(layers.groups[group]):
                yield Fault(module, text)
    if reason is not None or not layer.is_quantizable:
        return

    names = ", ".join(layer.asked_as)
    groups = config.groups_of(layer)
    stored_groups: list[str | None] = list(layers.groups_of[module]) or [None]
    if not is_stored_compressed and groups != [None]:
        yield Fault(
            module,
            f"it is stored as it was, and {engine}, which looks for it as {names}, takes it for "
            "quantized",
        )
    elif is_stored_compressed and groups != stored_groups:
        yield Fault(
            module,
            f"it is compressed, and {engine}, which looks for it as {names}, takes it for "
            f"{'plain' if groups == [None] else 'something else'}",
        )


def explain_embedding_layout(group: ConfigGroup | None) -> str | None:
    """Why vLLM does not look up rows of a layout that its linear layers may have.

    Args:
        group: a layer's config fragment.

    Returns:
        The reason, or None where it does.
    """
    weights = (group or {}).get("weights") or {}
    is_read = (
        (group or {}).get("format") == PACKED_FORMAT
        and weights.get("type") == "int"
        and weights.get("symmetric", True)
        and weights.get("strategy") in ("channel", "group")
        and not (group or {}).get("input_activations")
    )
    if is_read:
        return None
    return "vLLM reads embeddings in symmetric packed integers alone, of plain inputs"


def _check_limits(facts: EngineFacts, module: str, tensors: ModuleTensors) -> Iterator[Fault]:
    """Whether an engine can read every tensor of a compressed layer."""
    shapes = [tensors[suffix].shape for suffix in CODES if suffix in tensors]
    num_rows = shapes[0][0] if shapes and shapes[0] else 0
    for suffix in sorted(tensors.keys() - {"bias"}):
        spec = tensors[suffix].spec
        if limit := facts.why_unreadable(module, suffix, spec, num_rows):
            yield Fault(module, f"{limit}, and {suffix} is {spec}")
