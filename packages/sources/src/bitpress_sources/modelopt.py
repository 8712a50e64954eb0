"""NVIDIA ModelOpt's checkpoints: FP8 and NVFP4, described by `hf_quant_config.json` or by a
`quantization_config` of the same keys.

FP8: `weight` E4M3 and `weight_scale`, which multiplies. NVFP4: `weight` U8 with two E2M1 numbers in
a byte, `weight_scale` E4M3 for each group of 16, and `weight_scale_2`, both of which multiply.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitpress import CheckpointError, QuantizedSource, QuantizedWeight, hookimpl
from bitpress_sources.layouts import (
    E8M0,
    FP8,
    MX_GROUP,
    OF_CACHES,
    Tensors,
    fp4_weight,
    fp8_weight,
    modules_with,
    quantization_table,
    remark_caches,
)

DESCRIPTION = "hf_quant_config.json"

NVFP4_GROUP = 16

TILES = [(128, 128)]

# Of activations, and of the cache.
LEFT_OUT = ("input_scale", *OF_CACHES)

# Factors of a layer's inputs: the weights do not stand for a plain model's.
PRE_QUANT_SCALE = "pre_quant_scale"


@hookimpl
def find_quantized_weights(
    folder: Path, config: Mapping[str, Any], tensors: Tensors
) -> QuantizedSource | None:
    """Weights with scales beside them, where ModelOpt is named."""
    table = quantization_table(config)
    if not str(table.get("quant_method", "")).startswith("modelopt"):
        described = _read_description(folder / DESCRIPTION) if not table else {}
        if described.get("producer", {}).get("name") != "modelopt":
            return None
    for module in modules_with(tensors, PRE_QUANT_SCALE):
        raise CheckpointError(
            f"{folder}: layer {module} has a {PRE_QUANT_SCALE} for its inputs, which a plain model "
            "has not: start from the original"
        )
    weights = {
        f"{module}.weight": _weight(folder, tensors, module)
        for module in modules_with(tensors, "weight_scale")
    }
    left_out = {name for name in tensors if name.rpartition(".")[2] in LEFT_OUT}
    remarks = remark_caches(tensors)
    return QuantizedSource("modelopt", weights, left_out, left_files=[DESCRIPTION], remarks=remarks)


def _weight(folder: Path, tensors: Tensors, module: str) -> QuantizedWeight:
    name, scale_name = f"{module}.weight", f"{module}.weight_scale"
    global_name = f"{module}.weight_scale_2"
    spec = tensors.get(name)
    if spec is not None and spec.dtype == FP8:
        return fp8_weight(tensors, name, scale_name, TILES)
    if spec is not None and spec.dtype == "U8":
        if tensors[scale_name].dtype in E8M0:
            return fp4_weight(tensors, name, scale_name, MX_GROUP)
        if global_name in tensors:
            return fp4_weight(tensors, name, scale_name, NVFP4_GROUP, global_name)
    raise CheckpointError(
        f"{folder}: {name} is {spec or 'missing'}, and FP8 or U8 is read beside {scale_name} of "
        "ModelOpt: start from the original"
    )


def _read_description(file: Path) -> Mapping[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
