"""INT8 weights per channel or per tensor, INT8 activations scaled per token while serving, or per
tensor beforehand.
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
    Statistic,
    StoredLayer,
    hookimpl,
    numerics,
    option,
)
from bitpress_int8 import activations, smoothing
from bitpress_int8.activations import quantize_activations

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALIASES",
    "EFFORTS",
    "MEASURED_LOSSES",
    "Options",
    "dequantize",
    "error_bound",
    "keep_codes",
    "observe",
    "quantize",
    "quantize_activations",
    "rescale",
    "serialize",
    "validate_hardware",
]

# As llm-compressor and vLLM call the same format.
ALIASES: Mapping[str, Mapping[str, str]] = {"W8A8": {}, "W8A8_INT8": {}}

# Plain rounding needs no data where scales of activations are dynamic.
EFFORTS: Mapping[str, Mapping[str, str]] = {
    "low": {"algorithm": "rtn"},
    "high": {"reference": "all"},
}

# tiny-llama: 60,000 tokens of a held-out text, benchmarks/README.md; SmolLM2: 16,384 of wikitext2.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.00034),
    MeasuredLoss("SmolLM2-135M-Instruct", 0.0097),
)

# Scales tried, in units of amax / 127.5.
RATIOS = tuple(1.02 - 0.02 * i for i in range(24))
# The scale amax / 127, at which both ends are reached and nothing is clipped.
UNCLIPPED_RATIO = (127.5 / 127,)


def _check_strength(instance: Options, attribute: attrs.Attribute[Any], value: str | float) -> None:
    if not isinstance(value, str) and not 0 <= value <= 1:
        raise ValueError(f"smoothing {value} is not auto, or a number from 0 (off) to 1")


@frozen
class Options(bitpress.ReferenceOptions):
    """Options of `int8`."""

    algorithm: Literal["gptq", "rtn"] = option(
        "gptq", "errors fed forward on calibration data, or plain rounding"
    )
    weights: Literal["channel", "tensor"] = option(
        "channel", "a scale per output channel, or per tensor (fused layers share it)"
    )
    activations: Literal["dynamic", "static"] = option(
        "dynamic", "scales per token while serving, or one found on data"
    )
    symmetric_activations: bool = option(True, "false: activations have a zero point")
    outliers: Literal["max", "percentile", "mse"] = option(
        "max", "static: reach the largest, 99.99 %, or what costs least"
    )
    smoothing: Literal["auto"] | float = option(
        "auto", "SmoothQuant: strength searched, given, or 0 for none", validator=_check_strength
    )
    rotate: Literal["none", "hadamard"] = option(
        "none", "hadamard: hidden states and heads are rotated (R1, R2), within the weights"
    )

    @property
    def bits(self) -> float:
        """Bits per code."""
        return 8

    @property
    def calibrated(self) -> bool:
        """All but plain rounding with dynamic scales looks at inputs."""
        return self.algorithm == "gptq" or self.activations == "static" or self.rescales

    @property
    def rescales(self) -> bool:
        """A searched strength does not make plain rounding need data."""
        if self.smoothing == "auto":
            return self.algorithm == "gptq" or self.activations == "static"
        return self.smoothing != 0

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
    """What GPTQ, SmoothQuant and static scales need of inputs, and GPTQ of the gradients of
    outputs; for a scale per tensor, the largest magnitude of the stack's weights.
    """
    if output_gradient is not None:
        return numerics.output_statistics(output_gradient) if options.algorithm == "gptq" else None
    if inputs is None:
        if options.weights == "channel":
            return None
        return {"amax": Statistic(numerics.absmax(weight), "max")}
    stats: dict[str, Statistic] = {}
    if options.algorithm == "gptq":
        stats |= numerics.gptq_statistics(inputs, weight, reference, residual)
    if options.activations == "static":
        stats |= numerics.observe_range(inputs, histogram=True)
    if options.rescales:
        stats |= smoothing.observe_channels(inputs)
    return stats


@hookimpl
def rescale(layer: Layer, stats: Mapping[str, Statistic], options: Options) -> Tensor | None:
    """SmoothQuant's factors."""
    strength = None if isinstance(options.smoothing, str) else options.smoothing
    return smoothing.factors(layer.weight, stats, strength, options.activations == "static")


@hookimpl
def keep_codes(form: CodeForm, shape: tuple[int, int], options: Options) -> Options | None:
    """Integers with a scale for each row and no zero points, rounded to nearest, their columns not
    multiplied.
    """
    is_same = (form.numbers, form.bits, form.group) == ("integer", 8, (1, shape[1]))
    if options.weights != "channel" or form.has_zero_points or not is_same:
        return None
    return attrs.evolve(options, algorithm="rtn", smoothing=0.0)


@hookimpl
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: Options) -> Layer:
    """Codes with scale (out, 1), searched, or with the one scale amax / 127 of the stack."""
    width = layer.weight.shape[1]
    # on the scales of the source, rounding changes nothing
    known_scale = _find_source_scale(layer)

    def fit(weight: Tensor, importance: Tensor | None) -> numerics.IntegerGrid:
        if options.weights == "channel" and known_scale is not None:
            return numerics.IntegerGrid(known_scale, None, 8, width)
        if options.weights == "channel":
            return numerics.fit_symmetric(weight, importance, 8, width, RATIOS)
        # The scale of the stack is that of its largest weight alone.
        largest = weight.new_full((1, 1), float(stats["amax"].value))
        scale = numerics.fit_symmetric(largest, None, 8, 1, UNCLIPPED_RATIO).scale
        return numerics.IntegerGrid(scale.expand(len(weight), 1), None, 8, width)

    if "hessian" in stats:
        weight, grid = numerics.gptq_quantize(layer, stats, fit)
    else:
        weight, grid = layer.weight, fit(layer.weight, None)
    # Zeros stay zero, so `mask` holds by itself.
    codes = grid.codes(weight)  # (out, in)
    qparams = {"scale": grid.scale if options.weights == "channel" else grid.scale[0, 0]}
    if options.activations == "static":
        qparams |= activations.static_qparams(
            stats, options.symmetric_activations, options.outliers
        )
    return attrs.evolve(
        layer,
        weight=lambda: numerics.decode_integers(codes, grid.scale),
        codes=codes,
        qparams=qparams,
    )


def _find_source_scale(layer: Layer) -> Tensor | None:
    """The scales (out, 1) of a source's bytes; None where there are none that can be stored."""
    import torch

    source = layer.quantized
    if source is None or source.codes.dtype != torch.int8 or source.group_index is not None:
        return None
    scale = source.scale
    is_stored = bool(((scale > 0) & scale.isfinite()).all())
    is_by_row = scale.shape == (len(layer.weight), 1) and source.zero_point is None
    return scale if is_by_row and is_stored else None


@hookimpl
def serialize(layer: Layer, options: Options) -> StoredLayer:
    """`weight` I8 (out, in), `weight_scale` F32 (out, 1) or (1,); for static activations
    `input_scale` and `input_zero_point`.
    """
    assert layer.codes is not None
    tensors = {"weight": layer.codes, "weight_scale": layer.qparams["scale"]}
    for name, tensor in layer.qparams.items():
        if name.startswith("input_"):
            tensors[name] = tensor
    tensors = {name: t if t.ndim else t.reshape(1) for name, t in tensors.items()}

    is_static = options.activations == "static"
    inputs: dict[str, Any] = {
        "num_bits": 8,
        "type": "int",
        "symmetric": options.symmetric_activations,
        "dynamic": not is_static,
        "strategy": "tensor" if is_static else "token",
    }
    if not options.symmetric_activations:
        inputs["zp_dtype"] = "torch.int8"
    weights = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": options.weights,
        "dynamic": False,
    }
    config = {"format": "int-quantized", "weights": weights, "input_activations": inputs}
    return StoredLayer(tensors, config)


@hookimpl
def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """Codes times scale."""
    return tensors["weight"].float() * tensors["weight_scale"].float()


@hookimpl
def error_bound(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: Options
) -> Tensor | None:
    """Half a step, more where a searched scale clips; GPTQ moves weights on purpose."""
    if options.algorithm == "gptq":
        return None
    codes, scale = tensors["weight"], tensors["weight_scale"]
    ratios = RATIOS if config["weights"]["strategy"] == "channel" else UNCLIPPED_RATIO
    return numerics.integer_bound(
        codes, scale.view(-1, 1).expand(len(codes), 1), None, 8, min(ratios)
    )


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Integer arithmetic on nearly every device; best where there is no FP8. Facts: vLLM 0.32."""
    if hardware.vendor == "nvidia":
        capability = hardware.capability or (0, 0)
        if capability < (7, 5):
            return [
                Finding(
                    "unsupported",
                    "vLLM runs INT8 checkpoints from capability 7.5 on; transformers runs them "
                    "anywhere",
                )
            ]
        if capability < (8, 9):
            return [
                Finding(
                    "recommended",
                    "INT8 tensor cores, and no FP8 below capability 8.9; best at high throughput",
                )
            ]
        if capability < (10, 0):
            return [
                Finding(
                    "supported",
                    "INT8 tensor cores; FP8 (scheme fp8) is as fast here and loses less on "
                    "outliers",
                )
            ]
        text = (
            "vLLM's CUTLASS kernels refuse INT8 from capability 10.0 on, and are its first choice; "
            "fp8 serves better here"
        )
        return [
            Finding(
                "degraded",
                f"{text} (its Triton kernels, with "
                "VLLM_DISABLED_KERNELS=CutlassInt8ScaledMMLinearKernel)",
            )
        ]
    if hardware.vendor == "cpu":
        return [Finding("recommended", "vLLM's CPU build runs every variant with oneDNN")]
    if hardware.vendor == "amd":
        return [Finding("supported", "ROCm kernels (aiter, Triton)")]
    if hardware.vendor == "google":
        return [Finding("supported", "by vLLM's TPU plugin, which is released apart from it")]
    return [Finding("supported", "vLLM's Triton kernels")]
