"""The record of an unfinished run, kept beside its shards: a run that would mix other bytes in is
refused, and the error names what differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from bitpress.checkpoint.digests import read_stamp
from bitpress.checkpoint.filenames import CONFIG, RUN_RECORD, RUN_TOKENS
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.signed_json import is_signed, sign_json
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

# Size and time of change (ns) of files by name; None for one that is not there.
Stamps = Mapping[str, tuple[int, int] | None]


@contextlib.contextmanager
def keep_record(
    output: OutputFolder, plan: Plan, calibration: CalibrationData | None, device: torch.device
) -> Iterator[None]:
    """Keep a record of the run beside its shards while the `with` statement runs; it stays there
    where that ends with an exception and finished shards.

    Raises:
        OutputError: the finished shards in the folder are another run's, and the message names what
            differs; or nothing says whose they are.
    """
    record = _describe_run(plan, calibration, device)
    earlier_record = output.read(RUN_RECORD)
    # an interrupt may come as soon as the record has its name
    try:
        if not _has_shards(output, plan):
            if calibration is not None and _keeps_tokens(calibration):
                tokens = {"input_ids": calibration.input_ids.tolist()}
                output.write_text(RUN_TOKENS, sign_json(tokens))
            output.write_text(RUN_RECORD, format_json(record))
        elif earlier_record is None:
            raise OutputError(
                f"{output.folder}: it holds finished shards and no {RUN_RECORD}, which says what "
                "run wrote them; delete the folder, or name another"
            )
        else:
            _require_same_run(output, earlier_record, record)
        yield
    except BaseException:
        if not _has_shards(output, plan):
            output.remove([RUN_RECORD, RUN_TOKENS])
        raise
    output.remove([RUN_RECORD, RUN_TOKENS])


def _keeps_tokens(calibration: CalibrationData) -> bool:
    """Whether another day gives other tokens, and the record shows whether the texts are the same:
    those of a file.
    """
    return calibration.depends_on_day and calibration.text_stamp is not None


def read_begun_tokens(folder: Path, calibration: CalibrationData) -> CalibrationData:
    """The calibration data that an unfinished run in a folder has begun with, where a chat template
    has written another day's date into it since; otherwise the same.

    The run's record says whether all else is the same.
    """
    file = folder / RUN_TOKENS
    if not _keeps_tokens(calibration) or not file.is_file():
        return calibration
    content = file.read_bytes()
    if not is_signed(content):
        return calibration
    begun = calibration.with_tokens(torch.tensor(json.loads(content)["input_ids"]))
    return begun if begun.input_ids.shape == calibration.input_ids.shape else calibration


def require_same_on_ranks(
    process_group: ProcessGroup,
    plan: Plan,
    calibration: CalibrationData | None,
    device: torch.device,
) -> None:
    """Raise OutputError, naming what differs, unless all ranks are about to make the same."""
    first, *others = process_group.all_gather_object(_describe_run(plan, calibration, device))
    for rank, record in enumerate(others, 1):
        if lines := list(_find_differences(first, record)):
            raise OutputError(
                f"rank {rank} would make something else than rank 0: "
                f"{'; '.join(lines[:MAX_DIFFERENCES])}"
            )


def _has_shards(output: OutputFolder, plan: Plan) -> bool:
    return any((output.folder / shard.name).exists() for shard in plan.shards)


def _require_same_run(output: OutputFolder, earlier_record: str, record: Any) -> None:
    try:
        lines = list(_find_differences(json.loads(earlier_record), record))
    except (ValueError, RecursionError):
        lines = [f"{RUN_RECORD} cannot be read"]
    if lines:
        num_hidden = len(lines) - MAX_DIFFERENCES
        more = f"; and {num_hidden} more" if num_hidden > 0 else ""
        raise OutputError(
            f"{output.folder} was begun by another run: "
            f"{'; '.join(lines[:MAX_DIFFERENCES])}{more}; delete the folder, or resume with "
            "what it was begun with"
        )


def _find_differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """What differs between two JSON values, a line for every leaf."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _find_differences(before.get(key), now.get(key), f"{path} {key}".strip())
    elif isinstance(before, list) and isinstance(now, list):
        for i, pair in enumerate(zip_longest(before, now), 1):
            yield from _find_differences(*pair, f"{path} {i}")
    elif before != now:
        yield f"{path} was {_shorten(before)} and is {_shorten(now)}"


def read_stamps(source: Checkpoint) -> Stamps:
    """Size and time of change (ns) of every file of the source as it was when it was opened, or is
    now if it has no weights.
    """
    return {name: header.stamp for name, header in source.headers.items()} | {
        name: read_stamp(source.folder / name) for name in source.side_files
    }


def check_unchanged(source: Checkpoint, stamps: Stamps) -> None:
    """Raise CheckpointError if a file of the source has changed since its stamp was read."""
    for name, stamp in stamps.items():
        stamp_now = read_stamp(source.folder / name)
        if stamp_now != stamp:
            change = "changed" if stamp_now else "vanished"
            raise CheckpointError(
                f"{source.folder / name}: it {change} during the run, "
                "and what was written may hold some of both states; delete the output and run "
                "again"
            )


def _describe_run(plan: Plan, calibration: CalibrationData | None, device: torch.device) -> Any:
    """Everything that the output's bytes depend on, in JSON values."""
    source = plan.source
    calibration_record = None
    if calibration is not None:
        calibration_record = {
            "text": calibration.source,
            "sequences": len(calibration.input_ids),
            "tokens of a sequence": calibration.input_ids.shape[1],
            "seed": calibration.seed,
            "all experts": calibration.all_experts,
            "SHA-256 of the tokens": calibration.digest,
            "transformers": importlib.metadata.version("transformers"),
        }
        # tokens that another day would change are kept, and do not show that the text has changed
        if calibration.depends_on_day:
            calibration_record["size and time of change (ns) of the text"] = calibration.text_stamp
    record = {
        "bitpress-core": __version__,
        "scheme": plan.recipe.scheme_versions,
        "recipe": plan.recipe.as_json(),
        "source": {
            name: {
                "header": hashlib.sha256(header.raw).hexdigest(),
                "size and time of change (ns)": header.stamp,
            }
            for name, header in source.headers.items()
        },
        CONFIG: dict(source.config),
        "calibration": calibration_record,
        "device": device.type,
        "torch": torch.__version__,
    }
    # as an earlier record is read: tuples have become lists
    return json.loads(json.dumps(record))


def _shorten(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 3] + "..."
