"""Models that come in FP8, seen as what they stand for: every weight times its scale, made while it
is read.

Two layouts: transformers' own with `weight_scale_inv` (DeepSeek's: one for each tile of 128 x 128,
or one for all), and compressed-tensors with `weight_scale`. Both scales multiply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.checkpoint.model_config import METHOD, ModelConfig, text_part
from bitpress.checkpoint.reader import NAMES, Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.views import View
from bitpress.errors import CheckpointError

CODES = "F8_E4M3"

SCALES = ("weight_scale_inv", "weight_scale")

# with which the source is served
LEFT_OUT = (*SCALES, "input_scale", "activation_scale")

# a key of the first layout's config, and of no other's
ACTIVATIONS = "activation_scheme"

TILE = (128, 128)


def readable(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its weights are in FP8, in a layout that is known here."""
    found, weights = _table(config), _weights(config)
    plain = all((w.get("type"), w.get("num_bits")) == ("float", 8) for w in weights)
    return ACTIVATIONS in found or (found.get("quant_method") == METHOD and bool(weights) and plain)


def _table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return ModelConfig.from_json(config).quantization or {}


def dequantized(checkpoint: Checkpoint) -> dict[str, Entry]:
    """Every tensor, those in FP8 as matrices of the dtype that the config names.

    Raises:
        CheckpointError: a weight has no scale, or one of a shape that fits no layout; the message
            names it.
    """
    dtype = _dtype(checkpoint.config)
    found: dict[str, Entry] = {}
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf in LEFT_OUT and _is_codes(checkpoint.entries.get(f"{module}.weight")):
            continue
        found[name] = _view(entry, module, checkpoint, dtype) if entry.dtype == CODES else entry
    return found


def _is_codes(entry: Entry | None) -> bool:
    return entry is not None and entry.dtype == CODES


def _view(entry: Entry, module: str, checkpoint: Checkpoint, dtype: str) -> View:
    scale = next(
        (e for s in SCALES if (e := checkpoint.entries.get(f"{module}.{s}")) is not None), None
    )
    if scale is None or not entry.name.endswith(".weight") or len(entry.shape) != 2:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} is in FP8 and has no {' or '.join(SCALES)} beside "
            "it"
        )
    tile = _tile(entry.shape, scale.shape, _tiles(checkpoint.config))
    if tile is None:
        raise CheckpointError(
            f"{entry.file}: tensor {scale.name} is {list(scale.shape)}, which fits {entry.name} "
            f"{list(entry.shape)} in no way: one scale, one for each row, or one for each tile of "
            "the size that config.json names"
        )
    return View(
        entry.name, dtype, entry.shape, entry.file, entry.start, entry, scale=scale, tile=tile
    )


def _tile(
    shape: Sequence[int], scale: Sequence[int], tiles: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where its shape says neither."""
    rows, width = shape
    if tuple(scale) in ((), (1,), (1, 1)):
        return rows, width
    if tuple(scale) in ((rows,), (rows, 1)):
        return 1, width
    return next(((h, w) for h, w in tiles if tuple(scale) == (-(-rows // h), -(-width // w))), None)


def _tiles(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The tiles that a config names."""
    sizes = [
        _table(config).get("weight_block_size"),
        *(weights.get("block_structure") for weights in _weights(config)),
    ]
    pairs = [size for size in sizes if isinstance(size, list) and len(size) == 2]
    return [
        (h, w) for h, w in pairs if isinstance(h, int) and isinstance(w, int) and min(h, w) > 0
    ] or [TILE]


def _weights(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What compressed-tensors says of the weights of each group."""
    groups = _table(config).get("config_groups")
    found = (
        [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        if isinstance(groups, dict)
        else []
    )
    return [weights if isinstance(weights, dict) else {} for weights in found]


def _dtype(config: Mapping[str, Any]) -> str:
    names = {str(dtype).removeprefix("torch."): name for dtype, name in NAMES.items()}
    said = [
        part.get(key) for part in (config, text_part(config)) for key in ("dtype", "torch_dtype")
    ]
    return next((names[dtype] for dtype in said if dtype in ("float16", "float32")), "BF16")
