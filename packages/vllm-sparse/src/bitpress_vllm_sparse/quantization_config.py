"""The quantization method `bitpress-sparse`: compressed-tensors', if a config speaks of zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)

from bitpress_sparse import bitmask
from bitpress_vllm_sparse.experts_method import load_without_zeros
from bitpress_vllm_sparse.linear_method import SparseLinearMethod

NAME = "bitpress-sparse"
COMPRESSED_TENSORS = "compressed-tensors"

# The key of a config under which it speaks of zeros.
SPARSITY = "sparsity_config"

# Formats of layers that are stored without their zeros.
SPARSE_FORMATS = (bitmask.QUADS, bitmask.CHAINED)

# Bits from which on numbers are a model's own.
PLAIN_BITS = 16


@register_quantization_config(NAME)
class SparseConfig(CompressedTensorsConfig):
    """compressed-tensors' config, for layers with zeros, stored or not.

    Without arguments it is that of a model that is not quantized, whose layers may have zeros.
    """

    def __init__(
        self,
        target_scheme_map: dict[str, Any] | None = None,
        ignore: list[str] | None = None,
        quant_format: str = "dense",
        **options: Any,
    ) -> None:
        super().__init__(target_scheme_map or {}, ignore or [], quant_format, **options)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """The name of this method for a checkpoint whose config speaks of zeros, unless the user
        has named another.
        """
        is_sparse = hf_quant_cfg.get("quant_method") == COMPRESSED_TENSORS and hf_quant_cfg.get(
            SPARSITY
        )
        return NAME if is_sparse and user_quant in {None, NAME} else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseConfig:
        """The method of a checkpoint, from its `quantization_config`."""
        return super().from_config(without_sparsity(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """compressed-tensors' method for a layer; of a linear one, in a sparse one."""
        method = super().get_quant_method(layer, prefix)
        is_linear = isinstance(method, (UnquantizedLinearMethod, CompressedTensorsLinearMethod))
        if isinstance(layer, LinearBase) and is_linear:
            return SparseLinearMethod(method)
        if isinstance(layer, RoutedExperts):
            return load_without_zeros(method)
        return method


def without_sparsity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of the same model with its zeros stored, which vLLM's own class
    reads.
    """
    groups = {}
    for name, group in (config.get("config_groups") or {}).items():
        if group.get("format") not in SPARSE_FORMATS:
            groups[name] = group
        elif group["weights"]["num_bits"] < PLAIN_BITS:
            groups[name] = {**group, "format": find_dense_format(group)}
    dense = {key: value for key, value in config.items() if key != SPARSITY}
    return {**dense, "config_groups": groups}


def find_dense_format(group: Mapping[str, Any]) -> str:
    """compressed-tensors' name for how a group's numbers are stored with their zeros."""
    weights = group["weights"]
    if weights["type"] == "float":
        return "mxfp8-quantized" if weights["strategy"] == "group" else "float-quantized"
    # Codes for rounded activations lie in a byte each.
    inputs = group.get("input_activations") or {}
    return "int-quantized" if inputs.get("type") == "int" else "pack-quantized"
