"""FP4 (E2M1) weights in groups of 16 with two levels of scales, activations rounded alike while
serving, or left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import frozen

import bitpress
from bitpress import (
    CodeForm,
    Finding,
    Hardware,
    Layer,
    MeasuredLoss,
    ShapeError,
    Statistic,
    StoredLayer,
    hookimpl,
    numerics,
    option,
)
from bitpress_nvfp4 import activations, scales

if TYPE_CHECKING:
    from torch import Tensor

# As llm-compressor calls the format with weights only.
ALIASES: Mapping[str, Mapping[str, str]] = {"NVFP4A16": {"activations": "float"}}

# Plain rounding needs data for the scale of rounded activations alone.
EFFORTS: Mapping[str, Mapping[str, str]] = {
    "low": {"algorithm": "rtn"},
    "high": {"reference": "all"},
}

# tiny-llama: 60,000 tokens of a held-out text, benchmarks/README.md; SmolLM2: 16,384 of wikitext2.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.01539),
    MeasuredLoss("SmolLM2-135M-Instruct", 0.1932),
    MeasuredLoss("tiny-llama (11M)", 0.00202, {"activations": "float"}),
    MeasuredLoss("tiny-llama (11M)", 0.00997, {"activations": "float", "algorithm": "rtn"}),
    MeasuredLoss("SmolLM2-135M-Instruct", 0.194, {"activations": "float", "algorithm": "rtn"}),
)


def _check_group_size(instance: Options, attribute: attrs.Attribute[Any], value: int) -> None:
    if value != scales.GROUP_SIZE:
        raise ValueError(
            f"group_size {value}: NVFP4 has a scale for every {scales.GROUP_SIZE} numbers, by "
            "definition, and kernels know no other; integer schemes have larger groups"
        )


@frozen
class Options(bitpress.ReferenceOptions):
    """Options of `nvfp4`."""

    activations: Literal["quantized", "float"] = option(
        "quantized", "quantized: W4A4, FP4 too; float: weights only (NVFP4A16)"
    )
    algorithm: Literal["gptq", "rtn"] = option(
        "gptq", "errors fed forward on calibration data, or plain rounding"
    )
    group_size: int = option(
        scales.GROUP_SIZE,
        "numbers that share a scale: fixed by the format",
        validator=_check_group_size,
    )
    rotate: Literal["none", "hadamard"] = option(
        "none", "hadamard: hidden states and heads are rotated (R1, R2), within the weights"
    )

    @property
    def bits(self) -> float:
        """Bits per code."""
        return 4

    @property
    def calibrated(self) -> bool:
        """The scale of activations and error feedback come from data."""
        return self.activations == "quantized" or self.algorithm == "gptq"

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated."""
        return self.rotate != "none"


# As many arguments as the hook has.
@hookimpl
def observe(  # noqa: PLR0913, PLR0917
    inputs: Tensor | None,
    reference: Tensor | None,
    residual: Tensor | None,
    output_gradient: Tensor | None,
    weight: Tensor,
    options: Options,
) -> Mapping[str, Statistic] | None:
    """What GPTQ needs of inputs before they are rounded, and of the gradients of outputs; the
    largest input; the largest magnitude of the stack's weights.

    Weights that are fitted to rounded inputs are smaller where rounding loses much: each layer
    would then lose a part of its output, which adds up where a few inputs are huge.
    """
    if output_gradient is not None:
        return numerics.output_statistics(output_gradient) if options.algorithm == "gptq" else None
    # vLLM takes the largest global scale of fused layers for all of them, which is wrong where they
    # differ: q, k and v, or gate and up, share one.
    if inputs is None:
        return {"amax": Statistic(numerics.absmax(weight), "max")}
    stats: dict[str, Statistic] = {}
    if options.activations == "quantized":
        stats |= numerics.observe_range(inputs, histogram=False)
    if options.algorithm == "gptq":
        stats |= numerics.gptq_statistics(inputs, weight, reference, residual)
    return stats


@hookimpl
def keep_codes(form: CodeForm, options: Options) -> Options | None:
    """Numbers of MXFP4, of which plain rounding finds the scales again."""
    import torch

    height, width = form.group
    is_mxfp4 = (form.numbers, form.bits, form.scale_dtype) == ("float", 4, torch.float8_e8m0fnu)
    if not is_mxfp4 or height != 1 or width % scales.GROUP_SIZE:
        return None
    return attrs.evolve(options, algorithm="rtn")


@hookimpl
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: Options) -> Layer:
    """Codes 0 to 15 with scale (out, in / 16) E4M3, and one global scale for the stack; another for
    inputs that are rounded.
    """
    width = layer.weight.shape[1]
    if width % scales.GROUP_SIZE:
        fitting = max(width // scales.GROUP_SIZE, 1) * scales.GROUP_SIZE
        raise ShapeError(
            f"width {width} is not a multiple of {scales.GROUP_SIZE}, NVFP4's group (as {fitting} "
            "is)"
        )
    global_scale = scales.global_scale(stats["amax"].value, scales.LARGEST_LOCAL_SCALE)

    def fit(weight: Tensor, importance: Tensor | None) -> scales.Grid:
        return scales.fit(weight, importance, global_scale)

    if options.algorithm == "gptq":
        weight, grid = numerics.gptq_quantize(layer, stats, fit)
    else:
        weight, grid = layer.weight, fit(layer.weight, None)
    # Zeros stay zero, so `mask` holds by itself.
    codes = grid.codes(weight)  # (out, in)
    qparams = {"scale": grid.local.contiguous(), "global_scale": global_scale}
    if options.activations == "quantized":
        qparams["input_global_scale"] = activations.input_global_scale(stats)
    return attrs.evolve(
        layer,
        weight=lambda: numerics.scale_groups(numerics.decode_e2m1(codes), grid.scale),
        codes=codes,
        qparams=qparams,
    )


@hookimpl
def pack(layer: Layer) -> Layer:
    """Two codes in a byte along the row, the first in its low half: (out, in / 2) uint8."""
    assert layer.codes is not None
    return attrs.evolve(layer, codes=numerics.pack_bytes(layer.codes, 4))


@hookimpl
def serialize(layer: Layer, options: Options) -> StoredLayer:
    """`weight_packed`, `weight_scale`, `weight_global_scale` F32 (1,), which divides; as options
    ask, `input_global_scale`.
    """
    assert layer.codes is not None
    tensors = {
        "weight_packed": layer.codes,
        "weight_scale": layer.qparams["scale"],
        "weight_global_scale": layer.qparams["global_scale"].reshape(1),
    }
    if "input_global_scale" in layer.qparams:
        tensors["input_global_scale"] = layer.qparams["input_global_scale"].reshape(1)
    common = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": scales.GROUP_SIZE,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    inputs = {**common, "dynamic": "local"} if options.activations == "quantized" else None
    config = {
        "format": "nvfp4-pack-quantized",
        "weights": {**common, "dynamic": False},
        "input_activations": inputs,
    }
    return StoredLayer(tensors, config)


@hookimpl
def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """Codes times local scales, divided by the global one."""
    codes = numerics.unpack_bytes(tensors["weight_packed"], 4)
    scale = numerics.decode_e4m3(tensors["weight_scale"]) / tensors["weight_global_scale"]
    return numerics.scale_groups(numerics.decode_e2m1(codes), scale)


@hookimpl
def error_bound(tensors: Mapping[str, Tensor], options: Options) -> Tensor | None:
    """Half a step of E2M1, more where a scale clips; GPTQ moves weights on purpose."""
    if options.algorithm == "gptq":
        return None
    codes = numerics.unpack_bytes(tensors["weight_packed"], 4)
    scale = numerics.decode_e4m3(tensors["weight_scale"]) / tensors["weight_global_scale"]
    bound = numerics.e2m1_bound(codes, scales.MAX_CLIPPED)
    # float32 rounds the quotient, the product and the difference
    return numerics.scale_groups(bound, scale * (1 + 2.0**-17))


@hookimpl
def quantize_activations(inputs: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """E2M1 numbers with a local scale for every 16 and the stored global one."""
    return activations.round_inputs(inputs, tensors["input_global_scale"].to(inputs.device))


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Native on Blackwell; weights only, or emulated, elsewhere. Facts: vLLM 0.32."""
    weights_only = options.activations == "float"
    if hardware.vendor == "nvidia":
        capability = hardware.capability or (0, 0)
        if capability >= (10, 0) and not weights_only:
            return [
                Finding(
                    "recommended",
                    "FP4 tensor cores (CUTLASS, FlashInfer): weights and activations in 4 bits",
                )
            ]
        if capability >= (10, 0):
            return [
                Finding(
                    "supported",
                    "weights only, 16-bit arithmetic; activations=quantized uses the FP4 tensor "
                    "cores",
                )
            ]
        if capability >= (7, 5) and weights_only:
            return [
                Finding(
                    "supported",
                    "weights only (Marlin kernels), as intended; w4a16 is as small and as fast "
                    "here",
                )
            ]
        if capability >= (7, 5):
            text = (
                "no FP4 arithmetic before Blackwell (capability 10.0): vLLM leaves activations in "
                "16 bits (Marlin kernels)"
            )
            return [Finding("degraded", f"{text}; w4a16 serves as well here")]
        return [
            Finding(
                "unsupported",
                "vLLM runs NVFP4 checkpoints from capability 7.5 on; w4a16 runs in transformers "
                "anywhere",
            )
        ]
    if hardware.vendor == "amd" and not weights_only:
        return [
            Finding("degraded", "vLLM emulates NVFP4 on AMD GPUs, slowly; fp8 or w4a16 serve there")
        ]
    return [
        Finding(
            "unsupported",
            f"vLLM has no NVFP4 kernels for {hardware.name}; w4a16 is as small and runs there",
        )
    ]
