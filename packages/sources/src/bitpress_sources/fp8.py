"""`quant_method: fp8` as transformers and DeepSeek's models up to V3.2 store it, and `fbgemm_fp8`.

Weights are E4M3. `weight_scale_inv`, or `weight_scale`, multiplies, whatever its name says: one
number for all, for each row, for each tile of 128 x 128, or for each group of 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitpress import CheckpointError, QuantizedSource, hookimpl
from bitpress_sources.deepseek_v4 import modules_with_scales
from bitpress_sources.layouts import FP8, Tensors, fp8_weight, quantization_table

METHODS = ("fp8", "fbgemm_fp8")

SCALES = ("weight_scale_inv", "weight_scale")

# Of activations: the model that the weights stand for has none.
OF_ACTIVATIONS = ("input_scale", "activation_scale", "input_scale_ub")

# DeepSeek's weight_block_size, where the config names none.
DEFAULT_TILE = (128, 128)


@hookimpl
def find_quantized_weights(
    folder: Path, config: Mapping[str, Any], tensors: Tensors
) -> QuantizedSource | None:
    """Weights in E4M3, by `quant_method`."""
    table = quantization_table(config)
    method = str(table.get("quant_method") or "fp8")
    # transformers' own key; older configs name no method
    if method not in METHODS or ("quant_method" not in table and "activation_scheme" not in table):
        return None
    if modules_with_scales(config, tensors):
        return None
    tiles = [_tile(table.get("weight_block_size")) or DEFAULT_TILE]
    weights, left_out = {}, set()
    for name, spec in tensors.items():
        module, _, leaf = name.rpartition(".")
        if spec.dtype != FP8:
            of_fp8 = f"{module}.weight" in tensors and tensors[f"{module}.weight"].dtype == FP8
            if leaf in (*SCALES, *OF_ACTIVATIONS) and of_fp8:
                left_out.add(name)
            continue
        scales = [scale for scale in SCALES if f"{module}.{scale}" in tensors]
        if leaf != "weight" or len(spec.shape) != 2 or not scales:
            raise CheckpointError(
                f"{folder}: tensor {name} is in FP8 and has no {' or '.join(SCALES)} beside it"
            )
        weights[name] = fp8_weight(tensors, name, f"{module}.{scales[0]}", tiles)
    return QuantizedSource(method, weights, left_out)


def _tile(size: Any) -> tuple[int, int] | None:
    """The tile that a config names, if it does."""
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None
