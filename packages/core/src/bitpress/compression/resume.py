"""What an unfinished output is made of, kept beside its shards: another run is told what differs,
and mixes nothing in.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch

from bitpress.checkpoint.filenames import RUN_RECORD
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.writer import OutputFolder, json_text
from bitpress.errors import CheckpointError, OutputError
from bitpress.modeling.tokens import Sequences
from bitpress.planning.plan import Plan
from bitpress.runtime.process_group import Ranks
from bitpress.runtime.version import __version__

# differences that an error names
TOLD = 3

Stamps = Mapping[str, tuple[int, int] | None]


@contextlib.contextmanager
def kept(
    output: OutputFolder, plan: Plan, data: Sequences | None, device: torch.device
) -> Iterator[None]:
    """Note what the run is made of, until the block has ended well or leaves no finished shard
    behind.

    Raises:
        OutputError: an unfinished run whose shards are in the folder was made of something else;
            the message names it.
    """
    now = json.loads(json.dumps(_parts(plan, data, device)))
    text = output.read(RUN_RECORD)
    if text is None or not _finished(output, plan):
        output.text(RUN_RECORD, json_text(now))
    else:
        _compare(output, text, now)
    try:
        yield
    except BaseException:
        if not _finished(output, plan):
            output.remove([RUN_RECORD])
        raise
    output.remove([RUN_RECORD])


def agree(ranks: Ranks, plan: Plan, data: Sequences | None, device: torch.device) -> None:
    """See that all ranks are about to make the same; raises OutputError naming what differs."""
    first, *others = ranks.gather(json.loads(json.dumps(_parts(plan, data, device))))
    for rank, parts in enumerate(others, 1):
        if found := list(differences(first, parts)):
            raise OutputError(
                f"rank {rank} would make something else than rank 0: {'; '.join(found[:TOLD])}"
            )


def _finished(output: OutputFolder, plan: Plan) -> bool:
    return any((output.folder / shard.name).exists() for shard in plan.shards)


def _compare(output: OutputFolder, text: str, now: Mapping[str, Any]) -> None:
    try:
        found = list(differences(json.loads(text), now))
    except ValueError:
        found = [f"{RUN_RECORD} cannot be read"]
    if found:
        more = f"; and {len(found) - TOLD} more" if len(found) > TOLD else ""
        raise OutputError(
            f"{output.folder} was begun by another run: {'; '.join(found[:TOLD])}{more}; "
            "delete the folder, or go on with what it was begun with"
        )


def differences(before: Any, now: Any, place: str = "") -> Iterator[str]:
    """What differs between two JSON values, a line for every leaf."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{place} {key}".strip())
    elif isinstance(before, list) and isinstance(now, list):
        for i, pair in enumerate(zip_longest(before, now), 1):
            yield from differences(*pair, f"{place} {i}")
    elif before != now:
        yield f"{place} was {_short(before)} and is {_short(now)}"


def stamps(source: Checkpoint) -> Stamps:
    """Size and time of change (ns) of every file of the source as it was when it was opened, or is
    now if it has no weights.
    """
    return {name: header.stamp for name, header in source.headers.items()} | {
        name: _stamp(source, name) for name in source.others
    }


def check_unchanged(source: Checkpoint, before: Stamps) -> None:
    """Raise CheckpointError if a file of the source is not what it was when the run began."""
    for name, stamp in before.items():
        if (now := _stamp(source, name)) != stamp:
            raise CheckpointError(
                f"{source.folder / name}: it {'changed' if now else 'vanished'} during the run, "
                "and what was written may hold "
                "some of both states; delete the output and run again"
            )


def _stamp(source: Checkpoint, name: str) -> tuple[int, int] | None:
    try:
        found = os.stat(source.folder / name)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _parts(plan: Plan, data: Sequences | None, device: torch.device) -> dict[str, Any]:
    """Everything that the output's bytes depend on, in words that can be told."""
    source = plan.source
    return {
        "bitpress-core": __version__,
        "scheme": {
            step.scheme.name: f"{step.scheme.package} {step.scheme.version}"
            for step in plan.recipe.all_steps
        },
        "recipe": plan.recipe.as_json(),
        "source": {
            name: {
                "header": hashlib.sha256(header.raw).hexdigest(),
                "size and time of change (ns)": header.stamp,
            }
            for name, header in source.headers.items()
        },
        "config.json": dict(source.config),
        "calibration": data
        and {
            "text": data.source,
            "sequences": len(data.ids),
            "tokens of a sequence": data.ids.shape[1],
            "seed": data.seed,
            "all experts": data.all_experts,
            "SHA-256 of the tokens": data.digest,
            "transformers": importlib.metadata.version("transformers"),
        },
        "device": device.type,
        "torch": torch.__version__,
    }


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
