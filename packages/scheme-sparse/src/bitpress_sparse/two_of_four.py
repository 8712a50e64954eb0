"""2:4 sparsity: two of every four weights along the input dimension are zero, alone or before a
quantizing scheme; or 4:8 or 6:8, which keep four or six of every eight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from attrs import frozen

from bitpress import Finding, Hardware, MeasuredLoss, ShapeError, hookimpl, option
from bitpress_sparse.pruning import (
    PruningOptions,
    dequantize,
    error_bound,
    expand,
    findings,
    observe,
    pack,
    quantize,
    serialize,
    validate_weight,
)

__all__ = [
    "ALIASES",
    "EFFORTS",
    "MEASURED_LOSSES",
    "Options",
    "dequantize",
    "error_bound",
    "expand",
    "observe",
    "pack",
    "quantize",
    "serialize",
    "validate_hardware",
    "validate_weight",
]

# As papers and engines call the pattern.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "2:4": {},
    "2of4": {},
    "4:8": {"pattern": "4:8"},
    "6:8": {"pattern": "6:8"},
}

# No level needs no data: magnitude loses nine times as much.
EFFORTS: Mapping[str, Mapping[str, str]] = {"high": {"reference": "all"}}

# On 60,000 tokens of a held-out text, benchmarks/README.md.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.03079),
    MeasuredLoss("tiny-llama (11M)", 0.03221, then="fp8"),
)


@frozen
class Options(PruningOptions):
    """Options of `sparse-2of4`."""

    pattern: Literal["2:4", "4:8", "6:8"] = option(
        "2:4", "weights that are kept of how many neighbors"
    )

    def group_size(self, width: int) -> int:
        """Four columns, or eight."""
        size = int(self.pattern.partition(":")[2])
        if width % size:
            raise ShapeError(
                f"width {width} is not a multiple of {size} (as {max(width // size, 1) * size} "
                "is); scheme sparse takes any"
            )
        return size

    def num_kept(self, width: int) -> int:
        """Weights that are kept of so many columns."""
        return int(self.pattern.partition(":")[0])

    @property
    def structure(self) -> str:
        """The pattern itself."""
        return self.pattern


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Everywhere; sparse tensor cores take it from capability 8.0 on."""
    return findings(options, hardware)
