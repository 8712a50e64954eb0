"""A model of which one layer outside the blocks is rounded, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.compression.data_free import compress_stack
from bitpress.modeling.block_runner import RunnableModel
from bitpress.output.compressed_model import gather_rows
from bitpress.planning.layout import Stack
from bitpress.runtime.devices import CPU
from bitpress.schemes import pipeline, stored_layout
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.values import StoredLayer


def round_layer(model: RunnableModel, stack: Stack, device: torch.device) -> RunnableModel:
    """The model as it will be served if one layer alone is compressed, without data.

    Args:
        stack: of the layer.
        device: that rounds it.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    ((module, stored, _),) = compress_stack(stack, model.reader, device, is_proved=False)
    quantizer = find_activation_quantizer(stored.tensors, stored.config, stack.steps)
    return attrs.evolve(
        model,
        reader=_RoundingReader(model.reader, stack, stored),
        activation_quantizers={} if quantizer is None else {module: quantizer},
    )


class _RoundingReader(Reader):
    """Reads a checkpoint's tensors, that of one layer as it is dequantized.

    Args:
        source: reads the checkpoint.
        stack: of the layer.
        stored: what is stored of it.
    """

    def __init__(self, source: Reader, stack: Stack, stored: StoredLayer) -> None:
        super().__init__()
        self._source, self._stack, self._stored = source, stack, stored
        (self._entry,) = stack.members.values()

    def rows(self, entry: Entry, first: int, last: int, device: torch.device = CPU) -> Tensor:
        """As for any checkpoint; the weight of the layer is float32."""
        if entry.name != self._entry.name:
            return self._source.rows(entry, first, last, device)
        return gather_rows(self._dequantize_tiles(first, last), first, last, device)

    def _dequantize_tiles(self, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """The first row and the weights of every row tile that has some of these rows."""
        stack, stored = self._stack, self._stored
        for tile in stored_layout.row_tiles(stack.shape, stack.steps):
            if tile[0] < last and first < tile[1]:
                tensors = stored_layout.cut_rows(
                    stored.tensors, stack.shape, stack.dtype, stack.steps, tile
                )
                yield tile[0], pipeline.dequantize(tensors, stored.config, stack.steps)

    def expect(self, entry: Entry) -> None:
        """As for any checkpoint."""
        self._source.expect(entry)
