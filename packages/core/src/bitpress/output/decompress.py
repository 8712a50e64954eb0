"""Back to a plain checkpoint: every layer restored to the dtype it came in, the config without its
quantisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bitpress.checkpoint import filenames
from bitpress.checkpoint.filenames import INDEX, MANIFEST
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import DTYPES, Reader
from bitpress.checkpoint.safetensors import Entry, Header, index, lay_out
from bitpress.checkpoint.writer import OutputFolder, ShardWriter, copy_entry, json_text
from bitpress.output.written_model import Written
from bitpress.runtime.progress import Told
from bitpress.schemes import pipeline


def write_dense(written: Written, output: OutputFolder, done: Told) -> None:
    """Write the dense model; shards keep their names and what was in them. `done` is told the bytes
    of each tensor written.
    """
    source = written.checkpoint
    # takes its name again, and the output's is left out
    own = filenames.original(source.others)
    others = {
        filenames.MODEL_CARD if name == own else name: name
        for name in source.others
        if name not in (MANIFEST, filenames.MODEL_CARD, "config.json")
    }
    parts = {
        f"{module}.{suffix}": module
        for module in written.layers
        for suffix in written.entries(module)
    }
    headers = {
        name: _dense(written, header, parts, output.folder / name)
        for name, header in source.headers.items()
    }
    several = len(headers) > 1
    output.prepare(
        [*headers, *others, *([INDEX] if several else []), "config.json"],
        sum(h.nbytes for h in headers.values()),
    )
    with Reader() as reader:
        for name, header in headers.items():
            with output.shard(name, header) as writer:
                for place in header.entries:
                    _write(written, place, reader, writer)
                    done(place.nbytes)
    for name, origin in others.items():
        output.copy(name, source.folder / origin)
    if several:
        output.text(
            INDEX, json_text(index({name: header.entries for name, header in headers.items()}))
        )
    output.text(
        "config.json", json_text({key: value for key, value in source.config.items() if key != KEY})
    )


def _dense(written: Written, header: Header, parts: Mapping[str, str], file: Path) -> Header:
    """A shard's header with every compressed layer's tensors replaced by its weight."""
    plain = [
        (entry.name, entry.dtype, entry.shape)
        for entry in header.entries
        if entry.name not in parts
    ]
    layers = dict.fromkeys(parts[entry.name] for entry in header.entries if entry.name in parts)
    weights = [
        (f"{module}.weight", written.layers[module].dtype, written.layers[module].shape)
        for module in layers
    ]
    return lay_out(file, [*plain, *weights], {"format": "pt"})


def _write(written: Written, place: Entry, reader: Reader, writer: ShardWriter) -> None:
    module = place.name.removesuffix(".weight")
    if module == place.name or module not in written.layers:
        copy_entry(written.checkpoint.entries[place.name], place, reader, writer)
        return
    config = written.planned(module, place.shape[0]).config
    for first, _, tensors in written.tiles(module, reader):
        weight = pipeline.dequantize(tensors, config, written.steps(module))
        writer.write_rows(place, first, weight.to(DTYPES[place.dtype]))
