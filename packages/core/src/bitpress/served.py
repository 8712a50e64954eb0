"""A model as an engine computes with it: compressed layers restored, their inputs rounded where the
scheme says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from bitpress import chain
from bitpress.checkpoint.header import Entry
from bitpress.checkpoint.reader import Checkpoint, Reader
from bitpress.rounding import INPUTS, Rounding, input_rounding, known
from bitpress.verification import Written


@frozen(eq=False)
class Subject:
    """A model that can be run.

    Attributes:
        checkpoint: its tensors as they are computed with.
        reader: reads them.
        container: the name of the list of decoder blocks.
        rounding: by layer, what is made of its inputs (tokens, in) before it computes with them.
    """

    checkpoint: Checkpoint
    reader: Reader
    container: str
    rounding: Mapping[str, Rounding] = field(factory=dict)


class Restorer(Reader):
    """Reads an output's tensors, those of compressed layers restored; what is stored it reads
    through another reader.
    """

    def __init__(self, written: Written, stored: Reader) -> None:
        super().__init__()
        self._written, self._stored = written, stored

    def rows(self, entry: Entry, first: int, last: int) -> Tensor:
        """As for any checkpoint; the weights of compressed layers are float32."""
        module = entry.name.removesuffix(".weight")
        if module == entry.name or module not in self._written.layers:
            return self._stored.rows(entry, first, last)
        steps, config = (
            self._written.steps(module),
            self._written.planned(module, entry.shape[0]).config,
        )
        found = torch.empty(entry.shape)
        for start, end, tensors in self._written.tiles(module, self._stored):
            found[start:end] = chain.restore(tensors, config, steps)
        return found[first:last]


def plain(checkpoint: Checkpoint, reader: Reader, container: str) -> Subject:
    """A model whose tensors are computed with as they are stored."""
    return Subject(checkpoint, reader, container)


def served(written: Written, reader: Reader, container: str, built_from: Path) -> Subject:
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
        config, steps = written.planned(module, note.shape[0]).config, written.steps(module)
        if known(config, steps):
            tensors = {
                suffix: reader.whole(entry)
                for suffix, entry in stored.items()
                if suffix.startswith(INPUTS)
            }
            found = input_rounding(tensors, config, steps)
            assert found is not None
            rounding[module] = found
    checkpoint = attrs.evolve(written.checkpoint, folder=built_from, entries=entries)
    return Subject(checkpoint, Restorer(written, reader), container, rounding)
