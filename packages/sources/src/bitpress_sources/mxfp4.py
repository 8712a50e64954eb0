"""`quant_method: mxfp4` as gpt-oss stores its experts: E2M1 numbers in groups of 32, each with a
power of two, of all experts of a block in one tensor.

`X_blocks` is U8 (experts, out, in / 32, 16), the first number of a byte in its low bits; `X_scales`
is U8 (experts, out, in / 32). The model's own `X` is (experts, in, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitpress import CheckpointError, QuantizedSource, QuantizedWeight, StoredPart, hookimpl
from bitpress_sources.layouts import (
    MX_GROUP,
    Tensors,
    float_scale,
    quantization_table,
    require,
    unpack_e2m1,
)


@hookimpl
def find_quantized_weights(
    folder: Path, config: Mapping[str, Any], tensors: Tensors
) -> QuantizedSource | None:
    """Experts in MXFP4, by `quant_method`."""
    if quantization_table(config).get("quant_method") != "mxfp4":
        return None
    weights = {
        name.removesuffix("_blocks"): _experts(tensors, name)
        for name in tensors
        if name.endswith("_blocks")
    }
    return QuantizedSource("mxfp4", weights)


def _experts(tensors: Tensors, name: str) -> QuantizedWeight:
    blocks = tensors[name].shape
    scale_name = f"{name.removesuffix('_blocks')}_scales"
    scale = require(tensors, scale_name, name)
    if len(blocks) != 4 or 2 * blocks[3] != MX_GROUP or scale.shape != blocks[:3]:
        raise CheckpointError(
            f"tensors {name} {list(blocks)} and {scale_name} {list(scale.shape)} are no experts in "
            "MXFP4: (experts, out, groups, 16) and (experts, out, groups) are"
        )
    num_experts, num_rows, num_groups, _ = blocks

    def decode(parts: Mapping[str, Tensor]) -> Tensor:
        numbers = unpack_e2m1(parts["blocks"].reshape(-1, MX_GROUP // 2))  # (groups of all, 32)
        numbers = numbers * float_scale(parts["scale"]).reshape(-1, 1)
        return numbers.reshape(-1, num_rows, num_groups * MX_GROUP).transpose(1, 2)

    parts = {"blocks": StoredPart(name, 1), "scale": StoredPart(scale_name, 1)}
    return QuantizedWeight((num_experts, num_groups * MX_GROUP, num_rows), parts, decode)
