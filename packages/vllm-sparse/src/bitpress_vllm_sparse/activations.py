"""Which numbers a sparse product multiplies: the model's own, or activations rounded to a weight's
dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW8A8Fp8,
    CompressedTensorsW8A8Int8,
)
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.platforms import current_platform

# vLLM shows what is logged below its own name.
logger = init_logger("vllm.bitpress_sparse")

# Capabilities from which on sparse tensor cores take numbers of a kind.
FIRST, FIRST_WITH_FP8 = (8, 0), (9, 0)


@frozen(eq=False)
class ActivationQuantizer:
    """How a layer's inputs (tokens, in) become numbers of its weight's dtype.

    Attributes:
        round_inputs: (inputs (tokens, in), static scale) -> codes (tokens, in), and scales that
            broadcast to (tokens, out); None where they stay as they are.
        out_dtype: in which products leave the kernel, before they are scaled.
    """

    round_inputs: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] | None
    out_dtype: torch.dtype

    @property
    def is_scaled(self) -> bool:
        """Whether products have scales."""
        return self.round_inputs is not None

    def quantize(self, layer: Any, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers (tokens, in) of the weight's dtype, and their scales if they have some."""
        inputs = inputs.reshape(-1, inputs.shape[-1])
        if self.round_inputs is None:
            return inputs, None
        return self.round_inputs(inputs, getattr(layer, "input_scale", None))

    def row_scale(self, layer: Any) -> Tensor:
        """(1, out) float32: what each row's products are multiplied with.

        A fused layer with a scale for each of its parts has one for every row of it.
        """
        scale = layer.weight_scale.data.flatten().float()
        if len(scale) == len(layer.logical_widths) != sum(layer.logical_widths):
            widths = torch.tensor(layer.logical_widths, device=scale.device)
            scale = scale.repeat_interleave(widths)
        return scale.view(1, -1)


def find_activation_quantizer(layer: Any, method: LinearMethodBase) -> ActivationQuantizer | None:
    """How a layer's inputs are rounded for a sparse product; None where there is no such product,
    for its kind or on this device.
    """
    quantizer = _quantizer_of(layer, method)
    if quantizer is None:
        reason: str | None = f"{_kind(layer, method)} has no sparse product"
    else:
        is_fp8 = layer.weight.dtype == torch.float8_e4m3fn
        reason = explain_dense(FIRST_WITH_FP8 if is_fp8 else FIRST)
    if reason is not None:
        logger.info_once("bitpress-sparse: %s: zeros are computed with like other weights", reason)
        return None
    return quantizer


def _quantizer_of(layer: Any, method: LinearMethodBase) -> ActivationQuantizer | None:
    """How the inputs of a layer are rounded, for kinds that have a sparse product."""
    model_dtype: torch.dtype = layer.params_dtype
    if isinstance(method, UnquantizedLinearMethod):
        return ActivationQuantizer(None, model_dtype) if model_dtype.itemsize == 2 else None
    # Sums of codes fit bfloat16; float16 is too short for them.
    is_wide = model_dtype == torch.bfloat16
    scheme = layer.scheme
    if isinstance(scheme, CompressedTensorsW8A8Fp8) and scheme.weight_block_size is None:
        shape = GroupShape.PER_TENSOR if scheme.is_static_input_scheme else GroupShape.PER_TOKEN
        quantize = QuantFP8(static=scheme.is_static_input_scheme, group_shape=shape)
        return ActivationQuantizer(quantize, model_dtype if is_wide else torch.float32)
    if isinstance(scheme, CompressedTensorsW8A8Int8) and scheme.input_symmetric:
        return ActivationQuantizer(_round_to_int8, model_dtype if is_wide else torch.int32)
    return None


def _kind(layer: Any, method: LinearMethodBase) -> str:
    return type(getattr(layer, "scheme", method)).__name__


def explain_dense(first: tuple[int, int]) -> str | None:
    """Why this device has no sparse product; None where it has one.

    Args:
        first: the capability from which on a GPU has it.
    """
    if not current_platform.is_cuda():
        return f"sparse tensor cores are NVIDIA's, and this is {current_platform.device_name}"
    if not current_platform.has_device_capability(first):
        return f"sparse tensor cores take such numbers from capability {first[0]}.{first[1]} on"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    return None


def _round_to_int8(inputs: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale, _ = _custom_ops.scaled_int8_quant(inputs, scale)
    return codes, scale
