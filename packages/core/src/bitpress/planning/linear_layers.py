"""The linear layers of the decoder blocks, and the modules that are left alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from bitpress.checkpoint.layer_names import (
    BLOCK,
    IN_BLOCK,
    OUTSIDE,
    ROUTERS,
    group_siblings,
)
from bitpress.checkpoint.model_config import ModelConfig
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

    # The decoder is the largest list of blocks: a draft model or another tower is smaller.
    layers = max(layers_of.values(), key=lambda part: sum(e.nbytes for e in part.values()))
    for module, entry in layers.items():
        _check(module, entry, checkpoint.entries.get(f"{module}.bias"))
    return layers


def explain_plain(entry: Entry, container: str, model_config: ModelConfig) -> str:
    """Why a tensor is not a linear layer of the decoder blocks, in a few words.

    Args:
        container: the name of the list of decoder blocks.
    """
    name, match = entry.name, BLOCK.fullmatch(entry.name)
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
    return "not a matrix"


def group_fused(layers: Mapping[str, Entry]) -> list[tuple[str, ...]]:
    """Module names grouped into stacks: those that engines fuse and that have one width together,
    all others alone.
    """

    def have_one_width(members: Sequence[str]) -> bool:
        return len({layers[member].shape[1] for member in members}) == 1

    return group_siblings(layers, have_one_width)


def uncompressed_modules(checkpoint: Checkpoint, compressed: Iterable[str]) -> list[str]:
    """Modules that a loader might take for linear layers and that stay as they are, in file order,
    the tied head included.
    """
    compressed = set(compressed)
    modules: dict[str, None] = {}
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        is_embedding = "embed" in module.rpartition(".")[2]
        is_matrix = leaf == "weight" and len(entry.shape) == 2 and not is_embedding
        # Fused expert weights are parameters of the experts' module, not modules of their own.
        are_experts = leaf != "weight" and len(entry.shape) == 3
        if (is_matrix or are_experts) and module not in compressed:
            modules[module] = None
            # Engines ask for the experts by names of their own.
            if are_experts and (match := IN_BLOCK.search(module)):
                modules[rf"re:.*{re.escape(match[0])}(\..+)?$"] = None

    patterns: list[str | None] = []
    if isinstance(checkpoint.config.get("text_config"), dict):
        patterns = [_pattern_anywhere(module) for module in modules]
    if not any(module.endswith("lm_head") for module in modules):
        modules["lm_head"] = None
    return list(modules | dict.fromkeys(pattern for pattern in patterns if pattern))


def _pattern_anywhere(module: str) -> str | None:
    """A pattern for a module of a model with several parts, whose names begin otherwise in files,
    transformers and engines: of a part that is not the decoder it names all, and of others what
    follows from the list of blocks on.
    """
    if module.startswith("re:"):
        return None
    names = module.split(".")
    if part := next((name for name in names[:-1] if OUTSIDE.search(name)), None):
        return rf"re:(.*\.)?{re.escape(part)}\..*"
    match = IN_BLOCK.search(module)
    start = module.rfind(".", 0, match.start()) + 1 if match else len(module) - len(names[-1])
    return rf"re:(.*\.)?{re.escape(module[start:])}$"


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
