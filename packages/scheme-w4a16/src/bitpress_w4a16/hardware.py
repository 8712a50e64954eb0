"""Where weight-only integers serve well. Facts: vLLM 0.32 (compressed-tensors schemes and kernel
selection).
"""

from __future__ import annotations

from collections.abc import Sequence

from bitpress import Finding, Hardware


def gpu_findings(hardware: Hardware, bits: int, marlin: bool) -> Sequence[Finding]:
    """What holds for both schemes, on anything but a CPU.

    Args:
        hardware: the device.
        bits: bits per code.
        marlin: whether vLLM's Marlin kernels take the weights; they know zero points at 4 bits
            only.
    """
    if hardware.vendor == "nvidia":
        if (hardware.capability or (0, 0)) < (7, 5):
            return [
                Finding(
                    "unsupported",
                    "vLLM runs weight-only integers from capability 7.5 on; transformers runs them "
                    "anywhere",
                )
            ]
        if marlin:
            return [
                Finding(
                    "recommended", "Marlin kernels (Machete on 9.0); best for latency at low load"
                )
            ]
        return [
            Finding(
                "degraded",
                "Marlin kernels know no 8-bit zero points, slower ones run; symmetric=true is "
                "faster",
            )
        ]
    if hardware.vendor == "amd":
        return [Finding("supported", "ROCm, by Triton and ExLlama kernels")]
    if hardware.vendor == "google":
        return [Finding("supported", "by vLLM's TPU plugin, which is released apart from it")]
    if bits == 4:
        return [Finding("supported", "vLLM's kernels for Intel GPUs run 4 bits")]
    return [
        Finding(
            "degraded",
            "whether vLLM's kernels for Intel GPUs run 8 bits is not established; w4a16 runs",
        )
    ]


def fp8_finding(hardware: Hardware) -> Finding:
    """What to expect of 4-bit weights with FP8 activations."""
    if hardware.vendor == "nvidia" and hardware.capability == (9, 0):
        return Finding(
            "recommended",
            "CUTLASS kernels for 4-bit weights and FP8 activations (9.0 alone), in bfloat16",
        )
    return Finding(
        "unsupported",
        "vLLM runs FP8 activations with 4-bit weights on capability 9.0 alone, and refuses such "
        "files elsewhere; activations=float serves nearly everywhere",
    )


def int8_finding(hardware: Hardware) -> Finding:
    """What to expect of 4-bit weights with 8-bit integer activations."""
    if hardware.vendor == "cpu" and hardware.architecture == "arm":
        return Finding("recommended", "INT8 arithmetic by KleidiAI's kernels for 4-bit weights")
    if hardware.vendor == "cpu":
        return Finding(
            "degraded",
            "torch's kernel for x86 is plain code, several times slower than 16 bits where prompts "
            "are long; activations=float runs faster here",
        )
    if hardware.vendor == "intel":
        return Finding("supported", "vLLM's kernels for Intel GPUs, which compute in float16")
    besides = " but those of the package humming" if hardware.vendor == "nvidia" else ""
    return Finding(
        "unsupported",
        f"vLLM has no kernels on {hardware.name} for 4-bit weights with 8-bit integer "
        f"activations{besides}; activations=float runs",
    )
