"""What a model is calibrated on, as asked for."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

# an expert that is sent fewer is compressed as if there were no data: second moments of so few say
# little
FEW = 64


@frozen
class CalibrationConfig:
    """What a model is to be run on, as asked for.

    Attributes:
        source: a .jsonl, .txt or .parquet file, or a dataset of the `datasets` library as NAME or
            NAME:SUBSET; None: the text that ships with bitpress.
        samples: how many sequences.
        length: tokens in each.
        seed: 0 takes the sequences in the text's own order and reads no further than they need; any
            other draws them from all that the text gives, which reads and tokenises all of it.
        all_experts: whether every expert is given every token.
    """

    source: str | None = None
    samples: int = 256
    length: int = 512
    seed: int = 0
    all_experts: bool = False

    @property
    def words(self) -> dict[str, object]:
        """Options of a command line that ask for it; files without their folders."""
        source = (
            self.source
            if self.source is None or not Path(self.source).is_file()
            else Path(self.source)
        )
        return {
            "--calibration": source,
            "--samples": self.samples,
            "--sequence-length": self.length,
            "--seed": self.seed or None,
            "--all-experts": self.all_experts,
        }
