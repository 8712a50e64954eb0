"""Unstructured sparsity: a given share of every row's weights is zero, by magnitude without data,
or fitted to data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from attrs import frozen

from bitpress import Finding, Hardware, MeasuredLoss, hookimpl, option
from bitpress_sparse.pruning import (
    ALGORITHM,
    UNSTRUCTURED,
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

# Algorithms that are known by their papers.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "wanda": {"algorithm": "wanda"},
    "sparsegpt": {"algorithm": "sparsegpt"},
}

# Magnitude is the default, and needs no data.
EFFORTS: Mapping[str, Mapping[str, str]] = {"high": {"algorithm": "sparsegpt"}}

# On 60,000 tokens of a held-out text, benchmarks/README.md.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.0138, {"algorithm": "sparsegpt"}),
)


def _check_sparsity(instance: Options, attribute: attrs.Attribute[Any], value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"sparsity {value} is not a share between 0 and 1")


@frozen
class Options(PruningOptions):
    """Options of `sparse`."""

    algorithm: Literal["magnitude", "wanda", "sparsegpt"] = option("magnitude", ALGORITHM)
    sparsity: float = option(
        0.5, "the share of every row's weights that becomes zero", validator=_check_sparsity
    )

    def group_size(self, width: int) -> int:
        """The whole row."""
        return width

    def num_kept(self, width: int) -> int:
        """What is left of a row, one weight at least."""
        return max(width - round(self.sparsity * width), 1)

    @property
    def structure(self) -> str:
        """None."""
        return UNSTRUCTURED


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Everywhere."""
    return findings(options, hardware)
