"""A model folder as schemes read it: one matrix (out, in) for each linear layer, in whatever form
the files hold it.
"""

from __future__ import annotations

from collections.abc import Container

import attrs
from attrs import frozen

from bitpress.checkpoint import fused_experts, source_formats
from bitpress.checkpoint.dequantized_source import dequantize
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.views import View
from bitpress.errors import CheckpointError


@frozen(eq=False, slots=False)
class Source(Checkpoint):
    """A checkpoint some of whose tensors are views.

    Attributes:
        unsplit: experts that stay in one tensor, and why.
        method: what it was quantized with; None where it was not.
        remarks: what is lost by reading it as the model that it stands for.
        original: the model before its hidden states were rotated; None where they were not.
    """

    unsplit: tuple[fused_experts.UnsplitExperts, ...] = ()
    method: str | None = None
    remarks: tuple[str, ...] = ()
    original: Source | None = None


def resolve_source(checkpoint: Checkpoint) -> Source:
    """The checkpoint with views of quantized weights, where an installed source format reads them,
    and of fused experts; a Source as it is.

    Raises:
        CheckpointError: the files are not as the format that its config names.
    """
    if isinstance(checkpoint, Source):
        return checkpoint
    specs = {name: entry.spec for name, entry in checkpoint.entries.items()}
    found = source_formats.discover_formats().find(checkpoint.folder, checkpoint.config, specs)
    if found is None:
        return split_experts(checkpoint)
    source = split_experts(dequantize(checkpoint, found))
    return attrs.evolve(source, method=found.method, remarks=tuple(found.remarks))


def require_readable(source: Checkpoint) -> None:
    """Raise CheckpointError where a source is quantized, and no source format reads it."""
    if (method := source.model_config.quantization_method) is None:
        return
    raise CheckpointError(
        f"{source.folder} is already quantized ({method}), and "
        f"{source_formats.discover_formats().explain(method)}; or start from the original"
    )


def split_experts(checkpoint: Checkpoint) -> Source:
    """The checkpoint with a view of every expert of a fused tensor, where engines read experts one
    by one.
    """
    views, unsplit = fused_experts.split_experts(checkpoint)
    entries: dict[str, Entry] = {}
    for name, entry in checkpoint.entries.items():
        entries |= {view.name: view for view in views[name]} if name in views else {name: entry}
    return Source(
        checkpoint.folder,
        checkpoint.config,
        checkpoint.headers,
        entries,
        checkpoint.side_files,
        checkpoint.left_files,
        tuple(unsplit),
    )


def fuse_uncompressed_experts(source: Checkpoint, compressed: Container[str]) -> Checkpoint:
    """The source without the views of fused tensors of which no expert is compressed: these tensors
    are copied as they are.

    Args:
        compressed: module names.
    """
    entries: dict[str, Entry] = {}
    for name, entry in source.entries.items():
        fused = entry.whole if isinstance(entry, View) else None
        if fused is None or name.removesuffix(".weight") in compressed:
            entries[name] = entry
        else:
            entries[fused.name] = fused
    return attrs.evolve(source, entries=entries)
