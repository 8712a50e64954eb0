"""Which tensors of a checkpoint are linear layers of the decoder blocks, and which of them read the
same input.

Known from names and shapes alone. Layers that read the same input, and that engines fuse into one,
form a stack.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from bitpress.checkpoint.header import Entry
from bitpress.checkpoint.reader import Checkpoint
from bitpress.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32", "F64")
# what vLLM loads into one weight, in its order of rows
FUSED: Sequence[Sequence[str]] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
EXPERT: Sequence[Sequence[str]] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("up_proj", "down_proj"),
)
ROUTERS = ("gate", "router", "shared_expert_gate")
OUTSIDE = re.compile(
    r"visual|vision|image|audio|speech|mtp|nextn|projector|draft|eagle", re.IGNORECASE
)
# of a block, or an expert
NUMBER = re.compile(r"[0-9]{1,6}")
PLACE = re.compile(r"(?<=\.)\d+(?=\.)")
OF_EXPERT = re.compile(rf"(?P<experts>.+\.experts)\.(?P<number>{NUMBER.pattern})\.(?P<leaf>\w+)")
IN_BLOCK = re.compile(rf"\.{NUMBER.pattern}\.[^0-9].*")
T = TypeVar("T", bound=Hashable)
BLOCK = re.compile(rf"(?P<container>.+?)\.(?P<index>{NUMBER.pattern})\.(?P<inside>.+)\.weight")


def linear_layers(checkpoint: Checkpoint) -> dict[str, Entry]:
    """The linear layers of the decoder blocks by module name, in file order.

    Left out: embeddings, the head, norms, routers, vision and audio towers, and blocks beyond the
    model's own count, which hold multi-token prediction.

    Raises:
        CheckpointError: there are none, they are quantised already, or they are stored transposed.
    """
    blocks: dict[str, dict[str, Entry]] = defaultdict(dict)
    count = block_count(checkpoint.config)
    for name, entry in checkpoint.entries.items():
        # without it the search for its end would take long
        place = BLOCK.fullmatch(name) if name.endswith(".weight") else None
        if not place or len(entry.shape) != 2 or not entry.numel or OUTSIDE.search(name):
            continue
        if (
            any(part in ROUTERS for part in place["inside"].split("."))
            or "embed" in place["inside"]
        ):
            continue
        if count is None or int(place["index"]) < count:
            blocks[place["container"]][name.removesuffix(".weight")] = entry
    if not blocks:
        raise CheckpointError(
            f"{checkpoint.folder}: no linear layers in numbered decoder blocks were found"
        )
    found = max(blocks.values(), key=lambda layers: sum(e.nbytes for e in layers.values()))
    for module, entry in found.items():
        _check(module, entry, checkpoint.entries.get(f"{module}.bias"))
    return found


def why_plain(entry: Entry, container: str, config: Mapping[str, Any]) -> str:
    """Why a tensor is not a linear layer of the decoder blocks, in a few words."""
    name, place = entry.name, BLOCK.fullmatch(entry.name)
    count = block_count(config)
    if len(entry.shape) < 2:
        return "not a matrix (a norm, a bias)"
    if OUTSIDE.search(name):
        return "not of the decoder (vision, audio, or a draft)"
    if "embed" in name:
        return "embeddings"
    if "lm_head" in name:
        return "the head"
    if place is None or place["container"] != container:
        return (
            "experts fused in one tensor"
            if ".experts." in name and len(entry.shape) == 3
            else "outside the decoder blocks"
        )
    if any(part in ROUTERS for part in place["inside"].split(".")):
        return "a router"
    if count is not None and int(place["index"]) >= count:
        return "multi-token prediction"
    return "not a matrix"


def stack(layers: Mapping[str, Entry]) -> list[tuple[str, ...]]:
    """Module names grouped into stacks: those that engines fuse and that have one width together,
    all others alone.
    """
    return _grouped(
        layers, lambda members: len({layers[member].shape[1] for member in members}) == 1
    )


def experts(names: Iterable[str]) -> list[list[str]]:
    """Module names of the experts of a block together, which engines compute in one kernel."""
    found: dict[str, list[str]] = {}
    for name in names:
        if place := OF_EXPERT.fullmatch(name):
            found.setdefault(place["experts"], []).append(name)
    return list(found.values())


def fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Module names grouped by what engines make one layer of, told from the names alone."""
    return _grouped(dict.fromkeys(names), lambda members: True)


def _grouped(
    names: Mapping[str, Any], fit: Callable[[Sequence[str]], bool]
) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for module in names:
        if module in taken:
            continue
        leaf = module.rpartition(".")[2]
        parent = module.removesuffix(leaf)
        members = [
            parent + n
            for n in next((f for f in FUSED if leaf in f), (leaf,))
            if parent + n in names
        ]
        groups.append(tuple(members) if fit(members) else (module,))
        taken.update(groups[-1])
    return groups


def container(module: str) -> str:
    """The name of the list of blocks that a layer lies in: `model.layers` for
    `model.layers.0.mlp.up_proj`.
    """
    place = BLOCK.fullmatch(f"{module}.weight")
    assert place is not None, module
    return place["container"]


def block_index(tensor: str, container: str) -> int | None:
    """The number of the block that a tensor lies in; None outside that list of blocks."""
    number = (
        tensor.removeprefix(f"{container}.").split(".")[0]
        if tensor.startswith(f"{container}.")
        else ""
    )
    return int(number) if NUMBER.fullmatch(number) else None


def alike(names: Iterable[tuple[str, T]]) -> list[tuple[str, T, int]]:
    """Names with what is said of them, those that differ in numbers alone put together with stars
    for these, and how many.
    """
    found: dict[tuple[str, T], list[str]] = {}
    for name, what in names:
        found.setdefault((PLACE.sub("*", name), what), []).append(name)
    return [
        (star if len(same) > 1 else same[0], what, len(same))
        for (star, what), same in found.items()
    ]


def head_size(config: Mapping[str, Any]) -> int | None:
    """Channels of an attention head, as far as the config says."""
    for table in (config, config.get("text_config")):
        if isinstance(table, dict):
            heads, size, hidden = (
                table.get(key) for key in ("num_attention_heads", "head_dim", "hidden_size")
            )
            if isinstance(size, int) and size > 0:
                return size
            if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
                return hidden // heads or None
    return None


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """Channels of the hidden states, as far as the config says."""
    return _count(config, "hidden_size", "n_embd", "d_model")


def experts_of_a_token(config: Mapping[str, Any]) -> int | None:
    """How many experts of a block compute a token, as far as the config says."""
    return _count(config, "num_experts_per_tok")


def _count(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of these that is a positive number, the text's own config before the whole
    model's.
    """
    tables = (table for table in (config.get("text_config"), config) if isinstance(table, dict))
    found = (table.get(key) for table in tables for key in keys)
    return next((count for count in found if isinstance(count, int) and count > 0), None)


def left_alone(checkpoint: Checkpoint, compressed: Iterable[str]) -> list[str]:
    """Modules that a loader might take for linear layers and that stay as they are, in file order,
    the tied head included.
    """
    done = set(compressed)
    plain: dict[str, None] = {}
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        matrix = (
            leaf == "weight" and len(entry.shape) == 2 and "embed" not in module.rpartition(".")[2]
        )
        # fused expert weights are parameters of the experts' module
        experts = leaf != "weight" and len(entry.shape) == 3
        if (matrix or experts) and module not in done:
            plain[module] = None
            # engines ask for the experts by names of their own
            if experts and (place := IN_BLOCK.search(module)):
                plain[rf"re:.*{re.escape(place[0])}(\..+)?$"] = None
    several = isinstance(checkpoint.config.get("text_config"), dict)
    wherever = [pattern for module in plain if several and (pattern := _wherever(module))]
    if not any(module.endswith("lm_head") for module in plain):
        plain["lm_head"] = None
    return list(plain | dict.fromkeys(wherever))


def _wherever(module: str) -> str | None:
    """A pattern for a module of a model with several parts, whose names begin otherwise in files,
    transformers and engines: of a part that is not the decoder it names all, and of others what
    follows from the list of blocks on.
    """
    names = module.split(".")
    if module.startswith("re:"):
        return None
    if part := next((name for name in names[:-1] if OUTSIDE.search(name)), None):
        return rf"re:(.*\.)?{re.escape(part)}\..*"
    place = IN_BLOCK.search(module)
    start = module.rfind(".", 0, place.start()) + 1 if place else len(module) - len(names[-1])
    return rf"re:(.*\.)?{re.escape(module[start:])}$"


def block_count(config: Mapping[str, Any]) -> int | None:
    """How many decoder blocks the config says that there are."""
    for table in (
        config,
        *(config.get(key) for key in ("text_config", "llm_config", "language_config")),
    ):
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if isinstance(table, dict) and isinstance(table.get(key), int):
                return int(table[key])
    return None


def _check(module: str, entry: Entry, bias: Entry | None) -> None:
    if entry.dtype not in FLOATS:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} is {entry.dtype}: already quantised; start from "
            "the original"
        )
    rows, width = entry.shape
    if bias is not None and bias.shape == (width,) and rows != width:
        raise CheckpointError(
            f"{entry.file}: layer {module} is stored transposed (in, out), as GPT-2 does, and "
            "engines read no compressed form of "
            "such layers"
        )
