"""The linear layers of the decoder blocks, and the modules that are left alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from bitpress.checkpoint.engine_facts import EngineFacts, facts_of, fused_leaves, is_embedding
from bitpress.checkpoint.layer_names import (
    BLOCK,
    OUTSIDE,
    ROUTERS,
    group_siblings,
)
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import CheckpointError

# What a weight may be stored in, as safetensors names dtypes: all others are quantized already.
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def linear_layers(checkpoint: Checkpoint) -> dict[str, Entry]:
    """The linear layers of the decoder blocks by module name, in file order.

    Left out: embeddings, the head, norms, routers, vision and audio towers, and blocks beyond the
    model's own count, which hold multi-token prediction.

    Raises:
        CheckpointError: there are none, they are quantized already, or they are stored transposed.
    """
    layers_of: dict[str, dict[str, Entry]] = defaultdict(dict)
    count = checkpoint.model_config.num_layers
    for name, entry in checkpoint.entries.items():
        # Other names are not even tried: the pattern takes long to fail on a long name.
        match = BLOCK.fullmatch(name) if name.endswith(".weight") else None
        if not match or len(entry.shape) != 2 or not entry.numel or OUTSIDE.search(name):
            continue
        if _is_router(match["inside"]) or "embed" in match["inside"]:
            continue
        if count is None or int(match["index"]) < count:
            layers_of[match["container"]][name.removesuffix(".weight")] = entry
    if not layers_of:
        raise CheckpointError(
            f"{checkpoint.folder}: no linear layers in numbered decoder blocks were found"
        )

    # The decoder is the largest list of blocks: a draft model or another tower is smaller. What no
    # engine quantizes is none.
    engines = facts_of(checkpoint.config)
    quantizable = {
        container: {m: entry for m, entry in part.items() if not _why_plain(m, engines)}
        for container, part in layers_of.items()
    }
    container = max(layers_of, key=lambda c: _num_bytes(quantizable[c]))
    for module, entry in layers_of[container].items():
        _check(module, entry, checkpoint.entries.get(f"{module}.bias"))
    if not quantizable[container]:
        module = next(iter(layers_of[container]))
        raise CheckpointError(
            f"{checkpoint.folder}: no layer may be compressed ({module}: "
            f"{_why_plain(module, engines)})"
        )
    return quantizable[container]


def explain_plain(entry: Entry, container: str, checkpoint: Checkpoint) -> str:
    """Why a tensor is not a linear layer of the decoder blocks, in a few words.

    Args:
        container: the name of the list of decoder blocks.
        checkpoint: that holds it.
    """
    name, match = entry.name, BLOCK.fullmatch(entry.name)
    model_config = checkpoint.model_config
    count = model_config.num_layers
    if len(entry.shape) < 2:
        return "not a matrix (a norm, a bias)"
    if OUTSIDE.search(name):
        return "not of the decoder (vision, audio, or a draft)"
    if "embed" in name:
        return "embeddings"
    if "lm_head" in name:
        return "the head"
    if match is None or match["container"] != container:
        is_fused = ".experts." in name and len(entry.shape) == 3
        return "experts fused in one tensor" if is_fused else "outside the decoder blocks"
    if _is_router(match["inside"]):
        return "a router"
    if count is not None and int(match["index"]) >= count:
        return "multi-token prediction"
    reason = _why_plain(name.removesuffix(".weight"), facts_of(checkpoint.config))
    return reason or "not a matrix"


def group_fused(
    layers: Mapping[str, Entry], engines: Sequence[EngineFacts] = ()
) -> list[tuple[str, ...]]:
    """Module names grouped into stacks: those that engines fuse and that have one width together,
    all others alone.
    """

    def have_one_width(members: Sequence[str]) -> bool:
        return len({layers[member].shape[1] for member in members}) == 1

    return group_siblings(layers, have_one_width, fused_leaves(engines))


def _num_bytes(layers: Mapping[str, Entry]) -> int:
    return sum(entry.nbytes for entry in layers.values())


def _why_plain(module: str, engines: Sequence[EngineFacts]) -> str | None:
    """Why an engine must find a layer as it is; None where all may quantize it."""
    if is_embedding(module, engines):
        return "embeddings"
    return next(filter(None, (facts.why_not_quantized(module) for facts in engines)), None)


def _is_router(name: str) -> bool:
    return any(part in ROUTERS for part in name.split("."))


def _check(module: str, entry: Entry, bias: Entry | None) -> None:
    if entry.dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} is {entry.dtype}: already quantized; start from "
            "the original"
        )
    rows, width = entry.shape
    if bias is not None and bias.shape == (width,) and rows != width:
        raise CheckpointError(
            f"{entry.file}: layer {module} is stored transposed (in, out), as GPT-2 does, and "
            "engines read no compressed form of such layers"
        )
