"""Products of tall matrices over their tokens: by far the most work of calibration.

Where a CPU multiplies integers several times as fast as floats, large products are taken of 8-bit
codes, each channel scaled by its largest magnitude among at most `TOKENS_PER_SCALE` tokens.
Rounding then adds to a channel's sum of squares at most TOKENS_PER_SCALE / (12 · 127²) of it,
2.2 %, even if one token holds all of it, and some 0.01 % where inputs are normal: a small ridge.

Numbers of 16 bits become codes a few tokens at a time: a whole matrix of them in float32 would not
stay in a cache. On a GPU they are multiplied as they are: a product of two bfloat16 or float16
numbers has at most 22 bits, and float32 sums lose nothing that they would not lose of float32
numbers. A token costs (1 + 1 / NUM_STRIPES) · in² FLOPs for a Gram matrix, 2 · rows · columns for a
product.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import linear, pad

from bitpress.numerics.blocks import absmax
from bitpress.runtime.cpu_features import has_cpu_feature

# Into so many stripes a symmetric or triangular product is cut: of 8, 9/16 of the whole are
# computed.
NUM_STRIPES = 8

# Columns of a stripe, or tokens of an 8-bit product: fewer are slower than what they save.
MIN_SIZE = 256

# Tokens that are scaled, or rounded, at a time: they stay in a core's cache.
TOKEN_TILE = 64

# Tokens of which a multiple is multiplied where their number differs from time to time: for every
# number of them oneDNN compiles a kernel, in 2 ms on a CPU with AMX. It keeps a thousand, of 0.4 MB
# each.
TOKEN_MULTIPLE = 64

# Tokens that share a channel's scale.
TOKENS_PER_SCALE = 4096

# Instructions for sums of 8-bit products, of which one is enough.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")

# Dtypes whose products are exact in float32.
HALF_DTYPES = (torch.bfloat16, torch.float16)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which such numbers are given to products: their own where it has 16 bits,
    otherwise float32.
    """
    # torch 2.7 cannot add products of 16 bits up in float32 on a GPU
    can_add = x.device.type == "cpu" or hasattr(torch.ops.aten.mm, "dtype_out")
    return x.dtype if can_add and x.dtype in HALF_DTYPES else torch.float32


# Numbers (tokens, channels): int8 codes and the scale of each channel, or as they are and None.
_Chunk = tuple[Tensor, Tensor | None]


@frozen(eq=False)
class TallMatrix:
    """A matrix (tokens, channels) of which several products are taken: its codes are made once.

    Attributes:
        chunks: of at most `TOKENS_PER_SCALE` tokens each.
    """

    chunks: tuple[_Chunk, ...]

    @classmethod
    def of(cls, x: Tensor) -> TallMatrix:
        """The matrix x (tokens, channels) of its `product_dtype`."""
        return cls(tuple(_chunks_of(x)))


def gram(x: Tensor | TallMatrix) -> Tensor:
    """The Gram matrix xᵀ x, of which a block and its mirror image are computed once.

    Args:
        x: (tokens, in) of its `product_dtype`.

    Returns:
        (in, in) float32, symmetric: on a CPU to the bit.
    """
    return functools.reduce(Tensor.add_, itertools.starmap(_gram, _chunks_of(x)))


def cross(left: Tensor | TallMatrix, right: Tensor | TallMatrix) -> Tensor:
    """The product leftᵀ right over tokens.

    Args:
        left: (tokens, rows) of its `product_dtype`.
        right: (tokens, columns) of the same dtype.

    Returns:
        (rows, columns) float32.
    """
    return functools.reduce(Tensor.add_, map(_cross, _chunks_of(left), _chunks_of(right)))


def project(x: Tensor, weight: Tensor) -> Tensor:
    """The product x weightᵀ, (tokens, out) float32; on a CPU rounded to 16 bits where x has 16.

    Args:
        x: (tokens, in) of its `product_dtype`.
        weight: (out, in) floating, rounded to that.
    """
    weight = weight.to(x.dtype)
    if x.device.type == "cpu":
        return multiply_tokens(x, weight).float()
    product = x.new_empty(len(x), len(weight), dtype=torch.float32)
    return _multiply(x.T, weight.T, product)


def multiply_tokens(x: Tensor, weight: Tensor) -> Tensor:
    """The product x weightᵀ: (tokens, in) and (out, in) to (tokens, out), all of one dtype.

    On a CPU a multiple of `TOKEN_MULTIPLE` tokens are multiplied, some of which may be zeros.
    """
    num_missing = -len(x) % TOKEN_MULTIPLE
    if not num_missing or x.device.type != "cpu":
        return linear(x, weight)
    return linear(pad(x, (0, 0, 0, num_missing)), weight)[: len(x)]


def stripes(width: int) -> Iterator[slice]:
    """Columns, from the first to the last, in stripes.

    Stripe by stripe, what lies on one side of the diagonal is left out of a product.
    """
    step = max(-(-width // NUM_STRIPES), MIN_SIZE)
    for first in range(0, width, step):
        yield slice(first, min(first + step, width))


def _chunks_of(x: Tensor | TallMatrix) -> Iterable[_Chunk]:
    """At most `TOKENS_PER_SCALE` tokens each."""
    if isinstance(x, TallMatrix):
        return x.chunks
    return map(_chunk_of, torch.split(x, TOKENS_PER_SCALE))


def _chunk_of(x: Tensor) -> _Chunk:
    if _uses_int8(x):
        return _quantize_channels(x)
    return x.float() if x.device.type == "cpu" else x, None


def _gram(x: Tensor, scale: Tensor | None) -> Tensor:
    width = x.shape[1]
    product = x.new_empty(width, width, dtype=torch.float32)
    for rows in stripes(width):
        upper = product[rows, rows.start :]
        _multiply(x[:, rows], x[:, rows.start :], upper)
        if scale is not None:
            # The product of two scales is the same both ways, so the result stays symmetric.
            upper.mul_(torch.outer(scale[rows], scale[rows.start :]))
        product[rows.stop :, rows] = product[rows, rows.stop :].T
    return product


def _cross(left_chunk: _Chunk, right_chunk: _Chunk) -> Tensor:
    (left, left_scale), (right, right_scale) = left_chunk, right_chunk
    product = left.new_empty(left.shape[1], right.shape[1], dtype=torch.float32)
    if left_scale is None or right_scale is None:
        return _multiply(left, right, product)

    # In stripes, so that the int32 sums are not all held at once.
    for rows in stripes(len(product)):
        stripe = _multiply(left[:, rows], right, product[rows])
        stripe.mul_(torch.outer(left_scale[rows], right_scale))
    return product


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == torch.int8:
        # Exact, with int32 sums; torch has no public name for it.
        return out.copy_(torch._int_mm(left.T, right))
    if left.dtype in HALF_DTYPES:
        return torch.mm(left.T, right, out_dtype=torch.float32, out=out)
    return torch.mm(left.T, right, out=out)


def _quantize_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (tokens, in), and the scale of each channel (in,)."""
    of_tiles = (absmax(tile, dim=0) for tile in torch.split(x, TOKEN_TILE))
    scale = functools.reduce(torch.maximum, of_tiles).squeeze(0).float().div_(127)
    # Divided by a subnormal scale, a quotient is no longer at most 127.
    scale.masked_fill_(scale < torch.finfo(scale.dtype).tiny, 1.0)

    codes = torch.empty_like(x, dtype=torch.int8)
    tiles = zip(torch.split(x, TOKEN_TILE), torch.split(codes, TOKEN_TILE), strict=True)
    for tile, tile_codes in tiles:
        tile_codes.copy_((tile.float() / scale).round_())
    return codes, scale


def _uses_int8(x: Tensor) -> bool:
    return x.device.type == "cpu" and len(x) >= MIN_SIZE and has_cpu_feature(*INT8_INSTRUCTIONS)
