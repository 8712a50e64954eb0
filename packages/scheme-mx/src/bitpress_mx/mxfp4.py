"""FP4 (E2M1) weights in groups of 32 with a power of two, activations rounded alike while serving,
or left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from bitpress import Finding, Hardware, MeasuredLoss, hookimpl
from bitpress_mx.hardware import Kernels, kernel_findings
from bitpress_mx.microscaling import (
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
ALIASES: Mapping[str, Mapping[str, str]] = {"MXFP4A16": {"activations": "float"}}

EFFORTS: Mapping[str, Mapping[str, str]] = {
    "low": {"algorithm": "rtn"},
    "high": {"reference": "all"},
}

# tiny-llama: 60,000 tokens of a held-out text, benchmarks/README.md.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.02967),
    MeasuredLoss("tiny-llama (11M)", 0.0035, {"activations": "float"}),
    MeasuredLoss("tiny-llama (11M)", 0.01972, {"activations": "float", "algorithm": "rtn"}),
)

KERNELS = Kernels(
    "MXFP4",
    (8, 0),
    "w4a16",
    "vLLM emulates MXFP4 on AMD GPUs before MI350, slowly, and where amd-quark is installed; w4a16 "
    "serves there",
)


@frozen
class Options(MicroscalingOptions):
    """Options of `mxfp4`."""

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 4


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Native on Blackwell and MI350; weights only, or emulated, elsewhere."""
    return kernel_findings(hardware, KERNELS, options.activations == "quantized")
