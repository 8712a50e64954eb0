"""What transformers calls the tensors of a model's files: it renames some, and keeps a block's
experts in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import frozen
from torch import nn

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.reader import Checkpoint
from bitpress.errors import CheckpointError
from bitpress.modeling.experts import Experts


@frozen(eq=False)
class Layout:
    """Where a model has what the files hold.

    Attributes:
        names: by the name of a parameter or buffer in the model, that in the files; in the order of
            the files.
        container: what the model calls the list of blocks.
        blocks: the blocks, whose layers are found by the names that they have in the files.
    """

    names: Mapping[str, str]
    container: str
    blocks: list[nn.Module]


def lay_out(model: Any, checkpoint: Checkpoint, container: str, everything: bool) -> Layout:
    """The layout of a model whose blocks' experts have been made layers of their own, where they
    are that in the files.

    Args:
        container: what the files call the list of blocks.
        everything: whether an expert computes every token.

    Raises:
        CheckpointError: the model has no such list, or its experts compute in a way that is not
            known.
    """
    found = names_in_model(model, checkpoint.entries)
    _unfold(
        model, {ours: checkpoint.entries[name].shape for name, ours in found.items()}, everything
    )
    inside = {
        name: name.removeprefix(container) for name in found if name.startswith(f"{container}.")
    }
    lists = dict.fromkeys(
        found[name].removesuffix(end) for name, end in inside.items() if found[name].endswith(end)
    )
    modules = dict(model.named_modules())
    ours = next((name for name in lists if isinstance(modules.get(name), nn.ModuleList)), None)
    if ours is None:
        raise CheckpointError(
            f"{checkpoint.folder}: transformers' {type(model).__name__} has no list of blocks "
            f"{container!r}, under which the files name their layers: this layout cannot be "
            "calibrated yet"
        )
    blocks = list(modules[ours].children())
    for name in inside:
        index = layer_names.block_index(name, container)
        known, theirs = (
            found[name].removeprefix(f"{ours}.{index}."),
            name.removeprefix(f"{container}.{index}."),
        )
        if known not in (theirs, found[name]) and index is not None and index < len(blocks):
            _make_findable(blocks[index], known.rpartition(".")[0], theirs.rpartition(".")[0])
    return Layout({ours: name for name, ours in found.items()}, ours, blocks)


def _unfold(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], everything: bool) -> None:
    layers: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    for ours, shape in shapes.items():
        if (place := _of_expert(ours)) and any(
            place["leaf"] in leaves for leaves in layer_names.EXPERT
        ):
            layers.setdefault(place["experts"], {}).setdefault(place["number"], {})[
                place["leaf"]
            ] = shape
    modules = dict(model.named_modules())
    # the model need not have all blocks of the files
    for name in [name for name in layers if name in modules]:
        fused = modules[name]
        if (
            not isinstance(fused, (nn.ModuleList, nn.Sequential))
            and next(fused.parameters(recurse=False), None) is not None
        ):
            ordered = dict(sorted(layers[name].items(), key=lambda item: int(item[0])))
            model.set_submodule(name, Experts(name, fused, ordered, everything))


def names_in_model(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """By the name of each tensor of the files, what the model calls it.

    An expert's tensors, which the model fuses, are named as if its experts were modules of their
    own. Left out are tensors that the model makes something else of while it loads them.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        # before it had such a mapping, its models had the names of the files
        return {name: name for name in tensors}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known, prefix = dict(model.state_dict()), str(getattr(model, "base_model_prefix", ""))
    found = {}
    for name in tensors:
        renamed, converted = rename_source_key(name, renamings, converters, prefix, known)
        if converted is None:
            found[name] = renamed
        elif place := _of_expert(name):
            found[name] = f"{renamed.rpartition('.')[0]}.{place['number']}.{place['leaf']}.weight"
    return found


def _of_expert(tensor: str) -> re.Match[str] | None:
    """The place of an expert's weight among the experts of a block."""
    return (
        layer_names.OF_EXPERT.fullmatch(tensor.removesuffix(".weight"))
        if tensor.endswith(".weight")
        else None
    )


def _make_findable(block: nn.Module, module: str, by: str) -> None:
    """Let a module of a block be found by the name that the files give it, too.

    Names relative to the block, that differ in what they begin with: `mlp.experts.0.w1` is found by
    `block_sparse_moe.experts.0.w1` once `mlp` is found by `block_sparse_moe`.
    """
    ours, theirs = module.split("."), by.split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    if theirs[: len(ours)] == ours or ours[: len(theirs)] == theirs:
        # it would be found inside itself
        return
    modules = dict(block.named_modules())
    parent = modules.get(".".join(theirs[:-1]))
    if parent is not None and not hasattr(parent, theirs[-1]) and ".".join(ours) in modules:
        parent.add_module(theirs[-1], modules[".".join(ours)])
