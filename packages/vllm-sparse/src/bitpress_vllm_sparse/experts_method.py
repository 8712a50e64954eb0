"""How experts with zeros are loaded; they are computed with densely."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from bitpress_vllm_sparse.bitmask_parameters import BitmaskParameters

# vLLM's names for the layers before and after an expert's activation.
PREFIXES = ("w13_", "w2_")


def load_without_zeros(method: FusedMoEMethodBase) -> FusedMoEMethodBase:
    """The method, which also takes experts that are stored without their zeros.

    vLLM asks its methods for experts for a dozen properties and replaces some of them later: it is
    this very object that must be used, and only its loading changes.
    """
    create_weights, process = method.create_weights, method.process_weights_after_loading
    bitmasks: list[BitmaskParameters] = []

    def create_with_bitmasks(layer: Any, *arguments: Any, **named: Any) -> None:
        create_weights(layer, *arguments, **named)
        bitmasks.extend(BitmaskParameters(layer, prefix) for prefix in PREFIXES)

    def process_without_bitmasks(layer: Any) -> None:
        while bitmasks:
            bitmasks.pop().finish()
        process(layer)

    method.create_weights = create_with_bitmasks
    method.process_weights_after_loading = process_without_bitmasks
    return method
