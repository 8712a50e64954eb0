"""`quant_method: awq`: 4-bit integers with zero points, packed along the rows (outputs).

`qweight` is I32 (in, out / 8), `qzeros` I32 (groups, out / 8), `scales` F16 (groups, out). The
eight codes of a word belong to the rows 0, 2, 4, 6, 1, 3, 5, 7 of it, the first in the lowest bits
(AutoAWQ 0.2.9, `WQLinear_GEMM`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitpress import (
    CheckpointError,
    CodeForm,
    QuantizedSource,
    QuantizedTensor,
    QuantizedWeight,
    StoredPart,
    hookimpl,
)
from bitpress.numerics import unpack_bytes
from bitpress_sources.layouts import (
    AUTO_ROUND,
    Tensors,
    dtype_of,
    modules_with,
    quantization_table,
    require,
)

BITS = 4

# How AutoRound names the layout in its own method.
PACKING = "auto_round:auto_awq"

# Descriptions of which `config.json` has a copy.
DESCRIPTIONS = ("quant_config.json", "quantization_config.json")

# Rows whose codes share a word, and where each row's code lies in it.
ROWS_PER_WORD = 32 // BITS
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@hookimpl
def find_quantized_weights(
    folder: Path, config: Mapping[str, Any], tensors: Tensors
) -> QuantizedSource | None:
    """Layers with `qweight`, by `quant_method`."""
    table = quantization_table(config)
    method = table.get("quant_method")
    if method != "awq" and (method, table.get("packing_format")) != (AUTO_ROUND, PACKING):
        return None
    bits, version = table.get("bits", BITS), str(table.get("version", "gemm")).lower()
    if bits != BITS or version != "gemm":
        raise CheckpointError(
            f"{folder}: AWQ with {bits} bits in the version {version!r}, and {BITS} bits in the "
            "version 'gemm' are read: start from the original"
        )
    modules = list(modules_with(tensors, "qweight"))
    return QuantizedSource(
        str(method),
        {f"{module}.weight": _weight(tensors, module) for module in modules},
        left_files=DESCRIPTIONS,
    )


def _weight(tensors: Tensors, module: str) -> QuantizedWeight:
    name = f"{module}.qweight"
    packed = tensors[name]
    scales = require(tensors, f"{module}.scales", name)
    zeros = require(tensors, f"{module}.qzeros", name)
    num_columns, num_rows = packed.shape[0], ROWS_PER_WORD * packed.shape[-1]
    num_groups = scales.shape[0]
    fits = (scales.shape, zeros.shape) == ((num_groups, num_rows), (num_groups, packed.shape[-1]))
    if not fits or num_columns % num_groups:
        raise CheckpointError(
            f"tensors {name} {list(packed.shape)}, qzeros {list(zeros.shape)} and scales "
            f"{list(scales.shape)} do not fit one another"
        )
    parts = {
        "codes": StoredPart(name, 1, axis=1),
        "scale": StoredPart(f"{module}.scales", ROWS_PER_WORD, axis=1),
        "zero_point": StoredPart(f"{module}.qzeros", 1, axis=1),
    }
    form = CodeForm("integer", BITS, (1, num_columns // num_groups), dtype_of(scales), True)
    return QuantizedWeight((num_rows, num_columns), parts, _decode, ROWS_PER_WORD, form)


def _decode(parts: Mapping[str, Tensor]) -> QuantizedTensor:
    return QuantizedTensor(
        _unpack(parts["codes"]).T.contiguous(),
        parts["scale"].T.contiguous().float(),
        _unpack(parts["zero_point"]).T.contiguous(),
    )


def _unpack(words: Tensor) -> Tensor:
    """(n, words) int32 as (n, 8 words) uint8."""
    codes = unpack_bytes(words.contiguous().view(torch.uint8), BITS)
    codes = codes.reshape(len(words), -1, ROWS_PER_WORD)
    return codes[:, :, list(PLACES)].flatten(1)
