"""Shapes and dtypes of what schemes store, and the row tiles that layers are worked on in."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch

from bitpress.errors import ShapeError
from bitpress.schemes.pipeline import observe_weights, pack, quantize, record
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Layer, StoredLayer

# columns of a layer: a header may claim any number, and every row block is as wide
WIDEST = 1 << 20

# weights of a row tile: its float32 temporaries stay in a core's cache
TILE = 1 << 18


def row_block(steps: Sequence[Step]) -> int:
    """How many consecutive rows the steps need to see together."""
    return math.lcm(*(step.options.row_block for step in steps))


def row_tiles(
    shape: tuple[int, ...], steps: Sequence[Step], size: int = TILE
) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) rows of the tiles of about so many weights in which a layer of
    shape (out, in) is worked on.
    """
    rows, width = shape
    block = row_block(steps)
    height = max(size // max(width, 1) // block, 1) * block
    return ((first, min(first + height, rows)) for first in range(0, rows, height))


@functools.lru_cache(maxsize=4096)
def describe(rows: int, width: int, dtype: torch.dtype, steps: tuple[Step, ...]) -> StoredLayer:
    """The StoredLayer of a layer of this shape with the right dtypes and shapes and meaningless
    numbers, in next to no memory.

    The hooks run on one row block of zeros (and on the rest that does not fill a block); what they
    return is repeated without being copied. (torch's `meta` device would say the same, at the price
    of importing sympy and torch's compiler: a second.)

    Raises:
        ShapeError: a scheme cannot take the shape.
    """
    if width > WIDEST:
        raise ShapeError(
            f"it is {width} columns wide, and no layer of a language model has more than {WIDEST}"
        )
    block = row_block(steps)
    heights = [
        (height, count)
        for height, count in ((block, rows // block), (rows % block, 1))
        if height and count
    ]
    pieces = [(_zeros(height, width, dtype, steps), count) for height, count in heights]

    def repeat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        first = tensors[0]
        total = (
            sum(len(tensor) * count for tensor, (_, count) in zip(tensors, pieces, strict=True))
            if first.ndim
            else 0
        )
        return first[:1].expand(total, *first.shape[1:]) if first.ndim else first

    layer = pieces[0][0]
    grown: dict[str, Any] = {
        "weight": layer.weight[:1].expand(rows, width),
        "qparams": {
            name: repeat([piece.qparams[name] for piece, _ in pieces]) for name in layer.qparams
        },
    }
    for name in ("codes", "mask"):
        if getattr(layer, name) is not None:
            grown[name] = repeat([getattr(piece, name) for piece, _ in pieces])
    found = record(attrs.evolve(layer, **grown), steps)
    return StoredLayer(
        {name: t.new_zeros(()).expand(t.shape) for name, t in found.tensors.items()}, found.config
    )


def _zeros(rows: int, width: int, dtype: torch.dtype, steps: Sequence[Step]) -> Layer:
    layer = Layer("layer", torch.zeros(rows, width), dtype)
    stats = observe_weights(lambda: iter((layer,)), steps)
    return pack(quantize(layer, steps, stats), steps)
