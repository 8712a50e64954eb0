"""2:4 sparsity: two of every four weights along the input dimension are zero, alone or before a
quantizing scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attrs import frozen

from bitpress import Finding, Hardware, MeasuredLoss, ShapeError, hookimpl
from bitpress_sparse.pruning import (
    PruningOptions,
    dequantize,
    error_bound,
    findings,
    observe,
    pack,
    quantize,
    serialize,
    validate_weight,
)

__all__ = [
    "ALIASES",
    "MEASURED_LOSSES",
    "Options",
    "dequantize",
    "error_bound",
    "observe",
    "pack",
    "quantize",
    "serialize",
    "validate_hardware",
    "validate_weight",
]

# As papers and engines call the pattern.
ALIASES: Mapping[str, Mapping[str, str]] = {"2:4": {}, "2of4": {}}

# On 60,000 tokens of a held-out text, benchmarks/README.md.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.04293),
    MeasuredLoss("tiny-llama (11M)", 0.04426, then="fp8"),
)


@frozen
class Options(PruningOptions):
    """Options of `sparse-2of4`."""

    def group_size(self, width: int) -> int:
        """Four columns."""
        if width % 4:
            raise ShapeError(
                f"width {width} is not a multiple of 4 (as {max(width // 4, 1) * 4} is); scheme "
                "sparse takes any"
            )
        return 4

    def num_kept(self, width: int) -> int:
        """Two weights of every four."""
        return 2

    @property
    def sparsity_config(self) -> Mapping[str, str]:
        """As compressed-tensors names it."""
        return {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Everywhere; sparse tensor cores take it from capability 8.0 on, in engines that have kernels
    for them.
    """
    general = findings(
        options,
        "vLLM reads this layout up to 0.18 (compressed-tensors up to 0.14), later ones refuse it",
    )
    if options.layout == "dense" and (hardware.capability or (0, 0)) >= (9, 0):
        text = (
            "sparse tensor cores take 2:4 weights, with 8 bits best, in engines that have kernels "
            "for them"
        )
        return [Finding("recommended", text), *general[1:]]
    return general
