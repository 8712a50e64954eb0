"""FP8 (E4M3) weights per channel or per tensor; FP8 activations scaled per token while serving, or
per tensor beforehand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
from attrs import frozen

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
from bitpress_fp8 import activations, e4m3
from bitpress_fp8.activations import quantize_activations
from bitpress_fp8.e4m3 import dequantize, error_bound
from bitpress_fp8.hardware import gpu_findings

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
    "serialize",
    "validate_hardware",
]

# As llm-compressor and vLLM call the same format.
ALIASES: Mapping[str, Mapping[str, str]] = {"FP8_DYNAMIC": {}, "W8A8_FP8": {}}

# Error feedback takes two fifths off the loss on tiny-llama.
EFFORTS: Mapping[str, Mapping[str, str]] = {"high": {"algorithm": "gptq"}}

# tiny-llama: 60,000 tokens of a held-out text, benchmarks/README.md; SmolLM2: 16,384 of wikitext2.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.0024),
    MeasuredLoss("SmolLM2-135M-Instruct", 0.0262),
    MeasuredLoss("tiny-llama (11M)", 0.00251, {"weights": "tensor", "activations": "static"}),
    MeasuredLoss(
        "tiny-llama (11M)",
        0.0016,
        {"weights": "tensor", "activations": "static", "algorithm": "gptq"},
    ),
)


@frozen
class Options(e4m3.AlgorithmOptions):
    """Options of `fp8`."""

    weights: Literal["channel", "tensor"] = option(
        "channel", "a scale per output channel, or per tensor (fused layers share it)"
    )
    activations: Literal["dynamic", "static"] = option(
        "dynamic", "scales per token while serving, or one found on data"
    )
    outliers: Literal["max", "percentile", "mse"] = option(
        "max", "static: reach the largest, 99.99 %, or what costs least"
    )

    @property
    def calibrated(self) -> bool:
        """Static scales are found on data, and GPTQ needs it."""
        return self.activations == "static" or self.algorithm == "gptq"


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
    """What GPTQ needs of inputs and of the gradients of outputs; for a static scale, how large
    inputs are; for a scale per tensor, the largest magnitude of the stack's weights.
    """
    if output_gradient is not None:
        return numerics.output_statistics(output_gradient) if options.algorithm == "gptq" else None
    if inputs is None:
        if options.weights == "channel":
            return None
        # vLLM requantizes fused layers to the largest of their scales, with a loss where they
        # differ: q, k and v, or gate and up, share one.
        return {"amax": Statistic(numerics.absmax(weight), "max")}
    stats: dict[str, Statistic] = {}
    if options.algorithm == "gptq":
        stats |= numerics.gptq_statistics(inputs, weight, reference, residual)
    if options.activations == "static":
        stats |= numerics.observe_range(inputs, histogram=True)
    return stats


@hookimpl
def keep_codes(form: CodeForm, shape: tuple[int, int], options: Options) -> Options | None:
    """E4M3 with a scale for each row, or for the whole matrix, where rows get one."""
    rows, width = shape
    if options.weights != "channel" or form.group not in ((1, width), (rows, width)):
        return None
    return e4m3.keep_codes(form, options)


@hookimpl
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: Options) -> Layer:
    """Round with scale amax / 448: (out, 1) per channel, or one number; to nearest, or where a step
    has observed inputs for it by GPTQ.
    """
    # on the scales of the source, rounding changes nothing
    known_scale = e4m3.source_scale(layer, layer.weight.shape[1])

    def fit(weight: Tensor, importance: Tensor | None = None) -> numerics.FloatGrid:
        if options.weights == "tensor":
            scale = numerics.e4m3_scale(stats["amax"].value).expand(len(weight), 1)
        elif known_scale is not None:
            scale = known_scale
        else:
            scale = numerics.e4m3_scale(numerics.absmax(weight, dim=1))  # (out, 1)
        return numerics.FloatGrid(numerics.E4M3, scale, weight.shape[1])

    if "hessian" in stats:
        weight, grid = numerics.gptq_quantize(layer, stats, fit)
        layer = attrs.evolve(layer, weight=weight)
    else:
        grid = fit(layer.weight)
    scale = grid.scale if options.weights == "channel" else grid.scale[0, 0]
    input_qparams = {}
    if options.activations == "static":
        input_qparams["input_scale"] = activations.static_scale(stats, options.outliers)
    return e4m3.encode(layer, scale, scale, input_qparams)


@hookimpl
def serialize(layer: Layer, options: Options) -> StoredLayer:
    """`weight` F8_E4M3 (out, in), `weight_scale` F32 (out, 1) or (1,), and for static activations
    `input_scale` F32 (1,).
    """
    static = {"strategy": "tensor", "dynamic": False}
    dynamic = {"strategy": "token", "dynamic": True}
    weights = {"strategy": options.weights, "dynamic": False}
    return e4m3.store(layer, weights, static if options.activations == "static" else dynamic)


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Native from capability 8.9, tuned from 9.0; weight-only below; on CPUs only with a scale per
    channel.
    """
    if hardware.vendor != "cpu":
        return gpu_findings(hardware, "FP8")
    if options.activations == "static":
        return [
            Finding(
                "unsupported",
                "vLLM's CPU build runs no FP8 with static activation scales; activations=dynamic "
                "runs",
            )
        ]
    if options.weights == "channel" and hardware.architecture == "x86":
        return [Finding("supported", "vLLM's CPU build runs it; int8 or w4a16 are made for CPUs")]
    if options.weights == "channel":
        return [
            Finding(
                "degraded",
                "vLLM's CPU build for x86 runs it; on other CPUs this is not established",
            )
        ]
    return [
        Finding(
            "unsupported",
            "vLLM's CPU build lacks the operator for per-tensor scales; weights=channel runs",
        )
    ]
