"""What a calibrated run reports of a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, frozen

from bitpress.output.rescaling import Rescaled


@frozen
class BlockResult:
    """What compressing a block has measured.

    Attributes:
        output_errors: by layer, ||x (W - Q)ᵀ|| / ||x Wᵀ|| on a sample of its inputs.
        rescaled: by tensor, the exponents of two by which its "columns" and "rows" were multiplied.
        warnings: one line each, naming the layer.
        num_tokens: by layer of an expert, how many tokens were sent to it.
        rounding_errors: by layer, the error that plain rounding would have had, where weights were
            moved further on purpose.
        drift: by block, ||h - h'|| / ||h'|| of the hidden states after it, h' being the source's.
    """

    output_errors: Mapping[str, float]
    rescaled: Mapping[str, Rescaled]
    warnings: Sequence[str]
    num_tokens: Mapping[str, int]
    rounding_errors: Mapping[str, float] = field(factory=dict)
    drift: Mapping[str, float] = field(factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, as they are kept beside the block's shard."""
        return {
            "errors": self.output_errors,
            "rescaled": self.rescaled,
            "warnings": self.warnings,
            "rounding_errors": self.rounding_errors,
            "blocks": self.drift,
            "tokens": self.num_tokens,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BlockResult:
        """The result of which `as_json` has made the values."""
        return cls(
            values["errors"],
            values["rescaled"],
            values["warnings"],
            values["tokens"],
            values["rounding_errors"],
            values["blocks"],
        )
