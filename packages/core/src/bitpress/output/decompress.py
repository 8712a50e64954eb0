"""Back to a plain checkpoint: every layer dequantized to the dtype it came in, and the config
without its quantization_config.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from bitpress.checkpoint import filenames
from bitpress.checkpoint.filenames import INDEX, MANIFEST
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import DTYPES, Reader, open_checkpoint
from bitpress.checkpoint.safetensors import Entry, Header, TensorSpec, lay_out, make_index
from bitpress.checkpoint.source import Source, fuse_uncompressed_experts
from bitpress.checkpoint.views import View
from bitpress.checkpoint.writer import (
    OutputFolder,
    Permissions,
    ShardWriter,
    copy_entry,
    format_json,
)
from bitpress.output.manifest import read_manifest
from bitpress.output.open_model import open_written
from bitpress.output.source_proof import open_source
from bitpress.output.written_model import WrittenModel
from bitpress.runtime.devices import torch_threads
from bitpress.runtime.progress import Progress, copy_work
from bitpress.schemes import pipeline

# The metadata of files of a plain model.
PLAIN = {"format": "pt"}


@frozen(eq=False)
class _DenseModel:
    """A plain checkpoint that is to be written.

    Attributes:
        folder: from which other files are copied.
        headers: by file name.
        side_files: names in the output, and in the folder.
        config: the content of `config.json`.
        decoded: names of tensors that are computed, and not copied.
        write_tensor: writes one of the headers' tensors.
    """

    folder: Path
    headers: Mapping[str, Header]
    side_files: Mapping[str, str]
    config: Mapping[str, Any]
    decoded: Collection[str]
    write_tensor: Callable[[Entry, Reader, ShardWriter], None]

    def work(self, entry: Entry) -> int:
        """What writing a tensor costs."""
        return entry.nbytes if entry.name in self.decoded else copy_work(entry.nbytes)


def decompress(folder: Path, target: Path, progress: Progress) -> None:
    """Write the plain checkpoint that an output stands for, or a model that a source format reads;
    shards keep their names and what was in them.

    Args:
        folder: of the output, or of the model.
        target: the new folder.
        progress: of its one stage.

    Raises:
        CheckpointError: the folder is neither.
    """
    source = open_source(folder)
    model = _from_source(source, target) if source else _from_output(folder, target)
    permissions = Permissions.of(folder, model.headers)
    with torch_threads(1), OutputFolder(target, permissions) as output:
        _write(model, output, progress)


def _write(model: _DenseModel, output: OutputFolder, progress: Progress) -> None:
    headers = model.headers
    index_files = [INDEX] if len(headers) > 1 else []
    output.prepare(
        [*headers, *model.side_files, *index_files, filenames.CONFIG],
        sum(header.nbytes for header in headers.values()),
    )
    num_bytes = sum(model.work(entry) for header in headers.values() for entry in header.entries)
    report_progress = progress("decompressing", num_bytes)
    with Reader() as reader:
        for name, header in headers.items():
            with output.shard(name, header) as writer:
                for entry in header.entries:
                    model.write_tensor(entry, reader, writer)
                    report_progress(model.work(entry), entry.name)

    for name, source_name in model.side_files.items():
        output.copy_file(name, model.folder / source_name)
    if index_files:
        entries = {name: header.entries for name, header in headers.items()}
        output.write_text(INDEX, format_json(make_index(entries)))

    # The config comes last: without it no loader takes the folder for a model.
    output.write_text(filenames.CONFIG, format_json(model.config))


def _from_source(source: Source, target: Path) -> _DenseModel:
    """A model that a source format reads, as what it stands for."""
    plain = fuse_uncompressed_experts(source, ())
    specs: dict[str, dict[str, TensorSpec]] = {}
    for entry in plain.entries.values():
        specs.setdefault(entry.file.name, {})[entry.name] = entry.spec

    def write_tensor(entry: Entry, reader: Reader, writer: ShardWriter) -> None:
        copy_entry(plain.entries[entry.name], entry, reader, writer)

    return _DenseModel(
        source.folder,
        {name: lay_out(target / name, of_file, PLAIN) for name, of_file in specs.items()},
        {name: name for name in plain.side_files if name != filenames.CONFIG},
        plain.config,
        {name for name, entry in plain.entries.items() if isinstance(entry, View)},
        write_tensor,
    )


def _from_output(folder: Path, target: Path) -> _DenseModel:
    """An output, its layers dequantized."""
    checkpoint = open_checkpoint(folder)
    # what --copy took from the source goes back
    files = read_manifest(checkpoint.folder).files
    copied = [name for name in checkpoint.left_files if name in files]
    written = open_written(checkpoint.with_side_files(copied))
    checkpoint = written.checkpoint
    layer_of = {
        f"{module}.{suffix}": module
        for module in written.layers
        for suffix in written.entries(module)
    }
    return _DenseModel(
        checkpoint.folder,
        {
            name: _dense_header(written, header, layer_of, target / name)
            for name, header in checkpoint.headers.items()
        },
        _side_files(written),
        {key: value for key, value in checkpoint.config.items() if key != KEY},
        {f"{module}.weight" for module in written.layers},
        functools.partial(_write_tensor, written),
    )


def _side_files(written: WrittenModel) -> dict[str, str]:
    """What is copied, and its name in the output: the source's own card takes its name again, and
    what bitpress wrote about the output is left out.
    """
    others = written.checkpoint.side_files
    source_card = filenames.find_source_card(others)
    return {
        filenames.MODEL_CARD if name == source_card else name: name
        for name in others
        if name not in (MANIFEST, filenames.MODEL_CARD, filenames.CONFIG)
    }


def _dense_header(
    written: WrittenModel, header: Header, layer_of: Mapping[str, str], file: Path
) -> Header:
    """A shard's header with every compressed layer's tensors replaced by its weight, and without
    those of caches.
    """
    of_caches = {name for cache in written.caches for name in cache.specs}
    specs: dict[str, TensorSpec] = {}
    for entry in header.entries:
        if entry.name in of_caches:
            continue
        if entry.name in layer_of:
            module = layer_of[entry.name]
            layer = written.layers[module]
            specs[f"{module}.weight"] = TensorSpec(layer.dtype, layer.shape)
        else:
            specs[entry.name] = entry.spec
    return lay_out(file, specs, PLAIN)


def _write_tensor(written: WrittenModel, entry: Entry, reader: Reader, writer: ShardWriter) -> None:
    module = entry.name.removesuffix(".weight")
    if module == entry.name or module not in written.layers:
        copy_entry(written.checkpoint.entries[entry.name], entry, reader, writer)
        return
    config = written.expected_layer(module, entry.shape[0]).config
    rows = (
        pipeline.dequantize(tensors, config, written.steps(module)).to(DTYPES[entry.dtype])
        for _, _, tensors in written.read_tiles(module, reader)
    )
    writer.write_chunks(entry, rows)
