"""How well a model predicts a text, and how far its predictions are from another's: block by block,
in bounded memory.

Both models go through their blocks side by side, one block in memory at a time; logits are made for
a few tokens at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch

from bitpress.checkpoint.layer_names import block_index
from bitpress.checkpoint.reader import Reader
from bitpress.errors import CheckpointError, RecipeError
from bitpress.modeling.block_runner import Subject, _Run
from bitpress.modeling.capture import head
from bitpress.modeling.metrics import LOGITS, _compare, _perplexity, _Sums
from bitpress.modeling.tokens import Stretch
from bitpress.output.manifest import Check
from bitpress.planning import memory_estimate
from bitpress.runtime import memory
from bitpress.runtime.progress import Told

# times as many are held while they are compared
HELD = 4


def evaluate(
    subject: Subject,
    against: Subject | None,
    text: Stretch,
    device: torch.device,
    place: Path | None,
    trust: bool,
    told: Told,
) -> Check:
    """The figures of a model on a text, and beside another where one is given, computed in float32.

    KL is the mean over tokens of Σ p (log p - log q), p being what the other model expects; top-1
    the share of tokens whose most likely successor is the same.

    Args:
        place: a folder in which hidden states are kept; None keeps them in memory.
        told: is told the bytes of every tensor of a block.

    Raises:
        CheckpointError: transformers cannot build a model, the two are unlike, or one makes numbers
            that are not finite.
    """
    batches = torch.split(text.inputs, max(memory_estimate.BATCH_TOKENS // text.inputs.shape[1], 1))
    with torch.no_grad():
        runs = [_Run(s, batches, device, place, trust) for s in (subject, against) if s is not None]
        if len({len(run.decoder) for run in runs}) > 1:
            raise CheckpointError(
                f"{subject.checkpoint.folder}: the models have not the same number of blocks: not "
                "one's result"
            )
        drift = []
        for index in range(len(runs[0].decoder)):
            for run in runs:
                run.advance(index, told)
                memory.give_back()
            drift.append(_distance(runs))
        with contextlib.ExitStack() as stack:
            heads = [
                stack.enter_context(head(run.decoder, run.beside))
                for run in (runs[:1] if _one_head(subject, against) else runs)
            ]
            sums = _compare(
                runs, heads * (3 - len(heads)), torch.split(text.targets, len(batches[0]))
            )
    return _figures(sums, text, drift if against else [])


def need(subject: Subject, against: Subject | None, tokens: int) -> tuple[int, int]:
    """Bytes that `evaluate` holds with hidden states on disk, and in memory, beyond what the
    interpreter takes.
    """
    blocks: dict[int, int] = {}
    outside, width, hidden = 0, 1, 1 << 62
    for entry in subject.checkpoint.entries.values():
        index = block_index(entry.name, subject.container)
        if index is None:
            outside += entry.numel
        else:
            blocks[index] = blocks.get(index, 0) + entry.numel
            if len(entry.shape) == 2:
                width, hidden = max(width, *entry.shape), min(hidden, entry.shape[1])
    models = 1 if against is None else 2
    block = (
        max(blocks.values(), default=0)
        + memory_estimate.TEMPORARIES * memory_estimate.BATCH_TOKENS * width
    )
    least = memory_estimate.NUMBER_BYTES * max(
        outside, block, outside // 2 + HELD * models * LOGITS
    )
    return least, least + memory_estimate.NUMBER_BYTES * models * tokens * hidden


def spill(
    subject: Subject, against: Subject | None, tokens: int, limit: int | None, folder: Path
) -> Path | None:
    """Where an evaluation keeps its hidden states: in memory (None) where that is allowed, else in
    a folder.

    Raises:
        RecipeError: the limit, in bytes, is too low for either.
    """
    least, held = (memory.TRANSFORMERS_BYTES + size for size in need(subject, against, tokens))
    if limit is not None and limit < least:
        raise RecipeError(
            f"running the model needs about {least / 1e6:,.0f} MB of memory, more than the "
            f"{limit / 1e6:,.0f} MB allowed"
        )
    return (
        folder
        if held > (memory.TRANSFORMERS_BYTES + memory.available() // 2 if limit is None else limit)
        else None
    )


def work(subject: Subject, against: Subject | None) -> int:
    """The bytes that `evaluate` tells of."""
    subjects = [s for s in (subject, against) if s is not None]
    entries = [(e, s.container) for s in subjects for e in s.checkpoint.entries.values()]
    return memory_estimate.NUMBER_BYTES * sum(
        e.numel for e, container in entries if block_index(e.name, container) is not None
    )


def _distance(runs: Sequence[_Run]) -> float:
    """||h - h'|| / ||h'|| of the hidden states of two models."""
    if len(runs) < 2:
        return 0.0
    moved = size = 0.0
    for i in range(len(runs[0].states)):
        ours, theirs = runs[0].states[i], runs[1].states[i]
        moved += float((ours - theirs).square().sum(dtype=torch.float64))
        size += float(theirs.square().sum(dtype=torch.float64))
    return math.sqrt(moved / size) if size else 0.0


def _one_head(subject: Subject, against: Subject | None) -> bool:
    """Whether all that lies outside the blocks is the same to the byte, so that one copy in memory
    does for both.
    """
    if against is None:
        return True
    ours, theirs = (
        {
            name: e
            for name, e in s.checkpoint.entries.items()
            if block_index(name, s.container) is None
        }
        for s in (subject, against)
    )
    if {n: (e.dtype, e.shape) for n, e in ours.items()} != {
        n: (e.dtype, e.shape) for n, e in theirs.items()
    }:
        return False
    with Reader() as reader:
        return all(
            torch.equal(a, b)
            for name, entry in ours.items()
            for a, b in zip(reader.chunks(entry), reader.chunks(theirs[name]), strict=True)
        )


def _figures(sums: _Sums, text: Stretch, drift: Sequence[float]) -> Check:
    count = text.targets.numel()
    if not math.isfinite(sums.nll + sums.nll_against + sums.kl):
        raise CheckpointError(
            "the model makes NaN or infinity of this text: its weights are damaged, or the text is "
            "none of its kind"
        )
    found = Check(
        text.source, text.digest, count, text.inputs.shape[1], _perplexity(sums.nll / count)
    )
    if not drift:
        return found
    return attrs.evolve(
        found,
        source_perplexity=_perplexity(sums.nll_against / count),
        rise=(sums.nll - sums.nll_against) / count,
        kl=sums.kl / count,
        top1=sums.same / count,
        drift=tuple(drift),
    )
