"""Models that come in FP8, read as the weights that they stand for: every weight times its scale,
computed while it is read.

Two layouts are known. transformers' own has `weight_scale_inv` (DeepSeek's: one scale for each tile
of 128 x 128 weights, or one for all). compressed-tensors has `weight_scale`. In both the scale
multiplies, whatever its name says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.checkpoint.model_config import METHOD, ModelConfig, text_part
from bitpress.checkpoint.reader import NAMES, Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.views import View
from bitpress.errors import CheckpointError

FP8 = "F8_E4M3"

SCALES = ("weight_scale_inv", "weight_scale")

# Tensors beside a weight in FP8 that the dequantized model has not.
SCALE_TENSORS = (*SCALES, "input_scale", "activation_scale")

# The key of quantization_config that only transformers' own layout has.
ACTIVATION_SCHEME = "activation_scheme"

# DeepSeek's weight_block_size, where the config names none.
DEFAULT_TILE = (128, 128)


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its weights are in FP8, in one of the two layouts."""
    table, weights = _quantization(config), _weight_arguments(config)
    if ACTIVATION_SCHEME in table:
        return True
    are_fp8 = all((w.get("type"), w.get("num_bits")) == ("float", 8) for w in weights)
    return table.get("quant_method") == METHOD and bool(weights) and are_fp8


def view_dequantized(checkpoint: Checkpoint) -> dict[str, Entry]:
    """Every tensor, those in FP8 as views in the dtype that the config names.

    Raises:
        CheckpointError: a weight has no scale, or one of a shape that fits no layout; the message
            names it.
    """
    dtype, tiles = _dtype(checkpoint.config), _tiles(checkpoint.config)
    entries: dict[str, Entry] = {}
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        weight = checkpoint.entries.get(f"{module}.weight")
        if leaf in SCALE_TENSORS and weight is not None and weight.dtype == FP8:
            continue
        if entry.dtype == FP8:
            scales = [checkpoint.entries.get(f"{module}.{scale}") for scale in SCALES]
            scale = next((scale for scale in scales if scale is not None), None)
            entries[name] = _view(entry, scale, tiles, dtype)
        else:
            entries[name] = entry
    return entries


def _view(entry: Entry, scale: Entry | None, tiles: Sequence[tuple[int, int]], dtype: str) -> View:
    if scale is None or not entry.name.endswith(".weight") or len(entry.shape) != 2:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name} is in FP8 and has no {' or '.join(SCALES)} beside "
            "it"
        )
    tile = _tile(entry.shape, scale.shape, tiles)
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
    """Rows and columns that share a scale; None where the scales' shape fits none."""
    rows, width = shape
    if tuple(scale) in ((), (1,), (1, 1)):
        return rows, width
    if tuple(scale) in ((rows,), (rows, 1)):
        return 1, width
    return next(((h, w) for h, w in tiles if tuple(scale) == (-(-rows // h), -(-width // w))), None)


def _tiles(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The tile sizes (rows, columns) that a config names."""
    sizes = [
        _quantization(config).get("weight_block_size"),
        *(weights.get("block_structure") for weights in _weight_arguments(config)),
    ]
    pairs = [size for size in sizes if isinstance(size, list) and len(size) == 2]
    tiles = [(h, w) for h, w in pairs if isinstance(h, int) and isinstance(w, int)]
    return [tile for tile in tiles if min(tile) > 0] or [DEFAULT_TILE]


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return ModelConfig.from_json(config).quantization or {}


def _weight_arguments(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The `weights` of each of compressed-tensors' config groups; empty for what is no table."""
    groups = _quantization(config).get("config_groups")
    if not isinstance(groups, dict):
        return []
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return [table if isinstance(table, dict) else {} for table in weights]


def _dtype(config: Mapping[str, Any]) -> str:
    """The model's dtype, as safetensors names it; bfloat16 where the config names none."""
    names = {str(dtype).removeprefix("torch."): name for dtype, name in NAMES.items()}
    dtypes = [
        part.get(key) for part in (config, text_part(config)) for key in ("dtype", "torch_dtype")
    ]
    return next((names[dtype] for dtype in dtypes if dtype in ("float16", "float32")), "BF16")
