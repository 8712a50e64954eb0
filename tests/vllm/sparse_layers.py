"""Layers of vLLM's with biases and fused scales: prints by case how far the sparse method's outputs
are from those in float32. Run by test_sparse.py where vLLM is.
"""

from __future__ import annotations

import json

import cslt_reference
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from bitpress_vllm_sparse.activations import ActivationQuantizer
from bitpress_vllm_sparse.linear_method import SparseLinearMethod, _spread

# rows of the two parts of a fused layer, and the scale of each
WIDTHS, SCALES = [32, 64], [0.02, 0.03]


def prune(weight: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Zeros for all but the largest `num_kept` of every `group_size` neighbors."""
    groups = weight.view(len(weight), -1, group_size)
    kept = groups.abs().topk(num_kept, 2).indices
    return torch.zeros_like(groups).scatter_(2, kept, groups.gather(2, kept)).flatten(1)


def round_to_int8(inputs: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes, and a scale for each token."""
    scale = inputs.float().abs().amax(1, keepdim=True) / 127
    return (inputs.float() / scale).round().to(torch.int8), scale


def distance(weight: Tensor, is_quantized: bool) -> float:
    """The relative distance of outputs, of inputs (3, 5, in)."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 5, weight.shape[1], generator=generator).bfloat16()
    bias = torch.randn(len(weight), generator=generator).bfloat16()
    layer = Module()
    layer.logical_widths = WIDTHS
    if is_quantized:
        scale = torch.tensor(SCALES)
        row_scale = scale.repeat_interleave(torch.tensor(WIDTHS))
        numbers = (weight / row_scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        layer.weight_scale = Parameter(scale)
        codes, token_scale = round_to_int8(inputs.flatten(0, 1), None)
        products = codes.float() @ numbers.float().T * token_scale * row_scale
        quantizer = ActivationQuantizer(round_to_int8, torch.bfloat16)
    else:
        numbers = weight.bfloat16()
        products = inputs.flatten(0, 1).float() @ numbers.float().T
        quantizer = ActivationQuantizer(None, torch.bfloat16)
    layer.weight = Parameter(numbers, requires_grad=False)
    method = SparseLinearMethod(None)
    method._quantizer = quantizer
    method._pack(layer, quantizer, *_spread(numbers))
    expected = (products + bias.float()).view(3, 5, -1)
    return float((method.apply(layer, inputs, bias).float() - expected).norm() / expected.norm())


if __name__ == "__main__":
    library = cslt_reference.install()
    weight = torch.randn(sum(WIDTHS), 64, generator=torch.Generator().manual_seed(1))
    distances = {
        f"{pattern}, {'INT8' if is_quantized else '16 bits'}": distance(
            prune(weight, *map(int, pattern.split(":"))), is_quantized
        )
        for pattern in ("2:4", "4:8", "6:8")
        for is_quantized in (False, True)
    }
    print(json.dumps(distances))
