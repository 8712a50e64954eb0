"""Devices a result may be served on: the one present, or a known one by its name."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attrs import frozen

from bitpress.errors import BitpressError, nearest

Vendor = Literal["nvidia", "amd", "intel", "google", "cpu"]


@frozen
class Hardware:
    """A device as schemes judge it.

    Attributes:
        capability: CUDA compute capability, major and minor; None off NVIDIA.
        architecture: the LLVM target of an AMD GPU ("gfx942"), or a CPU's instruction set ("x86",
            "arm").
        amx: whether a CPU has AMX tile instructions, which several engine kernels for CPUs need.
    """

    name: str
    vendor: Vendor
    capability: tuple[int, int] | None = None
    architecture: str | None = None
    amx: bool = False


def _nvidia(major: int, minor: int, *names: str) -> list[Hardware]:
    return [Hardware(f"NVIDIA {name}", "nvidia", capability=(major, minor)) for name in names]


def _amd(architecture: str, *names: str) -> list[Hardware]:
    return [Hardware(f"AMD {name}", "amd", architecture=architecture) for name in names]


KNOWN: Sequence[Hardware] = (
    *_nvidia(6, 0, "P100"),
    *_nvidia(7, 0, "V100"),
    *_nvidia(7, 5, "T4", "RTX 2080 Ti"),
    *_nvidia(8, 0, "A100", "A30"),
    *_nvidia(8, 6, "A10", "A40", "RTX A6000", "RTX 3090"),
    *_nvidia(8, 9, "L4", "L40S", "RTX 4090", "RTX 6000 Ada"),
    *_nvidia(9, 0, "H100", "H200", "GH200"),
    *_nvidia(10, 0, "B200", "GB200"),
    *_nvidia(10, 3, "B300", "GB300"),
    *_nvidia(12, 0, "RTX 5090", "RTX PRO 6000"),
    *_nvidia(12, 1, "DGX Spark"),
    *_amd("gfx90a", "MI210", "MI250X"),
    *_amd("gfx942", "MI300X", "MI325X"),
    *_amd("gfx950", "MI350X", "MI355X"),
    *_amd("gfx1100", "RX 7900 XTX"),
    *_amd("gfx1201", "RX 9070 XT"),
    Hardware("Intel Data Center GPU Max", "intel"),
    Hardware("Google TPU", "google"),
    Hardware("CPU x86 with AMX", "cpu", architecture="x86", amx=True),
    Hardware("CPU x86", "cpu", architecture="x86"),
    Hardware("CPU Arm", "cpu", architecture="arm"),
)


def find(name: str) -> Hardware:
    """The known device of that name; maker and capitals may be left out: "A100", "nvidia a100".

    Raises:
        BitpressError: no such device is known; the message names the nearest.
    """
    wanted = name.lower().split()
    for device in KNOWN:
        words = device.name.lower().split()
        if wanted in (words, words[1:]):
            return device
    names = [device.name for device in KNOWN]
    hint = nearest(
        name.lower(), [n.lower() for n in names] + [n.lower().split(maxsplit=1)[1] for n in names]
    )
    raise BitpressError(f"no known device {name!r}{hint} (known: {', '.join(names)})")


def present() -> Hardware:
    """The first accelerator that torch sees, else the CPU."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        if torch.version.hip:
            return Hardware(
                properties.name, "amd", architecture=properties.gcnArchName.split(":")[0]
            )
        return Hardware(properties.name, "nvidia", capability=torch.cuda.get_device_capability(0))
    if torch.xpu.is_available():
        return Hardware(torch.xpu.get_device_name(0), "intel")
    arm = platform.machine().lower() in ("arm64", "aarch64")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = "this machine's CPU"
    return Hardware(name, "cpu", architecture="arm" if arm else "x86", amx=" amx_tile" in flags)
