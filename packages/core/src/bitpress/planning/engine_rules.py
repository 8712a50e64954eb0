"""What engines demand of a compressed-tensors checkpoint, told from the files alone; every rule
that is broken is a fault.

Nothing here knows how the files were made, so that a scheme's own mistake is found too. Facts: vLLM
0.32, transformers 5.17.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.safetensors import Entry

# the target that names the class of all linear layers
EVERY = "Linear"

PACKED = "pack-quantized"

NUMBERS = ("_scale", "_zero_point")

# where a layer's codes lie
CODES = ("weight", "weight_packed")

Read = Callable[[Entry], Tensor]

# what is stored of a module, by suffix
Stored = Mapping[str, Entry]


def faults(
    config: Mapping[str, Any], entries: Mapping[str, Entry], read: Read | None = None
) -> Iterator[str]:
    """The faults of a config and of the tensors that files hold; rules about numbers only where
    these can be read.
    """
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        modules.setdefault(module, {})[suffix] = entry
    compressed = {
        module: stored
        for module, stored in modules.items()
        if "weight_scale" in stored or "weight_packed" in stored
    }
    table = config.get(KEY)
    if not isinstance(table, dict):
        if compressed:
            yield f"config.json: it has no {KEY}, and {next(iter(compressed))} is stored compressed"
        return
    yield from _table(table)
    groups = {
        name: group
        for name, group in (table.get("config_groups") or {}).items()
        if isinstance(group, dict)
    }
    ignored = [str(pattern) for pattern in table.get("ignore") or ()]
    linear = compressed | {
        module: s for module, s in modules.items() if _plain(module, s) and module not in compressed
    }
    yield from (
        f"config.json: it ignores {name}, which is not there"
        for name in _absent(ignored, modules)
        if name != "lm_head"
    )
    for name, group in groups.items():
        yield from (
            f"config.json: {name} targets {target}, which is not there"
            for target in _absent(group.get("targets"), linear)
        )
    assigned = {}
    for module, stored in linear.items():
        found = (
            []
            if _matches(ignored, module)
            else [name for name, g in groups.items() if _matches(g.get("targets"), module)]
        )
        assigned[module] = found
        if module in compressed and len(found) != 1:
            yield (
                f"{module}: it is compressed, and {len(found) or 'none'} of the config's groups "
                "and ignored layers name it so"
            )
        elif module not in compressed and found:
            yield f"{module}: it is stored as it was, and the config says that it is compressed"
        elif found:
            yield from (f"{module}: {fault}" for fault in _layer(groups[found[0]], stored, read))
    yield from _fused(linear, assigned, groups, read)


# by kind of the weights' numbers: strategies of weights and inputs, and whether inputs are scaled
# as they come
EXPERTS = {
    ("float", 8): (
        ("tensor", "tensor", False),
        ("channel", "token", True),
        ("block", "group", True),
    ),
    ("int", 8): (("channel", "token", True),),
}


def of_experts(group: Mapping[str, Any] | None) -> str | None:
    """Why vLLM's kernels for experts do not take a layout that its other layers have; None where
    they do.

    Args:
        group: a layer's config fragment.
    """
    weights, inputs = (((group or {}).get(key) or {}) for key in ("weights", "input_activations"))
    known = EXPERTS.get((str(weights.get("type")), int(weights.get("num_bits") or 0)))
    found = (weights.get("strategy"), inputs.get("strategy"), bool(inputs.get("dynamic")))
    if known is None or not inputs or found in known:
        return None
    told = " or ".join(f"{w} with {'dynamic' if d else 'static'} {i}" for w, i, d in known)
    return (
        f"vLLM computes experts with {told} scales, and not {found[0]} with "
        f"{'dynamic' if found[2] else 'static'} {found[1]}"
    )


def _table(table: Mapping[str, Any]) -> Iterator[str]:
    if table.get("quant_method") != "compressed-tensors":
        yield (
            f"config.json: quant_method is {table.get('quant_method')!r}, not 'compressed-tensors'"
        )
    if table.get("sparsity_config") and not table.get("config_groups"):
        # weights without their zeros and nothing else: what older engines read has no more to it
        return
    if table.get("quantization_status") != "compressed":
        yield (
            "config.json: quantization_status is not 'compressed': transformers would leave "
            "random weights, without an error"
        )
    formats = {
        group.get("format")
        for group in (table.get("config_groups") or {}).values()
        if isinstance(group, dict)
    }
    if not formats:
        yield "config.json: it has no config_groups"
    elif table.get("format") != (next(iter(formats)) if len(formats) == 1 else "mixed-precision"):
        yield (
            f"config.json: its format is {table.get('format')!r}, and those of its groups are "
            f"{', '.join(map(str, formats))}"
        )


def _absent(patterns: Any, modules: Mapping[str, Stored]) -> Iterator[str]:
    """Patterns that match nothing; the head may be tied, and then is not there."""
    return (
        str(pattern)
        for pattern in patterns or ()
        if not any(_matches([pattern], module) for module in modules)
    )


def _layer(group: Mapping[str, Any], stored: Stored, read: Read | None) -> Iterator[str]:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    codes = next((stored[suffix] for suffix in CODES if suffix in stored), None)
    if codes is None or len(codes.shape) != 2:
        yield "there are no codes"
        return
    for name, said, wanted in (
        ("weight_zero_point", "weights", not weights.get("symmetric", True)),
        (
            "input_zero_point",
            "inputs",
            not inputs.get("symmetric", True) and inputs.get("dynamic") is False,
        ),
        (
            "input_scale",
            "inputs",
            inputs.get("dynamic") is False and inputs.get("strategy") == "tensor",
        ),
    ):
        if (name in stored) != wanted:
            yield (
                f"{name} is {'missing' if wanted else 'there'}, and the config's {said} say "
                "otherwise"
            )
    rows, width = codes.shape[0], codes.shape[1] if "weight" in stored else None
    if group.get("format") == PACKED:
        if "weight_shape" not in stored:
            yield "weight_shape is missing: transformers fails without it"
            return
        if read is None:
            return
        shape = tuple(read(stored["weight_shape"]).tolist())
        bits = int(weights.get("num_bits", 0))
        if len(shape) != 2 or shape[0] != rows or -(-shape[1] * bits // 32) != codes.shape[1]:
            yield (
                f"weight_shape says {list(shape)}, and the codes are {list(codes.shape)} words "
                f"of {bits}-bit numbers"
            )
            return
        width = shape[1]
    if width is not None:
        yield from _scales(weights, stored, rows, width)


def _scales(weights: Mapping[str, Any], stored: Stored, rows: int, width: int) -> Iterator[str]:
    """Whether the scale has the shape that its strategy needs; strategies that are not known here
    are let be.
    """
    strategy, group = weights.get("strategy"), weights.get("group_size") or width
    high, wide = weights.get("block_structure") or (rows, width)
    if strategy == "group" and width % group:
        yield f"{width} columns are no multiple of the group of {group}"
        return
    wanted = {
        "channel": (rows, 1),
        "tensor": (1,),
        "group": (rows, width // group),
        "block": (-(-rows // high), -(-width // wide)),
    }.get(str(strategy))
    if wanted is not None and stored["weight_scale"].shape != wanted:
        yield (
            f"weight_scale is {list(stored['weight_scale'].shape)}, and strategy {strategy} "
            f"needs {list(wanted)}"
        )


def _fused(
    linear: Mapping[str, Stored],
    assigned: Mapping[str, Sequence[str]],
    groups: Mapping[str, Any],
    read: Read | None,
) -> Iterator[str]:
    """Layers that engines make one of must be stored in one way, and numbers that they then share
    must be equal.
    """
    for members in layer_names.fused(linear):
        if len(members) == 1:
            continue
        if len({tuple(assigned[m]) for m in members}) > 1:
            yield (
                f"{members[0]}: engines fuse it with {', '.join(members[1:])}, and these are "
                "stored in other ways"
            )
            continue
        fused = {module: linear[module] for module in members}
        yield from _blocks(fused, groups[assigned[members[0]][0]] if assigned[members[0]] else {})
        if read is not None:
            yield from _shared(fused, read)


def _blocks(members: Mapping[str, Stored], group: Mapping[str, Any]) -> Iterator[str]:
    block = ((group.get("weights") or {}).get("block_structure") or [1])[0]
    for module, stored in members.items():
        rows = stored["weight"].shape[0] if "weight" in stored else block
        if rows % block:
            yield (
                f"{module}: {rows} rows are no multiple of {block}, the height of a block, and "
                "engines fuse it with others"
            )


def _shared(members: Mapping[str, Stored], read: Read) -> Iterator[str]:
    """Numbers for a whole layer, which differ between the layers; one of a matrix of scales may be
    the only one, and its own.
    """
    (first, theirs), *others = members.items()
    for suffix in [
        name
        for name, entry in theirs.items()
        if entry.shape in ((), (1,)) and name.endswith(NUMBERS)
    ]:
        number = read(theirs[suffix]).reshape(1)
        for module, stored in others:
            if suffix in stored and not number.equal(read(stored[suffix]).reshape(-1)):
                yield (
                    f"{module}: its {suffix} is not that of {first}, and engines keep one of "
                    "them for both"
                )


def _plain(module: str, stored: Stored) -> bool:
    """Whether a module is a linear layer that is stored as it was, as far as names and shapes
    tell.
    """
    weight = stored.get("weight")
    return (
        weight is not None and len(weight.shape) == 2 and "embed" not in module.rpartition(".")[2]
    )


def _matches(patterns: Any, module: str) -> bool:
    return any(
        re.match(pattern[3:], module) is not None
        if pattern.startswith("re:")
        else pattern in (EVERY, module)
        for pattern in map(str, patterns or ())
    )
