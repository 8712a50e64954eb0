"""What a model is judged on, as asked for at the border."""

from __future__ import annotations

from attrs import frozen

from bitpress.planning.calibration_config import TextSource

# Tokens of a sequence, and tokens of a text, unless the user asks for other numbers.
SEQUENCE_LENGTH = 512
MAX_TOKENS = 65536


# Stands for the text that ships with bitpress to judge models on. It is another one than the text
# that they are calibrated on where the user names none.
CHECK_TEXT = "bitpress:check"


@frozen
class EvaluationConfig:
    """A text, and how much of it is taken.

    Attributes:
        text: a .jsonl, .txt or .parquet file, or CHECK_TEXT; or texts and rows themselves.
        sequence_length: tokens of each sequence; sequences do not overlap.
        max_tokens: tokens taken of the text, from its start.
    """

    text: TextSource = CHECK_TEXT
    sequence_length: int = SEQUENCE_LENGTH
    max_tokens: int = MAX_TOKENS
