"""What engines demand of a compressed-tensors checkpoint, checked on its files alone.

Nothing here knows how the files were made, so that a scheme's own mistake is found too. The rules
are those of vLLM 0.32 and transformers 5.17, unless a comment names another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.engine_facts import (
    EVERY_LINEAR,
    NamePatterns,
    QuantizedLayers,
    facts_of,
    fused_leaves,
    is_embedding,
)
from bitpress.checkpoint.filenames import CONFIG
from bitpress.checkpoint.model_config import KEY, ModelConfig
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import Fault
from bitpress.planning import config_rules, draft_blocks, engine_layers
from bitpress.planning.engine_layers import (
    BITMASK,
    CODES,
    PACKED_FORMAT,
    ConfigGroup,
    LinearLayers,
    ModuleTensors,
    is_compressed,
)

# Endings of tensors that two layers share once an engine has fused them.
SHARED_SUFFIXES = ("_scale", "_zero_point")

# What vLLM's kernels for experts take, by type and width of the weights' numbers: the strategy of
# the weights, that of the inputs, and whether inputs are scaled as they come (dynamic).
EXPERT_LAYOUTS = {
    ("float", 8): (
        ("tensor", "tensor", False),
        ("channel", "token", True),
        ("block", "group", True),
        ("group", "group", True),
    ),
    ("int", 8): (("channel", "token", True),),
}

ReadTensor = Callable[[Entry], Tensor]


def find_faults(
    config: Mapping[str, Any], entries: Mapping[str, Entry], read: ReadTensor | None = None
) -> Iterator[Fault]:
    """Every rule of the engines that a checkpoint breaks.

    Args:
        config: the content of `config.json`.
        entries: the tensors that the weight files hold, by name.
        read: returns a tensor's numbers; without it, rules about numbers are not checked.
    """
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = entry
    compressed = {m: tensors for m, tensors in modules.items() if is_compressed(tensors)}

    table = config.get(KEY)
    if not isinstance(table, dict):
        if compressed:
            yield Fault(
                CONFIG,
                f"it has no {KEY}, and {next(iter(compressed))} is stored compressed",
            )
        return
    yield from config_rules.find_table_faults(table)
    name_faults = list(config_rules.find_name_faults(table))
    yield from name_faults
    if name_faults:
        return

    engines = facts_of(config)
    dense = {
        module: tensors
        for module, tensors in modules.items()
        if module not in compressed and _is_matrix(tensors) and not is_embedding(module, engines)
    }
    ignored = list(map(str, table.get("ignore") or ()))
    tables = (table.get("config_groups") or {}).items()
    groups = {name: group for name, group in tables if isinstance(group, dict)}
    linear = compressed | dense
    ignored_patterns = NamePatterns.parse(ignored)
    targets = {
        name: NamePatterns.parse(group.get("targets") or ()) for name, group in groups.items()
    }
    groups_of = {module: _groups_of(module, ignored_patterns, targets) for module in linear}
    layers = LinearLayers(linear, groups, groups_of, engines)
    drafts = draft_blocks.names_in_vllm(entries, ModelConfig.from_json(config).num_layers)
    yield from _check_patterns(layers, ignored, entries, drafts.values())
    yield from _check_layers(layers, read)
    for module, name in drafts.items():
        if _groups_of(name, ignored_patterns, targets):
            yield Fault(module, f"vLLM looks for it as {name}, which the config does not ignore")
    for facts in layers.engines:
        reading = QuantizedLayers.read(facts, table)
        yield from engine_layers.check_engine(reading, layers, entries)
    yield from _check_fused_layers(layers, read)


def explain_expert_layout(group: ConfigGroup | None) -> str | None:
    """Why vLLM's kernels for experts do not take a layout that its other layers have.

    Args:
        group: a layer's config fragment.

    Returns:
        The reason, or None where they take it.
    """
    weights = (group or {}).get("weights") or {}
    inputs = (group or {}).get("input_activations") or {}
    supported = EXPERT_LAYOUTS.get((str(weights.get("type")), int(weights.get("num_bits") or 0)))
    strategies = (weights.get("strategy"), inputs.get("strategy"), bool(inputs.get("dynamic")))
    if supported is None or not inputs or strategies in supported:
        return None
    supported_text = " or ".join(
        f"{weight} with {'dynamic' if dynamic else 'static'} {activation}"
        for weight, activation, dynamic in supported
    )
    weight, activation, dynamic = strategies
    return (
        f"vLLM computes experts with {supported_text} scales, and not {weight} with "
        f"{'dynamic' if dynamic else 'static'} {activation}"
    )


def _check_patterns(
    layers: LinearLayers,
    ignored: Sequence[str],
    entries: Mapping[str, Entry],
    drafts: Collection[str],
) -> Iterator[Fault]:
    """Whether each name and expression of the config is a layer's, of the files or of an engine.

    Args:
        drafts: names of others in vLLM.
    """
    modules = {name.rpartition(".")[0] for name in entries}
    # A head that is tied to the embeddings is ignored and stores nothing.
    missing = [("it ignores", name) for name in _unmatched(ignored, modules) if name != "lm_head"]
    for group, table in layers.groups.items():
        unmatched = _unmatched(table.get("targets"), layers.tensors)
        missing += [(f"{group} targets", name) for name in unmatched]
    if not missing:
        return
    engine_names = engine_layers.names_in_engines(layers, entries) | {*drafts}
    unknown = set(_unmatched((name for _, name in missing), engine_names))
    for text, name in missing:
        if name in unknown:
            yield Fault(CONFIG, f"{text} {name}, which is not there")


def _check_layers(layers: LinearLayers, read: ReadTensor | None) -> Iterator[Fault]:
    """Whether every compressed layer, and no other, has one group, and is stored as it says."""
    for module, tensors in layers.tensors.items():
        names = layers.groups_of[module]
        is_stored_compressed = is_compressed(tensors)
        if is_stored_compressed and len(names) != 1:
            yield Fault(
                module,
                f"it is compressed, and {len(names) or 'none'} of the config's groups and ignored "
                "layers name it so",
            )
        elif not is_stored_compressed and names:
            # Engines that know the layer may look for it by another name.
            if not layers.engines or any(facts.layer(module) is None for facts in layers.engines):
                yield Fault(
                    module, "it is stored as it was, and the config says that it is compressed"
                )
        elif names:
            for text in _check_layer(layers.groups[names[0]], tensors, read):
                yield Fault(module, text)


def _check_layer(
    group: ConfigGroup, tensors: ModuleTensors, read: ReadTensor | None
) -> Iterator[str]:
    if BITMASK in tensors:
        # Its other tensors are those of a layer with zeros, of which its codes do not tell the
        # shape.
        yield from _check_optional_tensors(group, tensors)
        return
    codes = next((tensors[suffix] for suffix in CODES if suffix in tensors), None)
    if codes is None or len(codes.shape) != 2:
        yield "there are no codes"
        return
    yield from _check_optional_tensors(group, tensors)

    rows = codes.shape[0]
    if group.get("format") != PACKED_FORMAT:
        # Other packed formats have widths of their own, and their scales are not checked.
        if "weight" in tensors:
            yield from _check_scale_shape(group, tensors, rows, codes.shape[1])
        return

    # transformers unpacks by `weight_shape`: the words do not say how many columns there are.
    if "weight_shape" not in tensors:
        yield "weight_shape is missing: transformers fails without it"
        return
    if read is None:
        return
    shape = tuple(read(tensors["weight_shape"]).tolist())
    num_bits = int((group.get("weights") or {}).get("num_bits", 0))
    if len(shape) != 2 or shape[0] != rows or -(-shape[1] * num_bits // 32) != codes.shape[1]:
        yield (
            f"weight_shape says {list(shape)}, and the codes are {list(codes.shape)} words of "
            f"{num_bits}-bit numbers"
        )
        return
    yield from _check_scale_shape(group, tensors, rows, shape[1])


def _check_optional_tensors(group: ConfigGroup, tensors: ModuleTensors) -> Iterator[str]:
    """Whether zero points and static scales are stored where the config asks for them, and only
    there: loaders make parameters by the config, and fail over one that is missing or too many.
    """
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    is_static = inputs.get("dynamic") is False
    for name, subject, is_expected in (
        ("weight_zero_point", "weights", not weights.get("symmetric", True)),
        ("input_zero_point", "inputs", is_static and not inputs.get("symmetric", True)),
        ("input_scale", "inputs", is_static and inputs.get("strategy") == "tensor"),
    ):
        if (name in tensors) != is_expected:
            yield (
                f"{name} is {'missing' if is_expected else 'there'}, and the config's {subject} "
                "say otherwise"
            )


def _check_scale_shape(
    group: ConfigGroup, tensors: ModuleTensors, rows: int, columns: int
) -> Iterator[str]:
    """Whether the scale has the shape that its strategy needs; unknown strategies pass."""
    weights = group.get("weights") or {}
    strategy, group_size = weights.get("strategy"), weights.get("group_size") or columns
    block_rows, block_columns = weights.get("block_structure") or (rows, columns)
    if strategy == "group" and columns % group_size:
        yield f"{columns} columns are no multiple of the group of {group_size}"
        return
    expected = {
        "channel": (rows, 1),
        "tensor": (1,),
        "group": (rows, columns // group_size),
        "block": (-(-rows // block_rows), -(-columns // block_columns)),
    }.get(str(strategy))
    if expected is not None and tensors["weight_scale"].shape != expected:
        yield (
            f"weight_scale is {list(tensors['weight_scale'].shape)}, and strategy {strategy} needs "
            f"{list(expected)}"
        )


def _check_fused_layers(layers: LinearLayers, read: ReadTensor | None) -> Iterator[Fault]:
    """Whether layers that engines make one of are stored in one way, with equal shared numbers."""
    for members in layer_names.find_fused(layers.tensors, fused_leaves(layers.engines)):
        if len(members) == 1:
            continue

        # vLLM gives a fused layer one scheme, and raises where its parts have several.
        if len({tuple(layers.groups_of[member]) for member in members}) > 1:
            yield Fault(
                members[0],
                f"engines fuse it with {', '.join(members[1:])}, and these are stored in other "
                "ways",
            )
            continue

        fused = {module: layers.tensors[module] for module in members}
        names = layers.groups_of[members[0]]
        yield from _check_block_rows(fused, layers.groups[names[0]] if names else {})
        if read is not None:
            yield from _check_shared_numbers(fused, read)


def _check_block_rows(members: Mapping[str, ModuleTensors], group: ConfigGroup) -> Iterator[Fault]:
    """VLLM raises where a block of a fused layer would hold rows of two of its parts."""
    block_rows = ((group.get("weights") or {}).get("block_structure") or [1])[0]
    for module, tensors in members.items():
        rows = tensors["weight"].shape[0] if "weight" in tensors else block_rows
        if rows % block_rows:
            yield Fault(
                module,
                f"{rows} rows are no multiple of {block_rows}, the height of a block, and engines "
                "fuse it with others",
            )


def _check_shared_numbers(
    members: Mapping[str, ModuleTensors], read: ReadTensor
) -> Iterator[Fault]:
    """VLLM keeps one number for the whole fused layer, and takes that of one part for all."""
    (first, first_tensors), *others = members.items()
    # A scale of shape (1, 1) is the only one of a matrix of scales, which is not shared.
    shared = [
        suffix
        for suffix, entry in first_tensors.items()
        if entry.shape in ((), (1,)) and suffix.endswith(SHARED_SUFFIXES)
    ]
    for suffix in shared:
        number = read(first_tensors[suffix]).reshape(1)
        for module, tensors in others:
            if suffix in tensors and not number.equal(read(tensors[suffix]).reshape(-1)):
                yield Fault(
                    module,
                    f"its {suffix} is not that of {first}, and engines keep one of them for both",
                )


def _groups_of(
    module: str, ignored: NamePatterns, targets: Mapping[str, NamePatterns]
) -> list[str]:
    """The groups that a layer is in by its name in the files."""
    if ignored.match(module):
        return []
    return [
        group
        for group, patterns in targets.items()
        if EVERY_LINEAR in patterns.names or patterns.match(module)
    ]


def _is_matrix(tensors: ModuleTensors) -> bool:
    weight = tensors.get("weight")
    return weight is not None and len(weight.shape) == 2


def _unmatched(patterns: Any, modules: Collection[str]) -> Iterator[str]:
    for pattern in map(str, patterns or ()):
        is_name = pattern == EVERY_LINEAR or pattern in modules
        if not is_name and not any(map(NamePatterns.parse([pattern]).match, modules)):
            yield pattern
