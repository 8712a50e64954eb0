"""Names of the files of a model folder."""

from __future__ import annotations

import re
from collections.abc import Iterable

CONFIG = "config.json"

WEIGHTS = "model.safetensors"

INDEX = "model.safetensors.index.json"

MODEL_CARD = "README.md"

MANIFEST = "bitpress.json"

# Beside a block's shard until the run is over: what the run's summary says of the block.
BLOCK_RESULT_SUFFIX = ".notes"

# Until the run is over: what it is made of, so that only the same run is resumed.
RUN_RECORD = ".bitpress.run"

# Until the run is over: its calibration tokens, where a chat template has written the date into
# them.
RUN_TOKENS = ".bitpress.tokens"

# While a run writes into the folder.
LOCK = ".bitpress.lock"

# A name that an index may give a weight file: in the folder itself, and short enough for any file
# system together with the suffixes that a run adds.
FILE_NAME = re.compile(r"[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,180}\.safetensors")

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npz",
    ".npy",
    ".pkl",
    ".pickle",
    ".ot",
    ".tflite",
    ".index.json",
    ".part",
)

# The source's own model card in an output, whose README.md describes the output.
SOURCE_CARD = re.compile(r"README(\.source)+\.md")


# The end of a file's name until it is complete. Its digits are random, so that nobody can have put
# a link there.
PART = re.compile(r"\.[0-9a-f]{8}\.part\Z")


def rename_source_card(names: Iterable[str]) -> str:
    """A name for the source's model card that none of its files has."""
    existing, name = set(names), "README.source.md"
    while name in existing:
        name = name.replace(".md", ".source.md")
    return name


def copied_name(name: str, side_files: Iterable[str]) -> str:
    """The name in an output of a file that is copied: another for the source's model card alone.

    Args:
        name: in the source.
        side_files: all files of the source that hold no weights.
    """
    return rename_source_card(side_files) if name == MODEL_CARD else name


def find_source_card(names: Iterable[str]) -> str | None:
    """Which of an output's files is its source's model card."""
    return max((name for name in names if SOURCE_CARD.fullmatch(name)), key=len, default=None)
