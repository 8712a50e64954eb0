"""Every architecture through every kind of scheme: what comes of it, in the words of
docs/models.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from architectures import build
from attrs import frozen
from torch import Tensor

import bitpress
from bitpress.errors import BitpressError


@frozen
class Column:
    """A scheme with its settings.

    Attributes:
        most: of a layer's relative error.
        dtype: that transformers is asked for.
    """

    scheme: str
    settings: tuple[str, ...]
    most: float
    dtype: torch.dtype = torch.float32


COLUMNS: Mapping[str, Column] = {
    "fp8": Column("fp8", (), 0.04),
    "w4a16, rtn": Column("w4a16", ("algorithm=rtn", "group_size=32"), 0.13),
    # moves weights to make up for others
    "w4a16, gptq": Column("w4a16", ("algorithm=gptq", "group_size=32"), 0.25),
    "nvfp4": Column("nvfp4", (), 0.25, torch.bfloat16),
}
# of the logits' norm, from the source's: what a loader that reads other weights exceeds, and 4 bits
# do not
FAR = 0.5
TOKENS = torch.arange(96).reshape(4, 24) * 7 % 95 + 1


@frozen
class Outcome:
    """What comes of a model and a scheme.

    Attributes:
        refused: what the command says; None where it writes.
        loads: whether transformers computes with what was written.
    """

    refused: str | None = None
    loads: bool = False

    def __str__(self) -> str:
        if self.refused is not None:
            return "refused"
        return "loads" if self.loads else "written"


def outcome(source: Path, out: Path, column: Column, before: Tensor | None) -> Outcome:
    """Compress, prove, restore and load; raises AssertionError where a layer is further from its
    source than it may be.

    Args:
        before: the source's logits; None where transformers cannot run it.
    """
    text = source.parent / "text.txt"
    try:
        # whose files are read back, and every weight held against the source's
        note = bitpress.compress(
            source,
            out,
            scheme=column.scheme,
            settings=column.settings,
            calibration=text,
            samples=12,
            sequence_length=32,
            threads=1,
        )
    except BitpressError as e:
        return Outcome(str(e).replace(str(source), "MODEL"))
    errors = {name: layer.error for name, layer in note.layers.items()}
    far = {
        name: error for name, error in errors.items() if error is None or not error <= column.most
    }
    assert not far, far
    return Outcome(None, before is not None and _near(out, before, column.dtype))


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """What transformers computes with a folder; None where it cannot, or leaves weights random."""
    import transformers

    for kind in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        try:
            model, found = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except ValueError as e:
            if "Unrecognized configuration class" in str(e):
                continue
            return None
        except (RuntimeError, TypeError, KeyError, AttributeError):
            return None
        if found["missing_keys"] or found["mismatched_keys"]:
            return None
        try:
            with torch.inference_mode():
                return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()  # type: ignore[no-any-return]
        except (AttributeError, RuntimeError, ValueError):
            return None
    return None


def _near(out: Path, before: Tensor, dtype: torch.dtype) -> bool:
    after = logits(out, dtype)
    return after is not None and bool((after - before).norm() <= FAR * before.norm())


def row(model_type: str, folder: Path) -> dict[str, Outcome]:
    """The outcome of every column."""
    source = build(model_type, folder / "model")
    before = logits(source)
    return {
        name: outcome(source, folder / name, column, before) for name, column in COLUMNS.items()
    }
