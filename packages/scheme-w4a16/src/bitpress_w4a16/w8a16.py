"""Integer weights of 8 bits with 16-bit activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import frozen

from bitpress import Finding, Hardware, hookimpl, option
from bitpress_w4a16 import hardware as facts, weights

observe, quantize, pack = hookimpl(weights.observe), hookimpl(weights.quantize), hookimpl(weights.pack)
serialize, restore = hookimpl(weights.serialize), hookimpl(weights.restore)


@frozen
class Options(weights.Options):
    """Options of `w8a16`."""

    algorithm: Literal["rtn", "gptq"] = option("rtn", "rounding, which leaves little to gain, or errors fed forward on data")

    @property
    def bits(self) -> float:
        """Bits per code."""
        return 8


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """What engines run."""
    return facts.findings(hardware, 8, options.symmetric)
