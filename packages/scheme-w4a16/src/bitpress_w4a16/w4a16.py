"""4-bit integer weights in groups, activations left as they are: a quarter of the size, best for
latency at low load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import frozen

from bitpress import Finding, Hardware, MeasuredLoss, hookimpl, option
from bitpress_w4a16.hardware import gpu_findings
from bitpress_w4a16.weight_only import (
    WeightOnlyOptions,
    dequantize,
    error_bound,
    observe,
    pack,
    quantize,
    rescale,
    serialize,
    validate_shape,
)

__all__ = [
    "ALIASES",
    "EFFORTS",
    "MEASURED_LOSSES",
    "Options",
    "dequantize",
    "error_bound",
    "observe",
    "pack",
    "quantize",
    "rescale",
    "serialize",
    "validate_hardware",
    "validate_shape",
]

# As llm-compressor and vLLM call the same format; checkpoints that are called after an algorithm
# hold it too.
ALIASES: Mapping[str, Mapping[str, str | bool]] = {
    "int4": {},
    "W4A16_ASYM": {"symmetric": False},
    "gptq": {"algorithm": "gptq"},
    "awq": {"algorithm": "awq"},
}

# Plain rounding searches its scales too, and loses 5.7 times as much on tiny-llama.
EFFORTS: Mapping[str, Mapping[str, str]] = {
    "low": {"algorithm": "rtn"},
    "high": {"reference": "all"},
}

# tiny-llama: 60,000 tokens of a held-out text, benchmarks/README.md; SmolLM2: 16,384 of wikitext2.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.00297),
    MeasuredLoss("SmolLM2-135M-Instruct", 0.0602, {"group_size": 64}),
    MeasuredLoss("tiny-llama (11M)", 0.00258, {"symmetric": False}),
    MeasuredLoss("tiny-llama (11M)", 0.01703, {"algorithm": "rtn"}),
)


@frozen
class Options(WeightOnlyOptions):
    """Options of `w4a16`."""

    rotate: Literal["none", "hadamard"] = option(
        "none", "hadamard: hidden states and heads are rotated (R1, R2), within the weights"
    )

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 4

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated."""
        return self.rotate != "none"


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Nearly everywhere; on CPUs where layers come in multiples of 32."""
    if hardware.vendor == "cpu":
        if hardware.architecture == "x86":
            return [
                Finding(
                    "recommended",
                    "vLLM's CPU build runs layers whose rows and columns are multiples of 32",
                )
            ]
        return [
            Finding(
                "degraded",
                "vLLM's CPU build for x86 runs it; on other CPUs this is not established",
            )
        ]
    return gpu_findings(hardware, 4, marlin=True)
