"""8-bit integer weights in groups, activations left as they are, or with a static 16-bit integer
scale for integer runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from attrs import frozen

from bitpress import Finding, Hardware, MeasuredLoss, hookimpl, option
from bitpress_w4a16.hardware import gpu_findings
from bitpress_w4a16.weight_only import (
    ALGORITHM,
    WeightOnlyOptions,
    dequantize,
    error_bound,
    keep_codes,
    observe,
    pack,
    quantize,
    quantize_activations,
    rescale,
    serialize,
    validate_shape,
)

__all__ = [
    "EFFORTS",
    "MEASURED_LOSSES",
    "Options",
    "dequantize",
    "error_bound",
    "keep_codes",
    "observe",
    "pack",
    "quantize",
    "quantize_activations",
    "rescale",
    "serialize",
    "validate_hardware",
    "validate_shape",
]

# Error feedback takes four fifths off the loss on tiny-llama.
EFFORTS: Mapping[str, Mapping[str, str]] = {"high": {"algorithm": "gptq"}}

# tiny-llama: 60,000 tokens of a held-out text, benchmarks/README.md; SmolLM2: 16,384 of wikitext2.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.000064),
    MeasuredLoss("SmolLM2-135M-Instruct", 0.0013, {"group_size": 64}),
)


@frozen
class Options(WeightOnlyOptions):
    """Options of `w8a16`."""

    algorithm: Literal["rtn", "gptq", "awq"] = option("rtn", ALGORITHM)
    activations: Literal["float", "int16"] = option(
        "float", "int16: a static scale found on data; vLLM does not run it"
    )

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 8

    @property
    def input_config(self) -> Mapping[str, Any] | None:
        """A static scale per tensor of 16-bit integers, or nothing."""
        if self.activations == "float":
            return None
        return {
            "num_bits": 16,
            "type": "int",
            "symmetric": True,
            "strategy": "tensor",
            "dynamic": False,
        }


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """GPUs; not vLLM on CPUs, and nowhere in vLLM with 16-bit integer activations."""
    if options.activations == "int16":
        return [
            Finding(
                "unsupported",
                "vLLM has no 16-bit integer activations; they are for integer runtimes that read "
                "the scale",
            )
        ]
    if hardware.vendor == "cpu":
        text = (
            "vLLM's CPU kernel for weight-only integers is 4-bit only: w4a16 or int8 run there "
            "(transformers runs this anywhere)"
        )
        return [Finding("unsupported", text)]
    return gpu_findings(hardware, 8, marlin=options.symmetric)
