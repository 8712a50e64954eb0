"""The record of what an unfinished output is made of, kept beside its shards: a run that would
mix other bytes in is refused, and the error names what differs.
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

from bitpress.checkpoint.filenames import CONFIG, RUN_RECORD
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.writer import OutputFolder, format_json
from bitpress.errors import CheckpointError, OutputError
from bitpress.modeling.tokens import CalibrationData
from bitpress.planning.plan import Plan
from bitpress.runtime.process_group import ProcessGroup
from bitpress.runtime.version import __version__

# How many differences an error names.
MAX_DIFFERENCES = 3

# Characters of a value in an error.
MAX_CHARACTERS = 60

Stamps = Mapping[str, tuple[int, int] | None]


@contextlib.contextmanager
def keep_record(
    output: OutputFolder, plan: Plan, data: CalibrationData | None, device: torch.device
) -> Iterator[None]:
    """Keep a record of what the run is made of beside its shards, until the block has ended well
    or leaves no finished shard behind.

    Raises:
        OutputError: an unfinished run whose shards are in the folder was made of something else;
            the message names it.
    """
    record = _describe_run(plan, data, device)
    earlier_record = output.read(RUN_RECORD)
    # an interrupt may come as soon as the record has its name
    try:
        if earlier_record is None or not _has_shards(output, plan):
            output.write_text(RUN_RECORD, format_json(record))
        else:
            _require_same_run(output, earlier_record, record)
        yield
    except BaseException:
        if not _has_shards(output, plan):
            output.remove([RUN_RECORD])
        raise
    output.remove([RUN_RECORD])


def require_same_on_ranks(
    process_group: ProcessGroup, plan: Plan, data: CalibrationData | None, device: torch.device
) -> None:
    """Raise OutputError, naming what differs, unless all ranks are about to make the same."""
    first, *others = process_group.all_gather_object(_describe_run(plan, data, device))
    for rank, record in enumerate(others, 1):
        if lines := list(differences(first, record)):
            raise OutputError(
                f"rank {rank} would make something else than rank 0: "
                f"{'; '.join(lines[:MAX_DIFFERENCES])}"
            )


def _has_shards(output: OutputFolder, plan: Plan) -> bool:
    return any((output.folder / shard.name).exists() for shard in plan.shards)


def _require_same_run(output: OutputFolder, earlier_record: str, record: Any) -> None:
    try:
        lines = list(differences(json.loads(earlier_record), record))
    except ValueError:
        lines = [f"{RUN_RECORD} cannot be read"]
    if lines:
        num_hidden = len(lines) - MAX_DIFFERENCES
        more = f"; and {num_hidden} more" if num_hidden > 0 else ""
        raise OutputError(
            f"{output.folder} was begun by another run: "
            f"{'; '.join(lines[:MAX_DIFFERENCES])}{more}; delete the folder, or go on with what it "
            "was begun with"
        )


def differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON values, a line for every leaf."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(before.get(key), now.get(key), f"{path} {key}".strip())
    elif isinstance(before, list) and isinstance(now, list):
        for i, pair in enumerate(zip_longest(before, now), 1):
            yield from differences(*pair, f"{path} {i}")
    elif before != now:
        yield f"{path} was {_short(before)} and is {_short(now)}"


def read_stamps(source: Checkpoint) -> Stamps:
    """Size and time of change (ns) of every file of the source as it was when it was opened, or is
    now if it has no weights.
    """
    return {name: header.stamp for name, header in source.headers.items()} | {
        name: _read_stamp(source, name) for name in source.side_files
    }


def check_unchanged(source: Checkpoint, before: Stamps) -> None:
    """Raise CheckpointError if a file of the source is not what it was when the run began."""
    for name, stamp in before.items():
        if (now := _read_stamp(source, name)) != stamp:
            raise CheckpointError(
                f"{source.folder / name}: it {'changed' if now else 'vanished'} during the run, "
                "and what was written may hold some of both states; delete the output and run "
                "again"
            )


def _read_stamp(source: Checkpoint, name: str) -> tuple[int, int] | None:
    try:
        status = os.stat(source.folder / name)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _describe_run(plan: Plan, data: CalibrationData | None, device: torch.device) -> Any:
    """Everything that the output's bytes depend on, as it is after a way through JSON."""
    source = plan.source
    record = {
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
        CONFIG: dict(source.config),
        "calibration": data
        and {
            "text": data.source,
            "sequences": len(data.input_ids),
            "tokens of a sequence": data.input_ids.shape[1],
            "seed": data.seed,
            "all experts": data.all_experts,
            "SHA-256 of the tokens": data.digest,
            "transformers": importlib.metadata.version("transformers"),
        },
        "device": device.type,
        "torch": torch.__version__,
    }
    return json.loads(json.dumps(record))


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 3] + "..."
