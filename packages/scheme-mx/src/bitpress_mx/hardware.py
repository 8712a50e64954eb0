"""Where MX checkpoints serve well. Facts: vLLM 0.32 (compressed-tensors schemes and its lists of
kernels).
"""

from __future__ import annotations

from collections.abc import Sequence

from attrs import frozen

from bitpress import Finding, Hardware

# The only AMD GPUs whose matrix cores take scales of groups of 32.
AMD_WITH_MX = ("gfx950",)

# What is said where there are only kernels that round inputs.
NEVERTHELESS = "; vLLM rounds activations here, though the file asks for weights only"


@frozen
class Kernels:
    """What vLLM runs a format with.

    Attributes:
        format: its name.
        weights_only: the least CUDA capability on which weights are read, with 16-bit activations.
        alternative: a scheme that serves where this one does not.
        emulation: what vLLM does on AMD GPUs without kernels.
    """

    format: str
    weights_only: tuple[int, int]
    alternative: str
    emulation: str


def kernel_findings(hardware: Hardware, kernels: Kernels, rounds_inputs: bool) -> Sequence[Finding]:
    """What to expect on a device.

    Args:
        hardware: the device.
        kernels: of the format.
        rounds_inputs: whether the file asks for rounded activations.
    """
    if hardware.vendor == "nvidia":
        return [_nvidia(hardware.capability or (0, 0), kernels, rounds_inputs)]
    if hardware.vendor == "amd" and hardware.architecture not in AMD_WITH_MX:
        return [Finding("degraded", kernels.emulation)]
    if hardware.vendor == "amd":
        return [_native(f"{kernels.format} matrix kernels of ROCm (gfx950)", rounds_inputs)]
    if hardware.vendor == "intel":
        text = f"vLLM's {kernels.format} kernels for Intel GPUs"
        return [Finding("supported", text if rounds_inputs else text + NEVERTHELESS)]
    return [
        Finding(
            "unsupported",
            f"vLLM has no {kernels.format} kernels for {hardware.name}; {kernels.alternative} "
            "runs there",
        )
    ]


def _nvidia(capability: tuple[int, int], kernels: Kernels, rounds_inputs: bool) -> Finding:
    if capability >= (10, 0):
        return _native(f"{kernels.format} tensor cores (FlashInfer)", rounds_inputs)
    if capability >= kernels.weights_only and rounds_inputs:
        text = (
            f"no {kernels.format} arithmetic before Blackwell (capability 10.0): vLLM leaves "
            "activations in 16 bits (Marlin kernels)"
        )
        return Finding("degraded", f"{text}; {kernels.alternative} serves as well here")
    if capability >= kernels.weights_only:
        return Finding("supported", "weights only (Marlin kernels), as intended")
    least = ".".join(map(str, kernels.weights_only))
    return Finding(
        "unsupported",
        f"vLLM runs {kernels.format} checkpoints from capability {least} on; "
        f"{kernels.alternative} runs in transformers anywhere",
    )


def _native(text: str, rounds_inputs: bool) -> Finding:
    """Where kernels multiply the format itself, whatever the file says of activations."""
    if rounds_inputs:
        return Finding("recommended", text)
    return Finding("supported", text + NEVERTHELESS)
