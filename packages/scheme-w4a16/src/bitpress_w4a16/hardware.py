"""Where weight-only integers serve. Facts: vLLM 0.32 (its kernels for compressed-tensors' `pack-quantized`)."""

from __future__ import annotations

from collections.abc import Sequence

from bitpress import Finding, Hardware


def findings(hardware: Hardware, bits: int, symmetric: bool) -> Sequence[Finding]:
    """What to expect of 4 or 8 bits on a device."""
    if hardware.vendor == "nvidia":
        return _nvidia(hardware, bits, symmetric)
    if hardware.vendor == "cpu":
        if bits == 4:
            return [Finding("recommended", "vLLM's CPU kernels run 4 bits where rows and columns are multiples of 32")]
        return [Finding("unsupported", "vLLM's CPU kernels for weight-only integers are of 4 bits; w4a16 or int8 serve")]
    if hardware.vendor == "amd":
        return [Finding("supported", "ROCm kernels (Triton, Conch, ExLlama)")]
    if hardware.vendor == "google":
        return [Finding("supported", "by vLLM's TPU plugin, which is released apart from it")]
    if bits == 4:
        return [Finding("supported", "vLLM's kernels for Intel GPUs run 4 bits")]
    return [Finding("degraded", "whether vLLM's kernels for Intel GPUs run 8 bits is not established; w4a16 runs")]


def _nvidia(hardware: Hardware, bits: int, symmetric: bool) -> Sequence[Finding]:
    if (hardware.capability or (0, 0)) < (7, 5):
        return [Finding("unsupported", "vLLM's kernels for weight-only integers need capability 7.5")]
    if bits == 8 and not symmetric:
        return [Finding("degraded", "Marlin takes zero points at 4 bits only; slower kernels run, symmetric=true is faster")]
    return [Finding("recommended", "Marlin and Machete kernels; best for latency at low load")]
