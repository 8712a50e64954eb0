"""Back to a plain checkpoint: every layer dequantized to the dtype it came in, and the config
without its quantization_config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitpress.checkpoint import filenames
from bitpress.checkpoint.filenames import INDEX, MANIFEST
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import DTYPES, Reader
from bitpress.checkpoint.safetensors import Entry, Header, TensorSpec, lay_out, make_index
from bitpress.checkpoint.writer import OutputFolder, ShardWriter, copy_entry, format_json
from bitpress.output.written_model import WrittenModel
from bitpress.runtime.progress import Progress, copy_work
from bitpress.schemes import pipeline


def write_dense(written: WrittenModel, output: OutputFolder, progress: Progress) -> None:
    """Write the dense model; shards keep their names and what was in them.

    Args:
        progress: of its one stage.
    """
    checkpoint = written.checkpoint
    side_files = _side_files(written)
    layer_of = {
        f"{module}.{suffix}": module
        for module in written.layers
        for suffix in written.entries(module)
    }
    headers = {
        name: _dense_header(written, header, layer_of, output.folder / name)
        for name, header in checkpoint.headers.items()
    }
    index_files = [INDEX] if len(headers) > 1 else []
    output.prepare(
        [*headers, *side_files, *index_files, filenames.CONFIG],
        sum(header.nbytes for header in headers.values()),
    )

    def work(entry: Entry) -> int:
        is_layer = entry.name.removesuffix(".weight") in written.layers
        return entry.nbytes if is_layer else copy_work(entry.nbytes)

    num_bytes = sum(work(entry) for header in headers.values() for entry in header.entries)
    report_progress = progress("decompressing", num_bytes)
    with Reader() as reader:
        for name, header in headers.items():
            with output.shard(name, header) as writer:
                for entry in header.entries:
                    _write_tensor(written, entry, reader, writer)
                    report_progress(work(entry), entry.name)

    for name, source_name in side_files.items():
        output.copy_file(name, checkpoint.folder / source_name)
    if index_files:
        entries = {name: header.entries for name, header in headers.items()}
        output.write_text(INDEX, format_json(make_index(entries)))

    # The config comes last: without it no loader takes the folder for a model.
    config = {key: value for key, value in checkpoint.config.items() if key != KEY}
    output.write_text(filenames.CONFIG, format_json(config))


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
    return lay_out(file, specs, {"format": "pt"})


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
