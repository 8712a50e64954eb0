"""What transformers calls the tensors of a model's files: it renames some, and keeps a block's
experts in one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attrs import frozen
from torch import nn

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.reader import Checkpoint
from bitpress.errors import CheckpointError
from bitpress.modeling.experts import Experts


@frozen(eq=False)
class ParameterMap:
    """Where a model has what the files hold.

    Attributes:
        names: by the name of a parameter or buffer in the model, that in the files; in the order of
            the files.
        container: what the model calls the list of blocks.
        blocks: the blocks, whose layers are found by the names that they have in the files.
        merged: by the name of a parameter that the model makes of several tensors of the files, or
            of one in another form, their names.
    """

    names: Mapping[str, str]
    container: str
    blocks: list[nn.Module]
    merged: Mapping[str, list[str]]


def map_parameters(
    model: Any, checkpoint: Checkpoint, container: str, all_experts: bool
) -> ParameterMap:
    """Find what the files hold in a model, after experts that are layers of their own in the files
    have been made that in the model too.

    Args:
        container: what the files call the list of blocks.
        all_experts: whether an expert computes every token.

    Raises:
        CheckpointError: the model has no such list, or its experts compute in a way that is not
            known.
    """
    # by the name in the files, that in the model
    names = find_names(model, checkpoint.entries)
    shapes = {names[name]: checkpoint.entries[name].shape for name in names}
    _split_experts(model, shapes, all_experts)
    modules = dict(model.named_modules())
    model_container = _find_container(names, container, modules)
    if model_container is None:
        raise CheckpointError(
            f"{checkpoint.folder}: transformers' {type(model).__name__} has no list of blocks "
            f"{container!r}, under which the files name their layers: a model of this layout "
            "cannot be run yet; schemes and options that need no data can be used"
        )

    blocks = list(modules[model_container].children())
    for name, name_in_model in names.items():
        index = layer_names.block_index(name, container)
        # the model need not have all blocks of the files
        if index is None or index >= len(blocks):
            continue
        inside = name.removeprefix(f"{container}.{index}.")
        inside_model = name_in_model.removeprefix(f"{model_container}.{index}.")
        if inside_model not in (inside, name_in_model):
            _add_alias(blocks[index], inside_model.rpartition(".")[0], inside.rpartition(".")[0])
    return ParameterMap(
        {name_in_model: name for name, name_in_model in names.items()},
        model_container,
        blocks,
        _find_merged(model, checkpoint.entries),
    )


def find_names(model: Any, tensors: Iterable[str]) -> dict[str, str]:
    """By the name of each tensor of the files, what the model calls it.

    An expert's tensors, which the model fuses, are named as if its experts were modules of their
    own. Left out are tensors that the model makes something else of while it loads them.
    """
    names = {}
    for name, renamed, is_converted in _rename(model, tensors):
        match = _match_expert(name)
        if not is_converted:
            names[name] = renamed
        elif match:
            experts = renamed.rpartition(".")[0]
            names[name] = f"{experts}.{match['number']}.{match['leaf']}.weight"
    return names


def _find_merged(model: Any, tensors: Iterable[str]) -> dict[str, list[str]]:
    """By the name of a parameter, the tensors of which the model makes it while it loads them."""
    merged: dict[str, list[str]] = {}
    for name, renamed, is_converted in _rename(model, tensors):
        if is_converted and not _match_expert(name):
            merged.setdefault(renamed, []).append(name)
    return merged


def _rename(model: Any, tensors: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Each tensor of the files, what it becomes in the model, and whether it is changed in that."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        # before it had such a mapping, its models had the names of the files
        yield from ((name, name, False) for name in tensors)
        return
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state_dict, prefix = dict(model.state_dict()), str(getattr(model, "base_model_prefix", ""))
    for name in tensors:
        renamed, converter = rename_source_key(name, renamings, converters, prefix, state_dict)
        yield name, renamed, converter is not None


def _find_container(
    names: Mapping[str, str], container: str, modules: Mapping[str, nn.Module]
) -> str | None:
    """What the model calls the list of blocks; None where it has none.

    Args:
        names: by the name of a tensor in the files, that in the model.
        container: what the files call the list.
    """
    for name, name_in_model in names.items():
        if not name.startswith(f"{container}."):
            continue
        inside = name.removeprefix(container)
        candidate = name_in_model.removesuffix(inside)
        if name_in_model.endswith(inside) and isinstance(modules.get(candidate), nn.ModuleList):
            return candidate
    return None


def _split_experts(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], all_experts: bool
) -> None:
    """Replace modules with fused experts by such as have a layer for each weight of the files.

    Args:
        shapes: by the name of a tensor in the model.
    """
    # by module, expert and layer
    layers: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        match = _match_expert(name)
        if match and any(match["leaf"] in leaves for leaves in layer_names.EXPERT):
            experts = layers.setdefault(match["experts"], {})
            experts.setdefault(match["number"], {})[match["leaf"]] = shape

    modules = dict(model.named_modules())
    # the model need not have all blocks of the files
    for name in [name for name in layers if name in modules]:
        module = modules[name]
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if has_parameters and not isinstance(module, (nn.ModuleList, nn.Sequential)):
            by_number = dict(sorted(layers[name].items(), key=lambda item: int(item[0])))
            model.set_submodule(name, Experts(name, module, by_number, all_experts))


def _match_expert(tensor: str) -> re.Match[str] | None:
    """The parts of the name of an expert's weight."""
    if not tensor.endswith(".weight"):
        return None
    return layer_names.OF_EXPERT.fullmatch(tensor.removesuffix(".weight"))


def _add_alias(block: nn.Module, module: str, alias: str) -> None:
    """Let a module of a block be found by the name that the files give it, too.

    Names relative to the block, that differ in what they begin with: `mlp.experts.0.w1` is found by
    `block_sparse_moe.experts.0.w1` once `mlp` is found by `block_sparse_moe`.
    """
    if not module or not alias:
        # a parameter of the block itself
        return
    parts, alias_parts = module.split("."), alias.split(".")
    while len(parts) > 1 and len(alias_parts) > 1 and parts[-1] == alias_parts[-1]:
        parts.pop()
        alias_parts.pop()
    if alias_parts[: len(parts)] == parts or parts[: len(alias_parts)] == alias_parts:
        # it would be found inside itself
        return
    modules = dict(block.named_modules())
    parent = modules.get(".".join(alias_parts[:-1]))
    target = modules.get(".".join(parts))
    if parent is not None and target is not None and not hasattr(parent, alias_parts[-1]):
        parent.add_module(alias_parts[-1], target)
