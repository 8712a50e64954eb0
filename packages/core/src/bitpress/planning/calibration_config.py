"""What a model is calibrated on, as asked for at the border."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from attrs import frozen

from bitpress.errors import DataError

# Where texts come from: a name, or texts and rows themselves.
TextSource: TypeAlias = str | tuple[str | Mapping[str, Any], ...]

# Tokens. An expert that is sent fewer is compressed as if there were no data: second moments of so
# few tokens say little.
MIN_EXPERT_TOKENS = 64


@frozen
class CalibrationConfig:
    """The texts that a model is to be run on, and how much of them.

    Attributes:
        source: a .jsonl, .json, .txt or .parquet file, a folder of such files, or a dataset of the
            `datasets` library as NAME, NAME@REVISION or NAME:SUBSET; after the last two perhaps a
            split in brackets. "mixed" and "prose" are texts that ship with bitpress. Or texts
            themselves, or rows as such files hold them. None: "mixed" for a model with a chat
            template, "prose" for others.
        samples: how many sequences.
        sequence_length: tokens in each.
        seed: 0 takes the sequences in the text's own order and reads no further than they need; any
            other draws them from all that the text gives, which reads and tokenizes all of it.
        all_experts: whether every expert is given every token.
    """

    source: TextSource | None = None
    samples: int = 256
    sequence_length: int = 512
    seed: int = 0
    all_experts: bool = False

    def require_valid(self) -> None:
        """Raise DataError where a number is none that texts can be taken by."""
        if self.samples < 1 or self.sequence_length < 1 or not 0 <= self.seed < 2**63:
            raise DataError(
                f"{self.samples} sequences of {self.sequence_length} tokens with seed {self.seed}: "
                "sequences and tokens are at least 1, a seed is from 0 to 2**63 - 1"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Of the token ids: (sequences, length)."""
        return self.samples, self.sequence_length

    @property
    def command_options(self) -> dict[str, object]:
        """Options of a command line that ask for it; files and folders by their names alone."""
        source: object = self.source
        if isinstance(self.source, tuple):
            # whoever repeats the run writes the texts into one
            source = "FILE"
        elif self.source and Path(self.source).exists():
            source = Path(self.source)
        return {
            "--calibration": source,
            "--samples": self.samples,
            "--sequence-length": self.sequence_length,
            "--seed": self.seed or None,
            "--all-experts": self.all_experts,
        }
