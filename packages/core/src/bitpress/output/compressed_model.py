"""A model as an engine computes with it: compressed layers restored, their inputs rounded where the
scheme says so.
"""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from torch import Tensor

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.modeling.block_runner import RunnableModel
from bitpress.output.written_model import WrittenModel
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import (
    INPUT_PREFIX,
    input_rounding,
    quantizes_activations,
)


class Restorer(Reader):
    """Reads an output's tensors, those of compressed layers restored; what is stored it reads
    through another reader.
    """

    def __init__(self, written: WrittenModel, stored: Reader) -> None:
        super().__init__()
        self._written, self._stored = written, stored

    def rows(self, entry: Entry, first: int, last: int) -> Tensor:
        """As for any checkpoint; the weights of compressed layers are float32."""
        module = entry.name.removesuffix(".weight")
        if module == entry.name or module not in self._written.layers:
            return self._stored.rows(entry, first, last)
        steps, config = (
            self._written.steps(module),
            self._written.expected_layer(module, entry.shape[0]).config,
        )
        found = torch.empty(entry.shape)
        for start, end, tensors in self._written.read_tiles(module, self._stored):
            found[start:end] = pipeline.dequantize(tensors, config, steps)
        return found[first:last]


def open_compressed(
    written: WrittenModel, reader: Reader, container: str, built_from: Path
) -> RunnableModel:
    """An output as it will be served.

    Args:
        built_from: the folder with the config, and maybe the code, that transformers builds the
            model from.

    Raises:
        SchemeError: inputs are rounded while serving, and the scheme does not say how.
    """
    entries = dict(written.checkpoint.entries)
    rounding = {}
    for module, note in written.layers.items():
        stored = {
            suffix: entry for suffix, entry in written.entries(module).items() if entry is not None
        }
        for suffix in stored:
            del entries[f"{module}.{suffix}"]
        name, place = f"{module}.weight", next(iter(stored.values()))
        entries[name] = Entry(name, "F32", note.shape, place.file, place.start)
        config, steps = written.expected_layer(module, note.shape[0]).config, written.steps(module)
        if quantizes_activations(config, steps):
            tensors = {
                suffix: reader.whole(entry)
                for suffix, entry in stored.items()
                if suffix.startswith(INPUT_PREFIX)
            }
            found = input_rounding(tensors, config, steps)
            assert found is not None
            rounding[module] = found
    checkpoint = attrs.evolve(written.checkpoint, folder=built_from, entries=entries)
    return RunnableModel(checkpoint, Restorer(written, reader), container, rounding)
