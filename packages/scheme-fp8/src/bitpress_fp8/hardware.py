"""Where FP8 checkpoints serve well. Facts: vLLM 0.32 (compressed-tensors schemes and kernel
selection).
"""

from __future__ import annotations

from collections.abc import Sequence

from bitpress import Finding, Hardware

# MI300, MI350 and RDNA 4: the AMD GPUs that multiply FP8.
AMD_WITH_FP8 = ("gfx942", "gfx950", "gfx1200", "gfx1201")


def gpu_findings(hardware: Hardware, kernels: str) -> Sequence[Finding]:
    """What holds for per-channel, per-tensor and block weights alike, on anything but a CPU.

    Args:
        hardware: the device.
        kernels: what the kernels for these weights are called, "FP8" or "FP8 block".
    """
    if hardware.vendor == "nvidia":
        return _nvidia_findings(hardware, kernels)
    if hardware.vendor == "amd":
        if hardware.architecture in AMD_WITH_FP8:
            return [
                Finding("supported", f"{kernels} matrix kernels of ROCm (MI300 and later, RDNA 4)")
            ]
        return [
            Finding(
                "unsupported",
                "AMD GPUs before MI300 and RDNA 4 have no FP8; int8 or w4a16 serve there",
            )
        ]
    if hardware.vendor == "intel":
        return [
            Finding(
                "degraded", "vLLM runs FP8 weights with 16-bit activations on Intel GPUs by default"
            )
        ]
    return [
        Finding(
            "unsupported",
            f"vLLM itself has no FP8 kernels for {hardware.name}; int8 or w4a16 serve more widely",
        )
    ]


def _nvidia_findings(hardware: Hardware, kernels: str) -> Sequence[Finding]:
    capability = hardware.capability or (0, 0)
    if capability >= (9, 0):
        return [
            Finding(
                "recommended", f"native FP8 with tuned {kernels} kernels (capability 9.0 and later)"
            )
        ]
    if capability >= (8, 9):
        return [
            Finding(
                "supported",
                f"native FP8 (capability 8.9); {kernels} kernels are tuned for 9.0 and later",
            )
        ]
    if capability >= (7, 5):
        text = (
            "no FP8 arithmetic below capability 8.9: vLLM runs the weights with 16-bit "
            "activations, which saves memory only"
        )
        return [Finding("degraded", f"{text}; int8 serves better here")]
    return [
        Finding(
            "unsupported",
            "vLLM runs FP8 checkpoints from capability 7.5 on; int8 or w4a16 may serve",
        )
    ]
