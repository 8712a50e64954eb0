"""Products with weights of which at most two in four neighbors are not zero, on sparse tensor cores
(cuSPARSELt, through torch).
"""

from __future__ import annotations

import functools
from bisect import bisect_left

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitpress_sparse.bitmask import as_integers

# Tokens for which an algorithm is chosen; one for more tokens is that of the last.
BATCHES = (16, 64, 256, 1024, 4096)

# What rows of a weight, and by bytes of a number its columns and tokens, must be a multiple of
# (torch.sparse.SparseSemiStructuredTensorCUSPARSELT).
ROW_MULTIPLE = 32
COLUMN_MULTIPLE = {1: 32, 2: 16}
TOKEN_MULTIPLE = {1: 16, 2: 8}


def pack(weight: Tensor) -> Tensor:
    """The weight as sparse tensor cores take it.

    Args:
        weight: (out, in), at most two of four neighbors not zero; columns as `fits` asks.
    """
    # Minus zero has a bit that is not.
    bits = as_integers(weight) * (weight.float() != 0)
    padded = pad_rows(bits.view(weight.dtype), -len(weight) % ROW_MULTIPLE)
    return torch._cslt_compress(padded)


def fits(num_columns: int, dtype: torch.dtype) -> bool:
    """Whether a weight of so many columns can be packed."""
    return num_columns % COLUMN_MULTIPLE[dtype.itemsize] == 0


@functools.cache
def _choose_algorithms(
    num_rows: int, num_columns: int, dtype: torch.dtype, out_dtype: torch.dtype, device: str
) -> tuple[int, ...]:
    """The fastest algorithm for each of `BATCHES`, measured on a weight of zeros."""
    packed = pack(torch.zeros(num_rows, num_columns, dtype=dtype, device=device))
    inputs = torch.zeros(BATCHES[-1], num_columns, dtype=dtype, device=device)
    return tuple(
        torch._cslt_sparse_mm_search(
            packed,
            inputs[:count].t(),
            out_dtype=_requested(dtype, out_dtype),
            transpose_result=True,
        )
        for count in BATCHES
    )


def choose_algorithms(weight: Tensor, out_dtype: torch.dtype) -> list[int]:
    """The fastest algorithm for each of `BATCHES` and a weight (out, in) before it is packed."""
    shape = (weight.shape[0], weight.shape[1])
    return list(_choose_algorithms(*shape, weight.dtype, out_dtype, str(weight.device)))


@torch.library.custom_op("bitpress_sparse::linear", mutates_args=())
def linear(
    inputs: Tensor, packed: Tensor, num_rows: int, out_dtype: torch.dtype, algorithms: list[int]
) -> Tensor:
    """Compute inputs · weightᵀ.

    Args:
        inputs: (tokens, in) of the weight's dtype.
        packed: what `pack` made of the weight.
        num_rows: of the weight.
        out_dtype: of the result.
        algorithms: what `choose_algorithms` gave.

    Returns:
        (tokens, num_rows).
    """
    count = len(inputs)
    inputs = pad_rows(inputs, -count % TOKEN_MULTIPLE[inputs.element_size()]).contiguous()
    algorithm = algorithms[min(bisect_left(BATCHES, count), len(BATCHES) - 1)]
    result = torch._cslt_sparse_mm(
        packed,
        inputs.t(),
        out_dtype=_requested(packed.dtype, out_dtype),
        transpose_result=True,
        alg_id=algorithm,
    )
    return result[:count, :num_rows].contiguous()


@linear.register_fake
def _(
    inputs: Tensor, packed: Tensor, num_rows: int, out_dtype: torch.dtype, algorithms: list[int]
) -> Tensor:
    # Its `len` would be taken for a constant.
    return inputs.new_empty(inputs.shape[0], num_rows, dtype=out_dtype)


def _requested(dtype: torch.dtype, out_dtype: torch.dtype) -> torch.dtype | None:
    """The dtype that torch is asked for: of numbers of more than a byte it gives theirs alone."""
    return out_dtype if dtype.itemsize == 1 else None


def pad_rows(tensor: Tensor, count: int) -> Tensor:
    """The tensor (rows, columns) with so many rows of zeros below it."""
    if not count:
        return tensor
    return pad(as_integers(tensor), (0, 0, 0, count)).view(tensor.dtype)
