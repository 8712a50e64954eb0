"""Devices that a result may be served on: the one of this machine, or one by its name."""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from attrs import frozen

from bitpress.errors import BitpressError

Vendor = Literal["nvidia", "amd", "intel", "google", "cpu"]


@frozen
class Hardware:
    """A device as schemes judge it.

    Attributes:
        name: as its vendor calls it.
        vendor: who makes it; "cpu" for any CPU.
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


# With their CUDA compute capability or LLVM target, which is what engines choose kernels by.
DEVICES: Sequence[Hardware] = (
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


# Words that drivers print beside the name of a device: brands, boards, sizes, parts of a device.
# "NVIDIA A100-SXM4-80GB", "NVIDIA RTX 6000 Ada Generation", "NVIDIA H100 80GB HBM3 MIG 1g.10gb".
DECORATION = re.compile(
    r"geforce|tesla|quadro|instinct|radeon|r|tm|gpu|laptop|max|q|generation|blackwell|workstation"
    r"|server|edition|superchip|sxm\d?|pcie|nvl\d*|oam|hbm\d?e?|\d+gb|mig|\dg|1100|1550"
)

# What drivers call a device that is sold under another name.
PRINTED_NAMES = {"gb10": "dgx spark"}

# A CUDA compute capability: `9.0`, `sm_90`.
CAPABILITY = re.compile(r"(\d+)\.(\d)|sm[_ ]?(\d+)(\d)a?")

# Names of a message where there is no such device.
NUM_NEAREST = 3


def find_device(name: str) -> Hardware:
    """The known device of that name; vendor and capitals may be left out: "A100", "nvidia a100".

    Names that drivers print are understood too, and for a CUDA compute capability or an LLVM target
    the first device that has it, since engines choose kernels by them.

    Raises:
        BitpressError: no such device is known; the message names the nearest.
    """
    text = name.strip().lower()
    if match := CAPABILITY.fullmatch(text):
        return _device_of_capability(int(match[1] or match[3]), int(match[2] or match[4]))
    for device in DEVICES:
        if text == device.architecture and device.vendor == "amd":
            return device
    words = _split_words(PRINTED_NAMES.get(text.removeprefix("nvidia "), text))
    # of two names in it the longer one counts: x86 with AMX
    for device in sorted(DEVICES, key=lambda device: -len(device.name)):
        if _is_named(device, words):
            return device

    names = {device.name.lower().split(maxsplit=1)[1]: device.name for device in DEVICES}
    plain_name = " ".join(word for word in words if not DECORATION.fullmatch(word))
    plain_name = plain_name.removeprefix("nvidia ").removeprefix("amd ")
    nearest = difflib.get_close_matches(plain_name, names, n=NUM_NEAREST, cutoff=0)
    *others, last = [names[near] for near in nearest]
    raise BitpressError(
        f"no known device {name!r}; did you mean {', '.join(others)} or {last}? (any other NVIDIA "
        "GPU: its CUDA capability, for example 9.0)"
    )


def _device_of_capability(major: int, minor: int) -> Hardware:
    for device in DEVICES:
        if device.capability == (major, minor):
            return device
    capabilities = dict.fromkeys(device.capability for device in DEVICES if device.capability)
    known = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
    raise BitpressError(f"no known device has CUDA capability {major}.{minor} (known: {known})")


def _is_named(device: Hardware, words: Sequence[str]) -> bool:
    """Whether words name a device: all of its own, and beside them nothing but decoration."""
    vendor, *device_words = _split_words(device.name)
    length = len(device_words)
    for start in range(len(words) - length + 1):
        rest = [*words[:start], *words[start + length :]]
        if words[start : start + length] == device_words and all(
            word == vendor or DECORATION.fullmatch(word) for word in rest
        ):
            return True
    return False


def _split_words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def describe_devices(usable: Sequence[Hardware], devices: Sequence[Hardware]) -> str:
    """In a few words which of some devices are usable: `NVIDIA 8.9+, some AMD`."""
    words = []
    for vendor in dict.fromkeys(device.vendor for device in devices):
        usable_of_vendor = [device for device in usable if device.vendor == vendor]
        if not usable_of_vendor:
            continue
        if vendor == "nvidia":
            major, minor = min(device.capability or (0, 0) for device in usable_of_vendor)
            words.append(f"NVIDIA {major}.{minor}+")
        else:
            name = vendor.upper() if vendor in ("amd", "cpu") else vendor.capitalize()
            num_devices = sum(device.vendor == vendor for device in devices)
            words.append(name if len(usable_of_vendor) == num_devices else f"some {name}")
    return ", ".join(words) or "nothing known"


def detect_device() -> Hardware:
    """The first accelerator that torch sees, else the CPU."""
    # Commands that only name a device do without importing torch.
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        if torch.version.hip:
            # A name such as "gfx942:sramecc+:xnack-" lists features after the target.
            architecture = properties.gcnArchName.split(":")[0]
            return Hardware(properties.name, "amd", architecture=architecture)
        return Hardware(properties.name, "nvidia", capability=torch.cuda.get_device_capability(0))
    if torch.xpu.is_available():
        return Hardware(torch.xpu.get_device_name(0), "intel")

    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    architecture = "arm" if is_arm else "x86"
    cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    has_amx = " amx_tile" in cpu_info
    return Hardware("this machine's CPU", "cpu", architecture=architecture, amx=has_amx)
