"""A model folder as schemes read it: one matrix (out, in) for each linear layer, in whatever form
the files hold it.
"""

from __future__ import annotations

from collections.abc import Container

import attrs
from attrs import frozen

from bitpress.checkpoint import fp8_source, fused_experts
from bitpress.checkpoint.model_config import without_quantization
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.views import View


@frozen(eq=False, slots=False)
class Source(Checkpoint):
    """A checkpoint some of whose tensors are views.

    Attributes:
        unsplit: experts that stay in one tensor, and why.
        original: the model before its hidden states were rotated; None where they were not.
    """

    unsplit: tuple[fused_experts.UnsplitExperts, ...] = ()
    original: Source | None = None


def resolve_source(checkpoint: Checkpoint) -> Source:
    """The checkpoint with views of weights in FP8 and of fused experts; a Source as it is.

    Raises:
        CheckpointError: it is in FP8, and not in the layout that its config describes.
    """
    if isinstance(checkpoint, Source):
        return checkpoint
    if fp8_source.is_fp8(checkpoint.config):
        checkpoint = attrs.evolve(
            checkpoint,
            entries=fp8_source.view_dequantized(checkpoint),
            config=without_quantization(checkpoint.config),
        )
    return split_experts(checkpoint)


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
