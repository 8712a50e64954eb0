"""What the formats have in common: a config's table, and how weights of 4 and 8 bits are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitpress import CheckpointError, CodeForm, QuantizedTensor, QuantizedWeight, StoredPart
from bitpress.checkpoint.model_config import ModelConfig
from bitpress.checkpoint.reader import DTYPES
from bitpress.checkpoint.safetensors import TensorSpec
from bitpress.numerics import decode_e2m1, decode_e8m0, unpack_bytes

Tensors = Mapping[str, TensorSpec]

FP8 = "F8_E4M3"

# Bytes of an exponent: microscaling's own dtype, and what is stored where a tool has none such.
E8M0 = ("F8_E8M0", "U8")

# AutoRound's own method, for layouts of others.
AUTO_ROUND = "auto-round"

# Scales of the cache, beside an attention or its layers.
OF_CACHES = ("q_scale", "k_scale", "v_scale")

# Weights that share a scale in microscaling formats.
MX_GROUP = 32


def quantization_table(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a model; empty where it has none."""
    return ModelConfig.from_json(config).quantization or {}


def modules_with(tensors: Tensors, leaf: str) -> Iterator[str]:
    """Modules that have a tensor of this name."""
    suffix = f".{leaf}"
    return (name.removesuffix(suffix) for name in tensors if name.endswith(suffix))


def remark_caches(tensors: Tensors) -> list[str]:
    """A line where scales of the cache are left out."""
    names = [name for name in tensors if name.rpartition(".")[2] in OF_CACHES]
    if not names:
        return []
    return [f"{len(names)} scales of the source's cache are left out (first: {names[0]})"]


def require(tensors: Tensors, name: str, of: str) -> TensorSpec:
    """How a tensor is stored that another needs; raises CheckpointError where it is missing."""
    if name not in tensors:
        raise CheckpointError(f"tensor {of} is quantized, and {name} is missing beside it")
    return tensors[name]


def float_scale(scale: Tensor) -> Tensor:
    """Scales of any dtype as float32; bytes are exponents."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return decode_e8m0(scale.view(torch.uint8))
    return scale.float()


def dtype_of(scale: TensorSpec) -> torch.dtype:
    """In which scales are stored; bytes are exponents."""
    return torch.float8_e8m0fnu if scale.dtype in E8M0 else DTYPES[scale.dtype]


def unpack_e2m1(packed: Tensor) -> Tensor:
    """(rows, in / 2) bytes, the first number in the low bits, as (rows, in) float32."""
    return decode_e2m1(unpack_bytes(packed.view(torch.uint8), 4))


def fp8_weight(
    tensors: Tensors, name: str, scale_name: str, tiles: Sequence[tuple[int, int]] = ()
) -> QuantizedWeight:
    """A matrix in FP8, with a scale for all of it, for each row, for each group of 32, or for each
    tile.

    Args:
        tensors: what is stored.
        name: of the matrix.
        scale_name: of its scales, which multiply.
        tiles: rows and columns that may share a scale.

    Raises:
        CheckpointError: there are no scales, or their shape is none of these.
    """
    shape, scale = tensors[name].shape, require(tensors, scale_name, name)
    tile = _find_tile(shape, scale.shape, tiles) if len(shape) == 2 else None
    if tile is None:
        raise CheckpointError(
            f"tensor {scale_name} is {list(scale.shape)}, which fits {name} {list(shape)} in no "
            "way: one scale, one for each row, one for each group of 32, or one for each tile of "
            "the size that config.json names"
        )
    height, width = tile
    # one row of scales for each tile of rows, or one for all
    scale_rows = None if height >= shape[0] else 1

    num_groups = -(-shape[1] // width)
    is_ragged = num_groups > 1 and shape[1] % width > 0

    def decode(parts: Mapping[str, Tensor]) -> QuantizedTensor:
        codes = parts["codes"]
        scales = float_scale(parts["scale"]).reshape(-1, num_groups)
        if scale_rows and height > 1:
            scales = scales.repeat_interleave(height, 0)[: len(codes)]
        index = torch.arange(shape[1], device=codes.device) // width if is_ragged else None
        return QuantizedTensor(codes, scales, group_index=index)

    parts = {
        "codes": StoredPart(name, height if scale_rows else 1),
        "scale": StoredPart(scale_name, scale_rows),
    }
    form = None if is_ragged else CodeForm("float", 8, tile, dtype_of(scale))
    return QuantizedWeight(shape, parts, decode, height if scale_rows else 1, form)


def _find_tile(
    shape: Sequence[int], scale: Sequence[int], tiles: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the scales' shape fits none."""
    rows, width = shape
    # some tools keep axes of length 1 between those of the tiles
    axes = tuple(n for n in scale if n != 1)
    if not axes:
        return rows, width
    if axes == (rows,) and scale[0] == rows:
        return 1, width
    candidates = [*tiles, (1, MX_GROUP)]
    counts = {(h, w): (-(-rows // h), -(-width // w)) for h, w in candidates}
    return next((tile for tile, n in counts.items() if axes == tuple(k for k in n if k != 1)), None)


def fp4_weight(
    tensors: Tensors, name: str, scale_name: str, group_size: int, global_scale: str | None = None
) -> QuantizedWeight:
    """A matrix of E2M1 numbers, two in a byte, in groups of columns that share a scale.

    Args:
        tensors: what is stored.
        name: of the bytes, (out, in / 2).
        scale_name: of the scales (out, groups), which multiply.
        group_size: columns of a group.
        global_scale: the name of one more number, which multiplies scales; None where there is
            none.

    Raises:
        CheckpointError: there are no scales, or they do not fit.
    """
    packed, scale = tensors[name], require(tensors, scale_name, name)
    shape = (packed.shape[0], 2 * packed.shape[-1])
    if len(packed.shape) != 2 or scale.shape != (shape[0], shape[1] // group_size):
        raise CheckpointError(
            f"tensor {scale_name} is {list(scale.shape)}, and {name} {list(packed.shape)} needs "
            f"one scale for each {group_size} numbers of a row"
        )
    parts = {"codes": StoredPart(name, 1), "scale": StoredPart(scale_name, 1)}
    if global_scale is not None:
        require(tensors, global_scale, name)
        parts["global_scale"] = StoredPart(global_scale)

    def decode(stored: Mapping[str, Tensor]) -> QuantizedTensor:
        scales = float_scale(stored["scale"])
        if global_scale is not None:
            scales = scales * stored["global_scale"].float().reshape(())
        return QuantizedTensor(unpack_e2m1(stored["codes"]), scales)

    # with a scale above them, those of groups are of no dtype
    form = None if global_scale else CodeForm("float", 4, (1, group_size), dtype_of(scale))
    return QuantizedWeight(shape, parts, decode, form=form)
