"""Shapes and dtypes of what schemes store, and the row tiles that layers are worked on in."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from bitpress.errors import ShapeError
from bitpress.schemes.pipeline import observe_weights, pack, quantize, serialize
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Layer, StoredLayer

# Columns of a layer. A header may claim any number, and memory is taken for row blocks as wide.
MAX_COLUMNS = 1 << 20

# Weights of a row tile: so many float32 temporaries stay in a core's cache.
WEIGHTS_PER_TILE = 1 << 18

# Of one that is fitted to second moments of inputs: these are factorized for every tile.
FITTED_TILE_WEIGHTS = 1 << 25


def row_block(steps: Sequence[Step]) -> int:
    """How many consecutive rows the steps need to see together."""
    return math.lcm(*(step.options.row_block for step in steps))


def row_tiles(
    shape: tuple[int, ...], steps: Sequence[Step], num_weights: int = WEIGHTS_PER_TILE
) -> Iterator[tuple[int, int]]:
    """The row tiles that a layer is worked on in: first row, and the row after the last.

    Args:
        shape: (out, in) of the layer.
        steps: of the layer; a tile holds whole row blocks of all of them.
        num_weights: of a tile, about.
    """
    rows, width = shape
    block = row_block(steps)
    height = max(num_weights // max(width, 1) // block, 1) * block
    return ((first, min(first + height, rows)) for first in range(0, rows, height))


def row_ranges(
    shape: tuple[int, int], dtype: torch.dtype, steps: tuple[Step, ...], tile: tuple[int, int]
) -> dict[str, tuple[int, int] | None]:
    """Which rows of each stored tensor belong to a row tile of a layer; None where all do: of the
    only tile, or of a tensor that does not follow the rows.

    Args:
        shape: (out, in) of the layer.
        dtype: what the model stores its weights in.
        steps: of the layer.
        tile: the first row, a multiple of the row block, and the row after the last.
    """
    rows, width = shape
    first, last = tile
    block = row_block(steps)
    one_block = describe(block, width, dtype, steps).tensors
    all_rows = describe(rows, width, dtype, steps).tensors
    ranges: dict[str, tuple[int, int] | None] = {}
    for suffix, expected in describe(last - first, width, dtype, steps).tensors.items():
        start = first // block * one_block[suffix].shape[0] if expected.ndim else 0
        is_whole = expected.shape == all_rows[suffix].shape
        ranges[suffix] = None if is_whole else (start, start + expected.shape[0])
    return ranges


def cut_rows(
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    steps: tuple[Step, ...],
    tile: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """What is stored of a layer, cut to a row tile, on which `dequantize` works.

    Args:
        tensors: that are stored of the layer; others are as for `row_ranges`.
    """
    return {
        suffix: tensors[suffix] if rows is None else tensors[suffix][slice(*rows)]
        for suffix, rows in row_ranges(shape, dtype, steps, tile).items()
    }


@functools.lru_cache(maxsize=4096)
def describe(rows: int, width: int, dtype: torch.dtype, steps: tuple[Step, ...]) -> StoredLayer:
    """What is stored of a layer of this shape: right dtypes and shapes, and meaningless numbers, in
    next to no memory.

    The hooks run on one row block of zeros (and on the rest that does not fill a block); what they
    return is repeated without being copied.

    Args:
        rows: of the layer.
        width: its columns.
        dtype: what the model stores its weights in.
        steps: of the layer.

    Raises:
        ShapeError: a scheme cannot take the shape.
    """
    # torch's `meta` device would say the same, but imports sympy and torch's compiler: a second.
    if width > MAX_COLUMNS:
        raise ShapeError(
            f"it is {width} columns wide, and no layer of a language model has more than "
            f"{MAX_COLUMNS}"
        )
    block = row_block(steps)
    # (rows of a piece, how often it stands in the layer)
    heights = [(block, rows // block), (rows % block, 1)]
    pieces = [
        (_pack_zeros(height, width, dtype, steps), count)
        for height, count in heights
        if height and count
    ]

    def repeat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        first = tensors[0]
        if not first.ndim:
            return first
        counts = [count for _, count in pieces]
        total = sum(len(tensor) * count for tensor, count in zip(tensors, counts, strict=True))
        return first[:1].expand(total, *first.shape[1:])

    layer = pieces[0][0]
    repeated: dict[str, Any] = {
        "weight": layer.weight[:1].expand(rows, width),
        "qparams": {
            name: repeat([piece.qparams[name] for piece, _ in pieces]) for name in layer.qparams
        },
    }
    for name in ("codes", "mask"):
        if getattr(layer, name) is not None:
            repeated[name] = repeat([getattr(piece, name) for piece, _ in pieces])
    stored = serialize(attrs.evolve(layer, **repeated), steps)
    # One number of each tensor is kept.
    tensors = {name: t.new_zeros(()).expand(t.shape) for name, t in stored.tensors.items()}
    return StoredLayer(tensors, stored.config)


def _pack_zeros(rows: int, width: int, dtype: torch.dtype, steps: Sequence[Step]) -> Layer:
    layer = Layer("layer", torch.zeros(rows, width), dtype)
    stats = observe_weights(lambda: iter((layer,)), steps)
    return pack(quantize(layer, steps, stats), steps)
