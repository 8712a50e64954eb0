"""torch's operators for sparse tensor cores on a CPU, slowly: the same arguments, the same limits,
and as many bits of a packed weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Which dtypes of results may be asked for: of other numbers, none.
OUT_DTYPES = {
    torch.int8: {torch.int32, torch.float16, torch.bfloat16},
    torch.float8_e4m3fn: {torch.float16, torch.bfloat16, torch.float32},
}
NUM_ALGORITHMS = 7

# An integer type of as many bytes: not every dtype can be compared or gathered.
INTEGERS = {1: torch.uint8, 2: torch.int16}


def compress(weight: Tensor) -> Tensor:
    """(rows, columns · 9 / 16), of one byte 10 / 16: of each quad two numbers, then in four bits
    which they are.
    """
    assert weight.is_contiguous()
    multiple = 32 if weight.element_size() == 1 else 16
    assert not weight.shape[0] % 32, f"{weight.shape[0]} rows"
    assert not weight.shape[1] % multiple, f"{weight.shape[1]} columns"
    bits = weight.view(INTEGERS[weight.element_size()])
    quads = bits.view(len(weight), -1, 4)  # (rows, quads, 4)
    assert (quads != 0).sum(2).max() <= 2, "more than two of four numbers are not zero"
    order = (quads != 0).to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    places = order[..., :2].sort(dim=2).values  # (rows, quads, 2)
    numbers = quads.gather(2, places).flatten(1).view(torch.uint8)
    nibbles = places[..., 0] | places[..., 1] << 2  # (rows, quads)
    packed_places = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
    return torch.cat([numbers, packed_places], 1).view(weight.dtype)


def expand(packed: Tensor, num_columns: int) -> Tensor:
    """(rows, columns) float32, of what `compress` made."""
    count = num_columns // 2 * packed.element_size()
    row_bytes = packed.view(torch.uint8)
    numbers = row_bytes[:, :count].contiguous().view(packed.dtype).float()
    packed_places = row_bytes[:, count:]
    nibbles = torch.stack([packed_places & 15, packed_places >> 4], 2).flatten(1)
    places = torch.stack([nibbles & 3, nibbles >> 2], 2).long()  # (rows, quads, 2)
    dense = torch.zeros(len(packed), num_columns // 4, 4, dtype=torch.float32)
    return dense.scatter_(2, places, numbers.view_as(places)).flatten(1)


def multiply(  # noqa: PLR0913, PLR0917
    packed: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    """Compute packed · dense, (rows, tokens); transposed on request."""
    assert packed.dtype == dense.dtype
    assert bias is None
    assert alpha is None
    assert 0 <= alg_id < NUM_ALGORITHMS
    num_columns, num_tokens = dense.shape
    assert not num_tokens % (16 if dense.element_size() == 1 else 8), f"{num_tokens} tokens"
    # of bytes, columns must lie one after the other
    assert dense.t().is_contiguous()
    if out_dtype is not None:
        assert out_dtype in OUT_DTYPES[dense.dtype], f"{dense.dtype} to {out_dtype}"
    out_dtype = out_dtype or dense.dtype
    result = (expand(packed, num_columns).double() @ dense.double()).to(out_dtype)
    return result.t().contiguous() if transpose_result else result


def search(  # noqa: PLR0913, PLR0917
    packed: Tensor,
    dense: Tensor,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    transpose_result: bool = False,
) -> int:
    """An algorithm, another for each number of tokens."""
    multiply(packed, dense, bias, alpha, out_dtype, transpose_result)
    return dense.shape[1] % NUM_ALGORITHMS


def install() -> torch.library.Library:
    """Let torch use them; until what is returned is gone."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_cslt_compress", compress, "CPU")
    library.impl("_cslt_sparse_mm", multiply, "CPU")
    library.impl("_cslt_sparse_mm_search", search, "CPU")
    return library
