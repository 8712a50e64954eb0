"""How a linear layer with zeros is loaded, and computed with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)

from bitpress_vllm_sparse import sparse_product, windows
from bitpress_vllm_sparse.activations import ActivationQuantizer, find_activation_quantizer
from bitpress_vllm_sparse.bitmask_parameters import BitmaskParameters


# vLLM asks by the name of the class; methods of both kinds that it wraps are supported.
@register_weight_loader_v2_supported_method
class SparseLinearMethod(LinearMethodBase):
    """A layer's numbers are loaded with or without its zeros. Where the device has sparse tensor
    cores for them it is computed with on these, elsewhere by the dense method.
    """

    def __init__(self, dense: LinearMethodBase) -> None:
        self.dense = dense
        # None: the dense method computes
        self._quantizer: ActivationQuantizer | None = None
        self._num_rows = 0
        self._algorithms: list[int] = []

    def create_weights(self, layer: Any, *arguments: Any, **named: Any) -> None:
        """The dense method's parameters, and those of what is stored in place of zeros."""
        self.dense.create_weights(layer, *arguments, **named)
        self._bitmasks = BitmaskParameters(layer)
        self._quantizer = find_activation_quantizer(layer, self.dense)
        # What comes before the layer must not round its inputs for the dense kernel.
        layer.requires_unquantized_input = self._quantizer is not None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight for sparse tensor cores, or leave it to the dense method."""
        self._bitmasks.finish()
        if self._quantizer is not None and (spread := _spread(layer.weight.data)) is not None:
            self._pack(layer, self._quantizer, *spread)
            return
        self._quantizer = None
        layer.requires_unquantized_input = False
        self.dense.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute x · weightᵀ + bias: (..., in) -> (..., out)."""
        if self._quantizer is None:
            return self.dense.apply(layer, x, bias)
        inputs, scale = self._quantizer.quantize(layer, x)
        if layer.window_columns is not None:
            inputs = windows.repeat_inputs(inputs, layer.window_columns)
        out_dtype = self._quantizer.out_dtype
        result = sparse_product.linear(
            inputs, layer.weight, self._num_rows, out_dtype, self._algorithms
        )
        if scale is not None:
            result = result * scale * layer.weight_scale
        if bias is not None:
            result = result + bias
        return result.to(x.dtype).view(*x.shape[:-1], self._num_rows)

    def _pack(
        self, layer: Any, quantizer: ActivationQuantizer, weight: Tensor, columns: Tensor | None
    ) -> None:
        """Let the packed weight take the place of the dense one.

        Args:
            layer: whose weight it is.
            quantizer: of its inputs.
            weight: (out, in), of which 2 in 4 columns are not zero.
            columns: (in,) which input each of them takes; None where it is its own.
        """
        self._num_rows = len(weight)
        self._algorithms = sparse_product.choose_algorithms(weight, quantizer.out_dtype)
        layer.weight = Parameter(sparse_product.pack(weight), requires_grad=False)
        layer.register_buffer("window_columns", columns, persistent=False)
        if quantizer.is_scaled:
            layer.weight_scale = Parameter(quantizer.row_scale(layer), requires_grad=False)
        # Parts of a fused layer have the same inputs, rounded once with the largest static scale.
        if getattr(layer, "input_scale", None) is not None:
            scale = layer.input_scale.data.max().view(1)
            layer.input_scale = Parameter(scale, requires_grad=False)


def _spread(weight: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """The weight with 2 of 4 columns that are not zero, and which input each column takes; None
    where it has no such pattern, or a width that kernels do not take.
    """
    is_nonzero, columns = weight.float() != 0, None
    if not windows.keeps(is_nonzero, 2, 4):
        if not windows.keeps(is_nonzero, 6, 8):
            return None
        columns = windows.window_columns(weight.shape[1], weight.device)
        weight = windows.spread(weight, is_nonzero)
    if not sparse_product.fits(weight.shape[1], weight.dtype):
        return None
    return weight, columns
