"""Names of the files of a model folder."""

from __future__ import annotations

import re
from collections.abc import Iterable

MODEL_CARD = "README.md"

# what becomes of the source's own card
KEPT = re.compile(r"README(\.source)+\.md")


def kept(names: Iterable[str]) -> str:
    """A name for the source's card that none of its files has."""
    taken, name = set(names), "README.source.md"
    while name in taken:
        name = name.replace(".md", ".source.md")
    return name


def original(names: Iterable[str]) -> str | None:
    """Which of an output's files is its source's card."""
    return max((name for name in names if KEPT.fullmatch(name)), key=len, default=None)


MANIFEST = "bitpress.json"

# of a finished block: what the summary tells of it, until the run is over
BLOCK_RESULT_SUFFIX = ".notes"

INDEX = "model.safetensors.index.json"

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
    ".pkl",
    ".index.json",
    ".part",
)

# until the run is over: what it is made of
RUN_RECORD = ".bitpress.run"
