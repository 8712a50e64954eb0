"""What outputs hold: whether two of them are the same work, and how far each is from its source."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import ENVIRONMENT
from safetensors import safe_open

JUDGE = Path(__file__).parent / "peers/divergence.py"
TEXT, TOKENS = Path(__file__).parents[2] / "shared/eval/heldout.txt", 512


def divergence(python: object, source: Path, out: Path, tokens: int = TOKENS) -> float | None:
    """KL divergence from the source on so many tokens, nats a token, judged by a peer's
    transformers; None where it fails.
    """
    words = [str(word) for word in (python, JUDGE, source, out, TEXT, tokens)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{out}: no KL divergence: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return float(done.stdout.splitlines()[-1])


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """The tensors of all files of a folder, to be read in slices."""
    with ExitStack() as files:
        handles = [
            files.enter_context(safe_open(file, "pt")) for file in folder.glob("*.safetensors")
        ]
        yield {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118 (not a dict)


def different(ours: Path, theirs: Path) -> str | None:
    """What differs between the tensors of two outputs, or None; scales may have another float
    dtype.
    """
    with opened(ours) as a, opened(theirs) as b:
        if a.keys() != b.keys():
            return f"tensors of one only: {sorted(a.keys() ^ b.keys())[:3]}"
        for name, x in a.items():
            y = b[name]
            if x.get_shape() != y.get_shape() or (
                x.get_dtype() != y.get_dtype() and not name.endswith("_scale")
            ):
                return (
                    f"{name}: {x.get_dtype()} {x.get_shape()} and {y.get_dtype()} {y.get_shape()}"
                )
    return None


def error(source: Path, out: Path) -> float:
    """How far the first rows of all compressed weights together are from the source's, relative to
    their size.
    """
    moved = size = 0.0
    with opened(source) as a, opened(out) as b:
        for name, stored in a.items():
            if f"{name}_scale" in b:
                weight = stored[:ROWS].float()
                tensors = {key: b[name + key][:] for key in ("", *SUFFIXES) if name + key in b}
                height = len(tensors.get("", tensors.get("_packed")))
                result = decoded(
                    {key: t[: -(-ROWS * len(t) // height)] for key, t in tensors.items()}
                )
                moved += float((result - weight).square().sum(dtype=torch.float64))
                size += float(weight.square().sum(dtype=torch.float64))
    return math.sqrt(moved / size)


ROWS = 256
SUFFIXES = ("_packed", "_scale", "_global_scale")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decoded(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A weight from its stored tensors, by their dtypes: compressed-tensors' layouts, written down
    once more.
    """
    scale = tensors["_scale"].float()
    # FP8 or INT8
    if "" in tensors:
        numbers = tensors[""].float()
    elif tensors["_packed"].dtype == torch.uint8:
        # two E2M1 numbers in a byte
        packed, scale = tensors["_packed"].int(), scale / tensors["_global_scale"]
        numbers = torch.stack([E2M1[packed & 15], E2M1[packed >> 4]], 2).flatten(1)
    else:
        # eight 4-bit integers in a word, 8 added
        packed = tensors["_packed"]
        numbers = torch.stack([(packed >> 4 * i & 15) - 8 for i in range(8)], 2).flatten(1).float()
    for axis in (0, 1):
        scale = scale.repeat_interleave(-(-numbers.shape[axis] // scale.shape[axis]), axis).narrow(
            axis, 0, numbers.shape[axis]
        )
    return numbers * scale
