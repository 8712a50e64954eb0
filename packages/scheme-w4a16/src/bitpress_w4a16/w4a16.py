"""4-bit integer weights in groups, activations left as they are, best for latency at low load; or
rounded to 8 bits while serving.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from attrs import frozen

from bitpress import Finding, Hardware, MeasuredLoss, hookimpl, option
from bitpress_w4a16 import fp8_inputs
from bitpress_w4a16.hardware import fp8_finding, gpu_findings, int8_finding
from bitpress_w4a16.weight_only import (
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
    "ALIASES",
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

# As llm-compressor and vLLM call the same format; checkpoints that are called after an algorithm
# hold it too.
ALIASES: Mapping[str, Mapping[str, str | bool]] = {
    "int4": {},
    "W4A16_ASYM": {"symmetric": False},
    "W4AFP8": {"activations": "fp8"},
    "W4A8": {"activations": "int8"},
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
    MeasuredLoss("tiny-llama (11M)", 0.00288),
    MeasuredLoss("SmolLM2-135M-Instruct", 0.0602, {"group_size": 64}),
    MeasuredLoss("tiny-llama (11M)", 0.00247, {"symmetric": False}),
    MeasuredLoss("tiny-llama (11M)", 0.01703, {"algorithm": "rtn"}),
)


# What the config says of activations of 8 bits. vLLM's kernel for CPUs gives codes a zero point.
DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True}
INPUT_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "fp8": {**DYNAMIC, "type": "float", "symmetric": True},
    "int8": {**DYNAMIC, "type": "int", "symmetric": False, "zp_dtype": "torch.int8"},
}


def _check_activations(instance: Options, attribute: attrs.Attribute[Any], value: str) -> None:
    if value != "float" and not instance.symmetric:
        raise ValueError(
            f"activations={value}: vLLM's kernels know no zero points of weights; symmetric=true "
            "has none"
        )
    if value == "fp8" and instance.group_size != fp8_inputs.GROUP_SIZE:
        raise ValueError(
            f"activations=fp8: vLLM's kernel reads groups of {fp8_inputs.GROUP_SIZE} only, not "
            f"group_size={instance.group_size}"
        )


@frozen
class Options(WeightOnlyOptions):
    """Options of `w4a16`."""

    activations: Literal["float", "fp8", "int8"] = option(
        "float",
        "fp8, int8: rounded per token while serving (W4AFP8 for NVIDIA 9.0, W4A8 for Arm CPUs)",
        validator=_check_activations,
    )
    rotate: Literal["none", "hadamard"] = option(
        "none", "hadamard: hidden states and heads are rotated (R1, R2), within the weights"
    )

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 4

    @property
    def input_config(self) -> Mapping[str, Any] | None:
        """A scale per token while serving, or nothing."""
        return INPUT_CONFIGS.get(self.activations)

    @property
    def packed(self) -> bool:
        """Not for vLLM's kernel on CPUs, which reads a code in each byte and packs them itself."""
        return self.activations != "int8"

    @property
    def rotates(self) -> bool:
        """Whether the model is rotated."""
        return self.rotate != "none"


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Nearly everywhere; on CPUs where layers come in multiples of 32. With rounded activations,
    where there is a kernel for them.
    """
    if options.activations == "fp8":
        return [fp8_finding(hardware)]
    if options.activations == "int8":
        return [int8_finding(hardware)]
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
