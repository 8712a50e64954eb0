"""`quant_method: gptq`: integers packed along the columns (inputs), as AutoGPTQ and GPTQModel write
them, with columns in any order; and `auto-round` in the same layout.

`qweight` is I32 (in · bits / 32, out), `qzeros` I32 (groups, out · bits / 32), `scales` F16
(groups, out), and `g_idx` I32 (in) the group of each column. The format "gptq" stores each zero
point less 1, "gptq_v2" as it is.

vLLM 0.32 serves symmetric layers alone, so that GPTQModel decides what a zero point of 0 is in
"gptq".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
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

WORD_BITS = 32

# By the name of the format, what a stored zero point lacks.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}

# The same by AutoRound's names of its packings, in a method of its own.
PACKING_OFFSETS = {"auto_round:auto_gptq": 1, "auto_round": 0}

# Descriptions of which `config.json` has a copy.
DESCRIPTIONS = ("quantize_config.json", "quantization_config.json")


@frozen
class _ZeroPoints:
    """What a config says of zero points.

    Attributes:
        offset: what each stored one lacks.
        are_own: whether groups have their own, and not all half the range; None where codes are of
            no form that schemes know.
    """

    offset: int
    are_own: bool | None


@hookimpl
def find_quantized_weights(
    folder: Path, config: Mapping[str, Any], tensors: Tensors
) -> QuantizedSource | None:
    """Layers with `qweight`, by `quant_method`."""
    table = quantization_table(config)
    method, bits = table.get("quant_method"), table.get("bits")
    if method == "gptq":
        layout, offsets = table.get("checkpoint_format") or table.get("format"), ZERO_OFFSETS
    elif method == AUTO_ROUND and table.get("packing_format") in PACKING_OFFSETS:
        layout, offsets = table["packing_format"], PACKING_OFFSETS
    else:
        return None
    layout = str(layout or "gptq")
    if layout not in offsets or type(bits) is not int or bits not in range(2, 9):
        raise CheckpointError(
            f"{folder}: GPTQ of {bits} bits in the format {layout!r}, and 2 to 8 bits in the "
            f"formats {' and '.join(ZERO_OFFSETS)} are read: start from the original"
        )
    zero_points = _ZeroPoints(offsets[layout], _have_zero_points(table))
    weights = {
        f"{module}.weight": _weight(tensors, module, zero_points)
        for module in modules_with(tensors, "qweight")
    }
    left_out = {f"{m}.g_idx" for m in modules_with(tensors, "g_idx")}
    return QuantizedSource(str(method), weights, left_out, left_files=DESCRIPTIONS)


def _have_zero_points(table: Mapping[str, Any]) -> bool | None:
    """Whether a config says that groups have zero points of their own; None where codes are of no
    form that schemes know.
    """
    is_symmetric = table.get("sym", True) is not False
    # columns in any order; and AutoRound has negative scales beside symmetric codes
    is_auto_round = table["quant_method"] == AUTO_ROUND or "autoround_version" in table
    if table.get("desc_act") or (is_symmetric and is_auto_round):
        return None
    return not is_symmetric


def _weight(tensors: Tensors, module: str, zero_points: _ZeroPoints) -> QuantizedWeight:
    name = f"{module}.qweight"
    packed = tensors[name]
    scales = require(tensors, f"{module}.scales", name)
    zeros = require(tensors, f"{module}.qzeros", name)
    num_groups, num_rows = scales.shape
    # layers may differ in their bits, which the zero points tell
    bits = zeros.shape[-1] * WORD_BITS // max(num_rows, 1)
    num_columns = packed.shape[0] * WORD_BITS // max(bits, 1)
    parts = {
        "codes": StoredPart(name, WORD_BITS, axis=1),
        "scale": StoredPart(f"{module}.scales", WORD_BITS, axis=1),
        "zero_point": StoredPart(f"{module}.qzeros", bits, axis=1),
    }
    if f"{module}.g_idx" in tensors:
        parts["group_index"] = StoredPart(f"{module}.g_idx")
    if (
        bits not in range(2, 9)
        or packed.shape[1] != num_rows
        or zeros.shape != (num_groups, num_rows * bits // WORD_BITS)
    ):
        raise CheckpointError(
            f"tensors {name} {list(packed.shape)}, qzeros {list(zeros.shape)} and scales "
            f"{list(scales.shape)} do not fit one another"
        )

    def decode(stored: Mapping[str, Tensor]) -> QuantizedTensor:
        zero_point = _zero_points(stored["zero_point"], bits, zero_points.offset).T.contiguous()
        index = stored.get("group_index")
        # columns in their order need no index
        if index is not None and num_columns % num_groups == 0:
            in_order = torch.arange(num_columns, device=index.device) // (num_columns // num_groups)
            index = None if torch.equal(index.long(), in_order) else index
        return QuantizedTensor(
            _unpack(stored["codes"].T, bits),
            stored["scale"].T.contiguous().float(),
            zero_point,
            index,
        )

    form = None
    if zero_points.are_own is not None and num_columns % num_groups == 0:
        group = (1, num_columns // num_groups)
        form = CodeForm("integer", bits, group, dtype_of(scales), zero_points.are_own)
    return QuantizedWeight((num_rows, num_columns), parts, decode, WORD_BITS, form)


def _zero_points(words: Tensor, bits: int, offset: int) -> Tensor:
    """(n, words) int32 as (n, 32 words / bits) int16, each with what it lacks."""
    if WORD_BITS % bits:
        return _unpack(words, bits).short() + offset
    # GPTQModel takes 1 from all of a word at once, where a zero point of 0 borrows from the next
    ones = sum(1 << shift for shift in range(0, WORD_BITS, bits))
    return _unpack(words + offset * ones, bits).short()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """(n, words) int32 as (n, 32 words / bits) uint8, the first code in the lowest bits."""
    return unpack_bytes(words.contiguous().view(torch.uint8), bits)
