"""Products of tall matrices over their tokens: by far the most work of calibration.

Where a CPU multiplies integers several times as fast as floats, large products are taken of 8-bit
codes, each channel scaled by its largest magnitude among at most `TOKENS` tokens. Rounding then
adds to a channel's sum of squares at most TOKENS / (12 · 127²) of it, 2.2 %, even if one token
holds all of it, and some 0.01 % where inputs are normal: a small ridge.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from bitpress.numerics.blocks import absmax
from bitpress.runtime.cpu_features import cpu_has

# into which a symmetric or triangular product is cut: 9/16 of the whole are computed
STRIPES = 8

# columns of a stripe, or tokens of a product of codes: fewer are slower than what they save
LEAST = 256

# that are looked at, or coded, at a time: they stay in cache
ROWS = 64

# that share a channel's scale
TOKENS = 4096

# instructions for sums of 8-bit products
INTEGERS = ("avx512_vnni", "avx_vnni", "amx_int8")


def gram(x: Tensor) -> Tensor:
    """x.T @ x: (tokens, in) float32 -> (in, in) float32, of which a block and its mirror image are
    computed once.
    """
    return functools.reduce(Tensor.add_, map(_gram, torch.split(x, TOKENS)))


def cross(left: Tensor, right: Tensor) -> Tensor:
    """left.T @ right: (tokens, in) float32 each -> (in, in) float32."""
    return functools.reduce(
        Tensor.add_, map(_cross, torch.split(left, TOKENS), torch.split(right, TOKENS))
    )


def stripes(width: int) -> Iterator[slice]:
    """Columns, from the first to the last: taken together, what lies on one side of a diagonal is
    left out of a product.
    """
    step = max(-(-width // STRIPES), LEAST)
    for first in range(0, width, step):
        yield slice(first, min(first + step, width))


def _gram(x: Tensor) -> Tensor:
    width = x.shape[1]
    found = x.new_empty(width, width)
    x, scale = _coded(x) if _by_codes(x) else (x, None)
    for rows in stripes(width):
        upper = found[rows, rows.start :]
        _multiply(x[:, rows], x[:, rows.start :], upper)
        if scale is not None:
            # a product of two scales is the same both ways
            upper.mul_(torch.outer(scale[rows], scale[rows.start :]))
        found[rows.stop :, rows] = found[rows, rows.stop :].T
    return found


def _cross(left: Tensor, right: Tensor) -> Tensor:
    found = left.new_empty(left.shape[1], right.shape[1])
    if not _by_codes(left):
        return _multiply(left, right, found)
    (left, heights), (right, widths) = _coded(left), _coded(right)
    # the sums of integers are not held all at once
    for rows in stripes(len(found)):
        _multiply(left[:, rows], right, found[rows]).mul_(widths).mul_(heights[rows].unsqueeze(1))
    return found


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == torch.int8:
        # exact, in int32; torch has no public name for it
        return out.copy_(torch._int_mm(left.T, right))
    return torch.mm(left.T, right, out=out)


def _coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (tokens, in), and what a code of 1 means in each channel (in,)."""
    scale = (
        functools.reduce(torch.maximum, (absmax(part, dim=0) for part in torch.split(x, ROWS)))
        .squeeze(0)
        .div_(127)
    )
    # below, a quotient is no longer at most 127
    scale.masked_fill_(scale < torch.finfo(scale.dtype).tiny, 1.0)
    codes = torch.empty_like(x, dtype=torch.int8)
    for part, place in zip(torch.split(x, ROWS), torch.split(codes, ROWS), strict=True):
        place.copy_((part / scale).round_())
    return codes, scale


def _by_codes(x: Tensor) -> bool:
    return x.device.type == "cpu" and len(x) >= LEAST and cpu_has(*INTEGERS)
