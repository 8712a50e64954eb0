"""DeepSeek V4's own files: linear layers in E4M3 with tiles of 128 x 128, experts in E2M1 with
groups of 32, and a `.scale` beside each, a power of two.

transformers 5.24 (`finegrained_fp8.py`, `Fp8Dequantize`) reads them so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitpress import CheckpointError, QuantizedSource, hookimpl
from bitpress_sources.layouts import (
    FP8,
    MX_GROUP,
    Tensors,
    fp4_weight,
    fp8_weight,
    modules_with,
    quantization_table,
)

# Bytes with two E2M1 numbers.
FP4_BYTES = ("I8", "U8")

TILE = (128, 128)

# vLLM's class names scales as DeepSeek's FP4 does where the config says so, or says nothing.
CONFIG_VALUES = {"expert_dtype": "fp8"}


@hookimpl
def find_quantized_weights(
    folder: Path, config: Mapping[str, Any], tensors: Tensors
) -> QuantizedSource | None:
    """Weights that have a `.scale` beside them, where the config says `scale_fmt`."""
    weights = {}
    for module in modules_with_scales(config, tensors):
        name, scale_name = f"{module}.weight", f"{module}.scale"
        dtype = tensors[name].dtype
        if dtype == FP8:
            weights[name] = fp8_weight(tensors, name, scale_name, [TILE])
        elif dtype in FP4_BYTES:
            weights[name] = fp4_weight(tensors, name, scale_name, MX_GROUP)
        else:
            raise CheckpointError(
                f"{folder}: tensor {name} is {dtype} and has a {scale_name} beside it: {FP8} or "
                f"{' or '.join(FP4_BYTES)} is expected"
            )
    if not weights:
        return None
    return QuantizedSource("DeepSeek V4's FP8 and FP4", weights, config_values=CONFIG_VALUES)


def modules_with_scales(config: Mapping[str, Any], tensors: Tensors) -> list[str]:
    """The layers of a model in this format; none where it is in another."""
    table = quantization_table(config)
    if table.get("quant_method") != "fp8" or not table.get("scale_fmt"):
        return []
    return [m for m in modules_with(tensors, "scale") if f"{m}.weight" in tensors]
