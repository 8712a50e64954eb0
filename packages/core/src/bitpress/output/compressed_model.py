"""A model as an engine computes with it: compressed layers are dequantized, their inputs quantized
where the scheme says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs
import torch
from torch import Tensor

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.modeling.block_runner import RunnableModel
from bitpress.output.written_model import WrittenModel
from bitpress.runtime.devices import CPU
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import (
    INPUT_PREFIX,
    find_activation_quantizer,
    quantizes_activations,
)
from bitpress.schemes.attention_cache import cache_quantizer


class DequantizingReader(Reader):
    """Reads an output's tensors, those of compressed layers dequantized.

    Args:
        stored: reads what is in the output's files.
    """

    def __init__(self, written: WrittenModel, stored: Reader) -> None:
        super().__init__()
        self._written, self._stored = written, stored

    def rows(self, entry: Entry, first: int, last: int, device: torch.device = CPU) -> Tensor:
        """As for any checkpoint; the weights of compressed layers are float32."""
        module = entry.name.removesuffix(".weight")
        if module == entry.name or module not in self._written.layers:
            return self._stored.rows(entry, first, last, device)
        steps = self._written.steps(module)
        config = self._written.expected_layer(module, entry.shape[0]).config
        tiles = self._written.read_tiles(module, self._stored, first, last, device)
        dequantized = (
            (start, pipeline.dequantize(tensors, config, steps)) for start, _, tensors in tiles
        )
        return gather_rows(dequantized, first, last, device)

    def chunks(self, entry: Entry, size: int = 1 << 22) -> Iterator[Tensor]:
        """As for any checkpoint; the weights of compressed layers are float32."""
        module = entry.name.removesuffix(".weight")
        if module == entry.name or module not in self._written.layers:
            return self._stored.chunks(entry, size)
        return self.computed_chunks(entry, size)


def gather_rows(
    tiles: Iterable[tuple[int, Tensor]], first: int, last: int, device: torch.device
) -> Tensor:
    """Some rows of a layer, (rows, in) float32.

    Args:
        tiles: the first row of each row tile that has some of them, and its weights.
        first: of the rows.
        last: the one after the last.
    """
    weight = None
    for start, tile in tiles:
        if weight is None:
            weight = torch.empty((last - first, tile.shape[1]), device=device)
        tile_rows = tile[max(first - start, 0) : last - start]
        position = max(start - first, 0)
        weight[position : position + len(tile_rows)] = tile_rows
    assert weight is not None, "some rows are asked for"
    return weight


def open_compressed(
    written: WrittenModel, reader: Reader, container: str, built_from: Path
) -> RunnableModel:
    """An output as it will be served.

    Args:
        container: the name of the list of decoder blocks.
        built_from: the folder with the config, and maybe the code, that transformers builds the
            model from.

    Raises:
        SchemeError: activations are quantized while serving, and the scheme does not say how.
    """
    entries = dict(written.checkpoint.entries)
    quantizers = {}
    for module, record in written.layers.items():
        stored = {
            suffix: entry for suffix, entry in written.entries(module).items() if entry is not None
        }
        for suffix in stored:
            del entries[f"{module}.{suffix}"]
        # where it lies in its file is of no use: DequantizingReader makes it of what is stored
        name, any_entry = f"{module}.weight", next(iter(stored.values()))
        entries[name] = Entry(name, "F32", record.shape, any_entry.file, any_entry.start)

        config = written.expected_layer(module, record.shape[0]).config
        steps = written.steps(module)
        if quantizes_activations(config, steps):
            tensors = {
                suffix: reader.whole(entry)
                for suffix, entry in stored.items()
                if suffix.startswith(INPUT_PREFIX)
            }
            quantizer = find_activation_quantizer(tensors, config, steps)
            assert quantizer is not None
            quantizers[module] = quantizer
    cache_quantizers = {}
    for cache in written.caches:
        tensors = {
            suffix: reader.whole(entries.pop(f"{cache.module}.{suffix}"))
            for suffix in cache.describe_stored().tensors
        }
        config = cache.describe_stored().config
        cache_quantizers[cache.module] = cache_quantizer(cache.step, tensors, config)
    checkpoint = attrs.evolve(written.checkpoint, folder=built_from, entries=entries)
    dequantizing_reader = DequantizingReader(written, reader)
    return RunnableModel(checkpoint, dequantizing_reader, container, quantizers, cache_quantizers)
