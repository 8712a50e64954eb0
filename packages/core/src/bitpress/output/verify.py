"""Proof of what was written: the files are opened again and held against the plan, the config and
the source.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from attrs import frozen

from bitpress.checkpoint.engine_facts import facts_of
from bitpress.checkpoint.filenames import CONFIG
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import NAMES, Checkpoint, Reader
from bitpress.checkpoint.safetensors import Entry, TensorSpec
from bitpress.errors import BitpressError, CheckpointError, Fault
from bitpress.output.cache_proof import find_cache_faults
from bitpress.output.file_proof import Workers
from bitpress.output.layer_proof import LayerMeasurement, find_error_faults, measure_stored
from bitpress.output.written_model import WrittenModel
from bitpress.planning import engine_rules
from bitpress.planning.attention_caches import cache_config
from bitpress.planning.ignored_layers import ignored_layers
from bitpress.planning.quantization_config import quantization_config
from bitpress.runtime.devices import ThreadDevices
from bitpress.runtime.logger import logger
from bitpress.schemes.values import StoredLayer


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


def verify_tensors(
    written: WrittenModel,
    source: Checkpoint | None,
    workers: Workers,
    measured: Mapping[str, LayerMeasurement] | None = None,
) -> VerificationReport:
    """Prove that every planned tensor is stored as planned, scales are usable, the config says what
    is stored, and weights are near those of the source.

    Args:
        source: the checkpoint that was compressed; None leaves out what needs it.
        measured: on all ranks, of layers before they were written, in the run that now proves its
            files: these are not read again, nor are copies. None where another run wrote the files.
    """
    process_group = workers.process_group
    faults = list(find_structure_faults(written, source))
    broken = {fault.subject for fault in faults}
    known = {} if measured is None else measured

    def stored_bytes(module: str) -> int:
        return sum(entry.nbytes for entry in written.entries(module).values() if entry)

    modules = process_group.partition_by_size(
        [name for name in written.layers if name not in broken and name not in known], stored_bytes
    )
    threads = ThreadDevices(workers.devices)
    with (
        Reader(pinned=workers.devices[0].type != "cpu") as reader,
        ThreadPoolExecutor(workers.num_threads, initializer=threads.assign) as pool,
    ):
        if not process_group.is_rank_zero:
            # Every rank sees the same headers; the first reports them.
            faults = []
        elif not faults:
            # Tensors that are not as planned are not read: their sizes would be a stranger's.
            faults += _find_number_faults(written, reader)

        def measure(module: str) -> LayerMeasurement:
            measurement = _measure_layer(written, module, source, reader, threads.device)
            logger.debug("%s: relative error %.5f", module, measurement.error)
            workers.report_progress(stored_bytes(module), module)
            return measurement

        share = dict(zip(modules, pool.map(measure, modules), strict=True))
        if process_group.is_rank_zero:
            share |= known
        layer_faults, errors = _judge_layers(written, share, has_source=source is not None)
        faults += layer_faults
        if source is not None:
            names = source.entries if measured is None else written.rescaled
            faults += _verify_copies(written, source, reader, workers, names)

    gathered = process_group.all_gather_object((faults, errors))
    return VerificationReport(
        tuple(fault for rank_faults, _ in gathered for fault in rank_faults),
        {module: error for _, errors in gathered for module, error in errors.items()},
    )


def _judge_layers(
    written: WrittenModel, measured: Mapping[str, LayerMeasurement], *, has_source: bool
) -> tuple[list[Fault], dict[str, float]]:
    """What measurements of layers show, and by layer the error of those that are sound."""
    faults, errors = [], {}
    for module, measurement in measured.items():
        record = written.layers[module]
        texts = sorted(measurement.faults)
        if has_source and not texts:
            errors[module] = measurement.error
            texts += find_error_faults(measurement, record.error, record.rounding_error)
        faults += [Fault(module, text) for text in texts]
    return faults, errors


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
            planned = TensorSpec(NAMES[tensor.dtype], tuple(tensor.shape))
            yield from _compare_entry(module, name, checkpoint, planned)

    for cache in written.caches:
        for name, spec in cache.specs.items():
            expected_names.add(name)
            yield from _compare_entry(cache.module, name, checkpoint, spec)

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
    expected_config = quantization_config(fragments, plain, engines, cache_config(written.caches))
    # Where an engine's facts say under which names it looks for layers, these are proved, and not
    # compared: another release may have listed others.
    normalize = _without_names if engines else _sort_ignored
    if normalize(checkpoint.config.get(KEY)) != normalize(expected_config):
        yield Fault(CONFIG, f"its {KEY} does not describe what is stored")


def _find_number_faults(written: WrittenModel, reader: Reader) -> Iterator[Fault]:
    """Faults of scales, and all else that engines demand of the files."""
    config, entries = written.checkpoint.config, written.checkpoint.entries
    yield from find_cache_faults(written.caches, entries, reader)
    yield from engine_rules.find_faults(config, entries, reader.whole)


def _compare_entry(
    module: str, name: str, checkpoint: Checkpoint, planned: TensorSpec
) -> Iterator[Fault]:
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


def _measure_layer(
    written: WrittenModel,
    module: str,
    source: Checkpoint | None,
    reader: Reader,
    device: torch.device,
) -> LayerMeasurement:
    """Measure one layer on its file, against the source where there is one."""
    steps, (num_rows, num_columns) = written.steps(module), written.layers[module].shape
    config = written.expected_layer(module, num_rows).config
    source_entry = source.entries.get(f"{module}.weight") if source else None
    measured = LayerMeasurement()
    try:
        for first, last, tensors in written.read_tiles(module, reader, device=device):
            reference = None
            if source_entry is not None:
                rows = reader.rows(source_entry, first, last, device)
                reference = written.rescale_source(rows, source_entry.name, first).float()
            stored, shape = StoredLayer(tensors, config), (last - first, num_columns)
            measured |= measure_stored(stored, steps, shape, reference)
    except BitpressError as e:
        return LayerMeasurement(frozenset([str(e)]))
    return measured


def _verify_copies(
    written: WrittenModel,
    source: Checkpoint,
    reader: Reader,
    workers: Workers,
    names: Collection[str],
) -> Sequence[Fault]:
    """Tensors outside the compressed layers, of these names, that differ from the source's."""
    faults = []
    entries = [(name, entry) for name, entry in source.entries.items() if name in names]
    share = workers.process_group.partition_by_size(entries, lambda item: item[1].nbytes)
    for name, entry in share:
        copy = written.checkpoint.entries.get(name)
        if copy is None or name.removesuffix(".weight") in written.layers:
            continue
        try:
            is_same = _is_copy(written, entry, copy, reader)
            text = "the copied tensor differs from the source's"
        except CheckpointError as e:
            is_same, text = False, str(e)
        workers.report_progress(entry.nbytes, name)
        if not is_same:
            faults.append(Fault(name, text))
    return faults


def _is_copy(written: WrittenModel, entry: Entry, copy: Entry, reader: Reader) -> bool:
    """Whether a written tensor is the source's, after the factors that the run folded into it."""
    if copy.spec != entry.spec:
        return False
    if entry.name in written.rescaled:
        rescaled = written.rescale_source(reader.whole(entry), entry.name)
        return torch.equal(rescaled, reader.whole(copy))
    return all(map(torch.equal, reader.chunks(entry), reader.chunks(copy)))
