"""FP8 (E4M3) weights in groups of 32 with a power of two, activations rounded alike while serving,
or left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import frozen

from bitpress import Finding, Hardware, MeasuredLoss, hookimpl, option
from bitpress_mx.hardware import Kernels, kernel_findings
from bitpress_mx.microscaling import (
    ALGORITHM,
    MicroscalingOptions,
    dequantize,
    error_bound,
    keep_codes,
    observe,
    pack,
    quantize,
    quantize_activations,
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
    "serialize",
    "validate_hardware",
    "validate_shape",
]

# As llm-compressor calls the format with weights only.
ALIASES: Mapping[str, Mapping[str, str]] = {"MXFP8A16": {"activations": "float"}}

EFFORTS: Mapping[str, Mapping[str, str]] = {"high": {"algorithm": "gptq"}}

# tiny-llama: 60,000 tokens of a held-out text, benchmarks/README.md.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.00266),
    MeasuredLoss("tiny-llama (11M)", 0.00165, {"algorithm": "gptq"}),
)

KERNELS = Kernels(
    "MXFP8",
    (7, 5),
    "int8",
    "vLLM has no MXFP8 kernels for AMD GPUs before MI350: it makes 16-bit weights of them; int8 "
    "serves there",
)


@frozen
class Options(MicroscalingOptions):
    """Options of `mxfp8`."""

    algorithm: Literal["rtn", "gptq"] = option("rtn", ALGORITHM)

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 8


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Native on Blackwell and MI350; weights only, or emulated, elsewhere."""
    return kernel_findings(hardware, KERNELS, options.activations == "quantized")
