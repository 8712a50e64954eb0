"""Proof of what was written: the files are opened again and held against the plan, the config and
the source.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import DTYPES, NAMES, Checkpoint, Reader
from bitpress.errors import BitpressError
from bitpress.output.manifest import FileNote, file_notes
from bitpress.output.written_model import Written
from bitpress.planning import engine_rules, linear_layers
from bitpress.planning.quantization_config import quantization_config
from bitpress.runtime.process_group import ALONE, Ranks
from bitpress.runtime.progress import Told
from bitpress.schemes import pipeline


@frozen
class Report:
    """What was found: faults, empty if all is well, and the relative error of every layer where
    there was a source.

    Attributes:
        remarks: what could not be proved.
    """

    faults: tuple[str, ...]
    errors: Mapping[str, float]
    remarks: tuple[str, ...] = ()


def verify_files(notes: Mapping[str, FileNote], folder: Path, threads: int) -> Iterator[str]:
    """Faults of files against their notes: missing, another size, other bytes."""
    present = {name: note for name, note in notes.items() if (folder / name).is_file()}
    for name in notes:
        if name not in present:
            yield f"{name}: the file is missing"
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in notes:
            yield f"{file.name}: weights that were not written; some engines load every such file"
    for name, found in file_notes({name: folder / name for name in present}, threads).items():
        noted = present[name]
        if found.bytes != noted.bytes:
            yield f"{name}: {found.bytes} bytes, written were {noted.bytes}"
        elif noted.sha256 is not None and found.sha256 != noted.sha256:
            yield f"{name}: its bytes are not those that were written (SHA-256 differs)"


def verify_tensors(
    written: Written, source: Checkpoint | None, threads: int, done: Told, ranks: Ranks = ALONE
) -> Report:
    """Every planned tensor is there as planned, scales are usable, the config says what is stored,
    and weights are near the source's where there is a source; `done` is told the bytes of each
    layer that was read. Each rank reads its share.
    """
    faults = list(structure(written, source))
    out = written.checkpoint
    broken = {fault.split(":")[0] for fault in faults}
    modules = [module for module in written.layers if module not in broken]
    modules = ranks.deal(
        modules, lambda module: sum(e.nbytes for e in written.entries(module).values() if e)
    )
    errors: dict[str, float] = {}
    with Reader() as reader, ThreadPoolExecutor(threads) as pool:
        if not ranks.first:
            # what headers show is told once
            faults = []
        elif not faults:
            # what is not as planned is not looked at again: whatever a stranger has put there would
            # be
            faults += engine_rules.faults(out.config, out.entries, reader.whole)

        def work(module: str) -> tuple[list[str], float | None]:
            found = _layer(written, module, source, reader)
            done(sum(e.nbytes for e in written.entries(module).values() if e))
            return found

        for module, (found, error) in zip(modules, pool.map(work, modules), strict=True):
            faults += found
            if error is not None:
                errors[module] = error
        if source:
            faults += _copies(written, source, reader, ranks)
    theirs = ranks.gather((faults, errors))
    return Report(
        tuple(f for found, _ in theirs for f in found),
        {m: error for _, found in theirs for m, error in found.items()},
    )


def structure(written: Written, source: Checkpoint | None = None) -> Iterator[str]:
    """Faults that headers and config show."""
    out = written.checkpoint
    fragments, expected = {}, set()
    for module, note in written.layers.items():
        record = written.planned(module, note.shape[0])
        fragments[module] = record.config
        for suffix, tensor in record.tensors.items():
            name, planned = f"{module}.{suffix}", (NAMES[tensor.dtype], tuple(tensor.shape))
            expected.add(name)
            entry = out.entries.get(name)
            if entry is None:
                yield f"{module}: tensor {name} is missing"
            elif (entry.dtype, entry.shape) != planned:
                yield (
                    f"{module}: tensor {name} is {entry.dtype} {list(entry.shape)}, planned was "
                    f"{planned[0]} {list(planned[1])}"
                )
    if source is not None:
        for module, note in written.layers.items():
            origin = source.entries.get(f"{module}.weight")
            if origin is None or (origin.dtype, origin.shape) != (note.dtype, note.shape):
                yield (
                    f"{module}: the source's weight is not {note.dtype} {list(note.shape)}, of "
                    "which this was made"
                )
        copied = {
            name for name in source.entries if name.removesuffix(".weight") not in written.layers
        }
        yield from (
            f"{name}: the source's tensor is missing" for name in sorted(copied - set(out.entries))
        )
        expected |= copied
    for name in sorted(set(out.entries) - expected):
        if source is not None or (
            name.rpartition(".")[0] in written.layers and not name.endswith(".bias")
        ):
            yield f"{name}: the tensor was not planned"
    wanted = quantization_config(fragments, linear_layers.left_alone(out, written.layers))
    if _in_order(out.config.get(KEY)) != _in_order(wanted):
        yield f"config.json: its {KEY} does not describe what is stored"


def _in_order(table: Any) -> Any:
    """A config whose ignored layers are in no file's order: files of an output need not follow
    those of its source.
    """
    ignored = table.get("ignore") if isinstance(table, dict) else None
    return {**table, "ignore": sorted(map(str, ignored))} if isinstance(ignored, list) else table


def _layer(
    written: Written, module: str, source: Checkpoint | None, reader: Reader
) -> tuple[list[str], float | None]:
    """Faults of one layer's numbers, and its relative error."""
    steps, faults = written.steps(module), set()
    config = written.planned(module, written.layers[module].shape[0]).config
    origin = source.entries.get(f"{module}.weight") if source else None
    moved, size = 0.0, 0.0
    try:
        for first, last, tensors in written.tiles(module, reader):
            for suffix, tensor in tensors.items():
                if "scale" in suffix and tensor.is_floating_point() and not _usable(tensor.float()):
                    faults.add(f"{module}: {suffix} has a scale that is zero, infinite or NaN")
            weight = pipeline.dequantize(
                tensors, config, steps, (last - first, written.layers[module].shape[1])
            )
            faults.update(f"{module}: {text}" for text in pipeline.validate_weight(weight, steps))
            if not math.isfinite(weight.sum()) and not weight.isfinite().all():
                faults.add(f"{module}: the stored weight decodes to NaN or infinity")
            elif origin is not None:
                given = written.given(reader.rows(origin, first, last), origin.name, first)
                limit = pipeline.error_bound(tensors, config, steps, tuple(weight.shape))
                distance = weight.sub_(given).abs_()
                # the largest difference is found several times as fast as each is compared, unless
                # one is NaN
                if (
                    limit is not None
                    and not (distance - limit).amax() <= 0
                    and (distance > limit).any()
                ):
                    faults.add(
                        f"{module}: a stored weight is further from the source's than rounding can "
                        "move it"
                    )
                moved += float(distance.square().sum(dtype=torch.float64))
                size += float(given.square().sum(dtype=torch.float64))
    except BitpressError as e:
        return [f"{module}: {e}"], None
    error = math.sqrt(moved / size) if size else (0.0 if not moved else math.inf)
    return sorted(faults), error if origin is not None else None


def _usable(scale: torch.Tensor) -> bool:
    return bool(((scale > 0) & scale.isfinite()).all())


def _copies(written: Written, source: Checkpoint, reader: Reader, ranks: Ranks) -> Sequence[str]:
    """Plain tensors whose bytes differ from the source's."""
    faults = []
    for name, entry in ranks.deal(list(source.entries.items()), lambda item: item[1].nbytes):
        copy = written.checkpoint.entries.get(name)
        if copy is None or name.removesuffix(".weight") in written.layers:
            continue
        same = (copy.dtype, copy.shape) == (entry.dtype, entry.shape)
        if same and name in written.rescaled:
            same = torch.equal(
                written.given(reader.whole(entry), name).to(DTYPES[entry.dtype]), reader.whole(copy)
            )
        elif same:
            same = all(map(torch.equal, reader.chunks(entry), reader.chunks(copy)))
        if not same:
            faults.append(f"{name}: the copied tensor differs from the source's")
    return faults
