"""A model folder as schemes see it: matrices (out, in), one for each linear layer, in whatever form
the files hold them.
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


@frozen(eq=False)
class Source(Checkpoint):
    """A checkpoint some of whose tensors are views.

    Attributes:
        left: modules whose experts stay fused, and why.
    """

    left: tuple[fused_experts.Fused, ...] = ()


def seen(checkpoint: Checkpoint) -> Source:
    """A checkpoint with views of what its files hold in another form; itself where it has them
    already.

    Raises:
        CheckpointError: it is in FP8, and not as its config says.
    """
    if isinstance(checkpoint, Source):
        return checkpoint
    if fp8_source.readable(checkpoint.config):
        checkpoint = attrs.evolve(
            checkpoint,
            entries=fp8_source.dequantized(checkpoint),
            config=without_quantization(checkpoint.config),
        )
    return unfolded(checkpoint)


def unfolded(checkpoint: Checkpoint) -> Source:
    """A checkpoint with views of the experts in fused tensors, where engines read them one by
    one.
    """
    views, left = fused_experts.unfolded(checkpoint)
    entries: dict[str, Entry] = {}
    for name, entry in checkpoint.entries.items():
        entries |= {view.name: view for view in views[name]} if name in views else {name: entry}
    return Source(
        checkpoint.folder,
        checkpoint.config,
        checkpoint.headers,
        entries,
        checkpoint.others,
        tuple(left),
    )


def kept_fused(source: Checkpoint, compressed: Container[str]) -> Checkpoint:
    """The source with experts fused again of which none is compressed: they are copied as they
    are.
    """
    entries: dict[str, Entry] = {}
    for name, entry in source.entries.items():
        whole = entry.whole if isinstance(entry, View) else None
        if whole is None or name.removesuffix(".weight") in compressed:
            entries[name] = entry
        else:
            entries[whole.name] = whole
    return attrs.evolve(source, entries=entries)
