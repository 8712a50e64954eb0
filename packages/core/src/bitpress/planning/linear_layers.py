"""The linear layers of the decoder blocks, and the modules that are left alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from bitpress.checkpoint.layer_names import (
    BLOCK,
    IN_BLOCK,
    OUTSIDE,
    ROUTERS,
    _grouped,
)
from bitpress.checkpoint.model_config import block_count
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import CheckpointError

FLOATS = ("BF16", "F16", "F32", "F64")


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
