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

from bitpress.checkpoint.engine_facts import facts_of
from bitpress.checkpoint.filenames import CONFIG
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import DTYPES, NAMES, Checkpoint, Reader
from bitpress.checkpoint.safetensors import TensorSpec
from bitpress.errors import BitpressError, Fault
from bitpress.modeling import metrics
from bitpress.output.manifest import FileRecord, describe_files
from bitpress.output.written_model import WrittenModel
from bitpress.planning import engine_rules
from bitpress.planning.ignored_layers import ignored_layers
from bitpress.planning.quantization_config import quantization_config
from bitpress.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from bitpress.runtime.progress import ReportProgress
from bitpress.schemes import pipeline


@frozen
class VerificationReport:
    """What a verification has shown.

    Attributes:
        faults: empty if all is well.
        errors: by layer, ||dequantized - source|| / ||source||; empty where there was no source.
        remarks: what could not be proved.
    """

    faults: tuple[Fault, ...]
    errors: Mapping[str, float]
    remarks: tuple[str, ...] = ()


def verify_files(
    records: Mapping[str, FileRecord], folder: Path, num_threads: int
) -> Iterator[Fault]:
    """Faults of files against their records: missing, another size, other bytes."""
    present = {name for name in records if (folder / name).is_file()}
    for name in records:
        if name not in present:
            yield Fault(name, "the file is missing")

    # Some engines load every weight file of a folder, whether the index names it or not.
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in records:
            yield Fault(
                file.name, "weights that were not written; some engines load every such file"
            )

    on_disk = describe_files({n: folder / n for n in records if n in present}, num_threads)
    for name, actual in on_disk.items():
        expected = records[name]
        if actual.bytes != expected.bytes:
            yield Fault(name, f"{actual.bytes} bytes, written were {expected.bytes}")
        elif expected.sha256 is not None and actual.sha256 != expected.sha256:
            yield Fault(name, "its bytes are not those that were written (SHA-256 differs)")


def verify_tensors(
    written: WrittenModel,
    source: Checkpoint | None,
    num_threads: int,
    report_progress: ReportProgress,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> VerificationReport:
    """Prove that every planned tensor is stored as planned, scales are usable, the config says what
    is stored, and weights are near those of the source.

    Args:
        source: the checkpoint that was compressed; None leaves out what needs it.
        report_progress: is given the bytes of each layer that was read.
        process_group: each rank reads its share; all return the same report.
    """
    faults = list(find_structure_faults(written, source))
    broken = {fault.subject for fault in faults}

    def stored_bytes(module: str) -> int:
        return sum(entry.nbytes for entry in written.entries(module).values() if entry)

    modules = process_group.partition_by_size(
        [name for name in written.layers if name not in broken], stored_bytes
    )
    errors: dict[str, float] = {}
    with Reader() as reader, ThreadPoolExecutor(num_threads) as pool:
        if not process_group.is_rank_zero:
            # Every rank sees the same headers; the first reports them.
            faults = []
        elif not faults:
            # Tensors that are not as planned are not read: their sizes would be a stranger's.
            checkpoint = written.checkpoint
            faults += engine_rules.find_faults(checkpoint.config, checkpoint.entries, reader.whole)

        def verify_layer(module: str) -> tuple[list[Fault], float | None]:
            result = _verify_layer(written, module, source, reader)
            report_progress(stored_bytes(module))
            return result

        for module, result in zip(modules, pool.map(verify_layer, modules), strict=True):
            layer_faults, error = result
            faults += layer_faults
            if error is not None:
                errors[module] = error
        if source:
            faults += _verify_copies(written, source, reader, process_group)

    gathered = process_group.all_gather_object((faults, errors))
    return VerificationReport(
        tuple(fault for rank_faults, _ in gathered for fault in rank_faults),
        {module: error for _, errors in gathered for module, error in errors.items()},
    )


def find_structure_faults(
    written: WrittenModel, source: Checkpoint | None = None
) -> Iterator[Fault]:
    """Faults that headers and config show, before a weight is read."""
    checkpoint = written.checkpoint
    fragments: dict[str, Mapping[str, Any] | None] = {}
    expected_names = set()
    for module, record in written.layers.items():
        layer = written.expected_layer(module, record.shape[0])
        fragments[module] = layer.config
        for suffix, tensor in layer.tensors.items():
            name = f"{module}.{suffix}"
            expected_names.add(name)
            yield from _compare_entry(module, name, checkpoint, tensor)

    if source is not None:
        yield from _compare_source_shapes(written, source)
        copied = {
            name for name in source.entries if name.removesuffix(".weight") not in written.layers
        }
        for name in sorted(copied - set(checkpoint.entries)):
            yield Fault(name, "the source's tensor is missing")
        expected_names |= copied

    for name in sorted(set(checkpoint.entries) - expected_names):
        is_in_layer = name.rpartition(".")[0] in written.layers and not name.endswith(".bias")
        # Without a source nothing says which other tensors it had.
        if source is not None or is_in_layer:
            yield Fault(name, "the tensor was not planned")

    engines = facts_of(checkpoint.config)
    plain = ignored_layers(checkpoint, written.layers)
    expected_config = quantization_config(fragments, plain, engines)
    # Where an engine's facts say under which names it looks for layers, these are proved, and not
    # compared: another release may have listed others.
    normalize = _without_names if engines else _sort_ignored
    if normalize(checkpoint.config.get(KEY)) != normalize(expected_config):
        yield Fault(CONFIG, f"its {KEY} does not describe what is stored")


def _compare_entry(
    module: str, name: str, checkpoint: Checkpoint, expected: torch.Tensor
) -> Iterator[Fault]:
    planned = TensorSpec(NAMES[expected.dtype], tuple(expected.shape))
    entry = checkpoint.entries.get(name)
    if entry is None:
        yield Fault(module, f"tensor {name} is missing")
    elif entry.spec != planned:
        yield Fault(module, f"tensor {name} is {entry.spec}, planned was {planned}")


def _compare_source_shapes(written: WrittenModel, source: Checkpoint) -> Iterator[Fault]:
    for module, record in written.layers.items():
        entry = source.entries.get(f"{module}.weight")
        if entry is None or (entry.dtype, entry.shape) != (record.dtype, record.shape):
            yield Fault(
                module,
                f"the source's weight is not {record.dtype} {list(record.shape)}, of which this "
                "was made",
            )


def _sort_ignored(table: Any) -> Any:
    """A quantization config with its ignored layers sorted: files of an output need not list
    tensors in the order of its source.
    """
    ignored = table.get("ignore") if isinstance(table, dict) else None
    return {**table, "ignore": sorted(map(str, ignored))} if isinstance(ignored, list) else table


def _without_names(table: Any) -> Any:
    """A quantization config without the names of layers."""
    if not isinstance(table, dict):
        return table
    groups = table.get("config_groups")
    if isinstance(groups, dict):
        groups = {
            name: {key: value for key, value in group.items() if key != "targets"}
            if isinstance(group, dict)
            else group
            for name, group in groups.items()
        }
    return {**table, "ignore": None, "config_groups": groups}


def _verify_layer(
    written: WrittenModel, module: str, source: Checkpoint | None, reader: Reader
) -> tuple[list[Fault], float | None]:
    """Faults of one layer's numbers, and its relative error where there is a source."""
    steps, (num_rows, num_columns) = written.steps(module), written.layers[module].shape
    config = written.expected_layer(module, num_rows).config
    source_entry = source.entries.get(f"{module}.weight") if source else None
    texts = set()
    squared_error, squared_norm = 0.0, 0.0
    try:
        for first, last, tensors in written.read_tiles(module, reader):
            for suffix, tensor in tensors.items():
                is_scale = "scale" in suffix and tensor.is_floating_point()
                if is_scale and not _is_usable_scale(tensor.float()):
                    texts.add(f"{suffix} has a scale that is zero, infinite or NaN")

            weight = pipeline.dequantize(tensors, config, steps, (last - first, num_columns))
            texts.update(pipeline.validate_weight(weight, steps))
            # A finite sum has finite terms, and is found several times as fast.
            if not math.isfinite(weight.sum()) and not weight.isfinite().all():
                texts.add("the stored weight decodes to NaN or infinity")
                continue
            if source_entry is None:
                continue

            rows = reader.rows(source_entry, first, last)
            reference = written.rescale_source(rows, source_entry.name, first)
            bound = pipeline.error_bound(tensors, config, steps, tuple(weight.shape))
            distance = weight.sub_(reference).abs_()
            if bound is not None and _exceeds(distance, bound):
                texts.add("a stored weight is further from the source's than rounding can move it")
            squared_error += float(distance.square().sum(dtype=torch.float64))
            squared_norm += float(reference.square().sum(dtype=torch.float64))
    except BitpressError as e:
        return [Fault(module, str(e))], None

    faults = [Fault(module, text) for text in sorted(texts)]
    if source_entry is None:
        return faults, None
    if squared_error and not squared_norm:
        return faults, math.inf
    return faults, metrics.relative_error(squared_error, squared_norm)


def _exceeds(distance: torch.Tensor, bound: torch.Tensor) -> bool:
    """Whether any distance is larger than its bound."""
    # The largest difference is found several times as fast as each pair is compared. It is NaN
    # where any is, and NaN exceeds nothing.
    if (distance - bound).amax() <= 0:
        return False
    return bool((distance > bound).any())


def _is_usable_scale(scale: torch.Tensor) -> bool:
    return bool(((scale > 0) & scale.isfinite()).all())


def _verify_copies(
    written: WrittenModel, source: Checkpoint, reader: Reader, process_group: ProcessGroup
) -> Sequence[Fault]:
    """Tensors outside the compressed layers that differ from the source's."""
    faults = []
    for name, entry in process_group.partition_by_size(
        list(source.entries.items()), lambda item: item[1].nbytes
    ):
        copy = written.checkpoint.entries.get(name)
        if copy is None or name.removesuffix(".weight") in written.layers:
            continue
        is_same = copy.spec == entry.spec
        if is_same and name in written.rescaled:
            rescaled = written.rescale_source(reader.whole(entry), name)
            is_same = torch.equal(rescaled.to(DTYPES[entry.dtype]), reader.whole(copy))
        elif is_same:
            is_same = all(map(torch.equal, reader.chunks(entry), reader.chunks(copy)))
        if not is_same:
            faults.append(Fault(name, "the copied tensor differs from the source's"))
    return faults
