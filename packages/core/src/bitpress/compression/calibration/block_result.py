"""What a calibrated run tells of a block."""

from __future__ import annotations

from typing import Any

import attrs
from attrs import field, frozen


@frozen
class BlockNotes:
    """What is to be told of a block.

    Attributes:
        errors: by layer, ||x (W - Q)ᵀ|| / ||x Wᵀ|| on a sample of its inputs.
        rescaled: by tensor, the exponents of two by which its "columns" and "rows" were multiplied.
        warnings: one line each, naming the layer.
        blocks: by block, ||h - h'|| / ||h'|| of the hidden states after it, h' being the source's.
        tokens: by layer of an expert, how many tokens were sent to it.
    """

    errors: dict[str, float] = field(factory=dict)
    rescaled: dict[str, dict[str, list[int]]] = field(factory=dict)
    warnings: list[str] = field(factory=list)
    blocks: dict[str, float] = field(factory=dict)
    tokens: dict[str, int] = field(factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return attrs.asdict(self)
