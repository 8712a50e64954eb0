"""What a source that is published in fewer bits than 16 has lost already, and what more bits would
not bring back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from bitpress.checkpoint.dequantized_source import DequantizedView
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.source import Source
from bitpress.errors import RecipeError
from bitpress.planning.layout import Stack

# Formats of as many bits differ in their scales: MXFP4 has 4.25 bits per weight, and NVFP4 4.5.
MAX_GROWTH = 1.15


def require_fewer_bits(source: Source, stacks: Iterable[Stack]) -> None:
    """Raise RecipeError where a layer would be stored in more bits than the source holds it in."""
    for stack in stacks:
        for module, entry in stack.members.items():
            bits = stored_bits(entry)
            planned = 8 * stack.stored_bytes(module) / entry.numel
            if source.method and planned > MAX_GROWTH * bits:
                raise RecipeError(
                    f"layer {module}: the source holds it in {bits:.3g} bits per weight "
                    f"({source.method}), and it would be stored in {planned:.3g}: larger, and no "
                    "better; take a scheme of fewer bits, or ask for it with --more-bits"
                )


def describe_source(source: Source, stacks: Collection[Stack]) -> Iterator[str]:
    """What a user should know of a source's weights: what they have lost, which codes are kept, and
    what grows.
    """
    if not source.method:
        return
    weights = find_quantized(source)
    if weights:
        bits = (
            8 * sum(entry.file_bytes for entry in weights) / sum(entry.numel for entry in weights)
        )
        yield (
            f"{len(weights)} tensors of the source hold {bits:.3g} bits per weight "
            f"({source.method}): what they lost stays lost"
        )
    yield from _describe_codes(stacks)
    names = {entry.name for stack in stacks for entry in stack.members.values()}
    if grown := [entry for entry in weights if entry.name not in names]:
        num_bytes = sum(entry.nbytes - entry.file_bytes for entry in grown)
        yield (
            f"{len(grown)} of them are not compressed and become {grown[0].dtype} "
            f"({num_bytes / 1e9:.2f} GB more, first: {grown[0].name})"
        )
    yield from source.remarks


def _describe_codes(stacks: Iterable[Stack]) -> Iterator[str]:
    """Of how many layers the codes are kept, and of how many they could be with other options."""
    num_kept, rounded = 0, []
    for stack in stacks:
        num_kept += len(stack.members) if stack.keeps_codes else 0
        for module, entry in stack.members.items():
            form = entry.weight.form if isinstance(entry, DequantizedView) else None
            if form and not stack.keeps_codes and form.bits == stack.steps[-1].options.bits:
                rounded.append((module, form))
    if num_kept:
        yield f"{num_kept} layers keep the source's codes, to the bit: no data moves their weights"
    if rounded:
        module, form = rounded[0]
        yield (
            f"{len(rounded)} layers have codes of as many bits already and are rounded again "
            f"(first: {module}, which has {form}): a scheme with options of that form keeps them"
        )


def find_quantized(source: Source) -> list[Entry]:
    """The tensors that the files hold in fewer bits than they are read in."""
    return [entry for entry in source.entries.values() if entry.file_bytes < entry.nbytes]


def stored_bits(entry: Entry) -> float:
    """Bits per weight of what the files hold of a tensor, scales included."""
    return 8 * entry.file_bytes / max(entry.numel, 1)
