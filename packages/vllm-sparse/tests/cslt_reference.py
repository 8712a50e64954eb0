"""torch's operators for sparse tensor cores on a CPU, slowly: the same arguments, the same limits,
and the bits of a packed weight as torch's own conversion for CUTLASS lays them out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

# Which dtypes of results cuSPARSELt has for those of numbers.
OUT_DTYPES = {
    torch.float16: {torch.float16},
    torch.bfloat16: {torch.bfloat16},
    torch.int8: {torch.int8, torch.int32, torch.float16, torch.bfloat16},
    torch.float8_e4m3fn: {torch.float16, torch.bfloat16, torch.float32},
}
NUM_ALGORITHMS = 7


def _with_arithmetic(tensor: Tensor) -> Tensor:
    """FP8 as bytes: only zeros are looked for."""
    return tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor


def compress(weight: Tensor) -> Tensor:
    """(rows, columns · 9 / 16), of one byte 10 / 16: numbers, then where they were."""
    assert weight.is_contiguous()
    multiple = 32 if weight.element_size() == 1 else 16
    assert not weight.shape[0] % 32, f"{weight.shape[0]} rows"
    assert not weight.shape[1] % multiple, f"{weight.shape[1]} columns"
    quads = (_with_arithmetic(weight) != 0).view(len(weight), -1, 4).sum(2)
    assert quads.max() <= 2, "more than two of four numbers are not zero"
    numbers, places = sparse_semi_structured_from_dense_cutlass(_with_arithmetic(weight))
    packed = torch.cat([x.contiguous().flatten().view(torch.uint8) for x in (numbers, places)])
    return packed.view(weight.dtype).view(len(weight), -1)


def expand(packed: Tensor, num_columns: int) -> Tensor:
    """(rows, columns) float32, of what `compress` made."""
    num_rows = len(packed)
    integers = torch.int8 if packed.element_size() == 1 else packed.dtype
    count = num_rows * num_columns // 2 * packed.element_size()
    flat = packed.flatten().view(torch.uint8)
    numbers = flat[:count].view(integers).view(num_rows, -1)
    place_dtype = torch.int32 if packed.element_size() == 1 else torch.int16
    places = flat[count:].view(place_dtype).view(num_rows, -1)
    dense = sparse_semi_structured_to_dense_cutlass(numbers, places)
    return dense.view(packed.dtype).float()


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
    out_dtype = out_dtype or dense.dtype
    assert out_dtype in OUT_DTYPES[dense.dtype], f"{dense.dtype} to {out_dtype}"
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
