"""Weights of a model that is published in fewer bits than 16, dequantized while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from attrs import define, frozen
from torch import Tensor

from bitpress.checkpoint.model_config import text_part, without_quantization
from bitpress.checkpoint.quantized_source import QuantizedSource, QuantizedWeight, StoredPart
from bitpress.checkpoint.reader import DTYPES, NAMES, Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.views import MatrixReader, View, fill_rows
from bitpress.errors import CheckpointError, is_out_of_memory
from bitpress.runtime.devices import CPU
from bitpress.schemes.values import QuantizedTensor

# Numbers that are dequantized together.
NUMBERS_PER_PIECE = 1 << 22

# Bytes that this takes of memory for each number: about four of float32.
PIECE_BYTES = 16


@define(eq=False)
class _ReadParts:
    """What a thread keeps of a weight between reads of its rows.

    Attributes:
        whole: parts that are read as a whole.
        block: the number of the last block that was decoded by itself, on which device, and what it
            was decoded to: tiles of fewer rows read it again.
    """

    whole: dict[str, Tensor]
    block: tuple[int, torch.device, QuantizedTensor | Tensor] | None = None


@frozen
class DequantizedView(View):
    """A weight made of stored tensors by a source format: in float32 where it is going to be
    quantized, and otherwise in the dtype of the model.

    Attributes:
        weight: what the format says of it.
        parts: the stored tensors, by the names that the format knows them by.
        is_copied: whether it is stored as it is read.
    """

    weight: QuantizedWeight = attrs.field(kw_only=True)
    parts: Mapping[str, Entry] = attrs.field(kw_only=True)
    is_copied: bool = attrs.field(default=False, kw_only=True)

    @property
    def file_bytes(self) -> int:
        """Bytes of all of its parts."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def held_bytes(self) -> int:
        """Parts that are read as a whole, a block that is kept, and what is made of a piece."""
        whole = sum(self.parts[role].nbytes for role, part in self._parts if not _is_cut(part))
        block = self.weight.row_block * self.numel // max(self.shape[0], 1)
        piece = min(self.numel, max(NUMBERS_PER_PIECE, block))
        return whole + 4 * block + PIECE_BYTES * piece

    def rows(
        self,
        reader: MatrixReader,
        first: int,
        last: int,
        dtype: torch.dtype,
        *,
        device: torch.device = CPU,
    ) -> Tensor:
        """Rows `first` to `last` (exclusive), dequantized on a device."""
        dtype = dtype if self.is_copied else torch.float32
        block, row_numbers = self.weight.row_block, self.numel // max(self.shape[0], 1)
        rows = torch.empty((last - first, *self.shape[1:]), dtype=dtype, device=device)

        def make_rows(start: int, end: int) -> Tensor:
            decoded = self._decode(reader, start // block, -(-min(end, last) // block), device)
            return decoded.dequantize() if isinstance(decoded, QuantizedTensor) else decoded

        fill_rows(rows, first, block, NUMBERS_PER_PIECE // max(row_numbers, 1), make_rows)
        return rows

    def decode_rows(
        self, reader: MatrixReader, first: int, last: int, device: torch.device = CPU
    ) -> QuantizedTensor | Tensor:
        """The codes and scales of rows `first` to `last` (exclusive), or without codes float32."""
        block = self.weight.row_block
        decoded = self._decode(reader, first // block, -(-last // block), device)
        start = first // block * block
        if isinstance(decoded, QuantizedTensor):
            return decoded.rows(first - start, last - start)
        return decoded[first - start : last - start]

    @property
    def _parts(self) -> list[tuple[str, StoredPart]]:
        return list(self.weight.parts.items())

    def _decode(
        self, reader: MatrixReader, first: int, last: int, device: torch.device
    ) -> QuantizedTensor | Tensor:
        """Blocks `first` to `last` (exclusive); without codes float32."""

        def read_whole() -> _ReadParts:
            roles = [role for role, part in self._parts if not _is_cut(part)]
            return _ReadParts({role: reader.whole(self.parts[role]) for role in roles})

        read = reader.computed(self, read_whole)
        is_single = last - first == 1 and self.weight.row_block > 1
        if is_single and read.block is not None and read.block[:2] == (first, device):
            return read.block[2]
        tensors = {}
        for role, part in self._parts:
            entry = self.parts[role]
            if part.block_size is None:
                tensors[role] = read.whole[role].to(device)
                continue
            begin, end = first * part.block_size, last * part.block_size
            if part.axis:
                tensors[role] = read.whole[role][:, begin:end].to(device)
            else:
                tensors[role] = reader.rows(entry, begin, min(end, entry.shape[0]), device)
        decoded = self._call_decode(tensors)
        num_rows = min(last * self.weight.row_block, self.shape[0]) - first * self.weight.row_block
        shape = (decoded.codes if isinstance(decoded, QuantizedTensor) else decoded).shape
        if shape != (num_rows, *self.shape[1:]):
            raise CheckpointError(
                f"{self.file}: the source format of {self.name} makes {list(shape)} of its parts, "
                f"and not {[num_rows, *self.shape[1:]]}"
            )
        read.block = (first, device, decoded) if is_single else None
        return decoded

    def _call_decode(self, tensors: Mapping[str, Tensor]) -> QuantizedTensor | Tensor:
        try:
            return self.weight.decode(tensors)
        except Exception as e:
            if is_out_of_memory(e):
                raise
            raise CheckpointError(
                f"{self.file}: the source format of {self.name} failed on its parts: "
                f"{type(e).__name__}: {e}"
            ) from e


def _is_cut(part: StoredPart) -> bool:
    """Whether rows of it are read."""
    return part.block_size is not None and part.axis == 0


def dequantize(checkpoint: Checkpoint, source: QuantizedSource) -> Checkpoint:
    """The model that a checkpoint stands for, its weights as views in the dtype that the config
    names.

    Raises:
        CheckpointError: the format names a tensor that is not stored, or gives two one name.
    """
    dtype = _dtype(checkpoint.config)
    views, parts = {}, set(source.left_out)
    for name, weight in source.weights.items():
        view = _make_view(checkpoint, name, weight, dtype)
        main = next(iter(view.parts.values()))
        views[main.name] = view
        parts |= {part.name for part in view.parts.values()}

    entries: dict[str, Entry] = {}
    for name, entry in checkpoint.entries.items():
        if name in views:
            entry = views[name]
        elif name in parts:
            continue
        else:
            entry = attrs.evolve(entry, name=source.renamed.get(name, name))
        if entry.name in entries:
            raise CheckpointError(f"{entry.file}: {entry.name} is stored twice, once as {name}")
        entries[entry.name] = entry
    side_files = tuple(name for name in checkpoint.side_files if name not in source.left_files)
    return attrs.evolve(
        checkpoint,
        entries=entries,
        config=without_quantization(checkpoint.config) | dict(source.config_values),
        side_files=side_files,
    )


def _make_view(
    checkpoint: Checkpoint, name: str, weight: QuantizedWeight, dtype: str
) -> DequantizedView:
    parts = {}
    for role, part in weight.parts.items():
        if part.name not in checkpoint.entries:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} needs {part.name}, which is missing"
            )
        parts[role] = checkpoint.entries[part.name]
    main = next(iter(parts.values()))
    if main.dtype not in DTYPES:
        raise CheckpointError(f"{main.file}: tensor {main.name} is {main.dtype}, unknown to torch")
    place = (name, dtype, weight.shape, main.file, main.start, main)
    return DequantizedView(*place, weight=weight, parts=parts)


def _dtype(config: Mapping[str, Any]) -> str:
    """The model's dtype, as safetensors names it; bfloat16 where the config names none."""
    names = {str(dtype).removeprefix("torch."): name for dtype, name in NAMES.items()}
    dtypes = [
        part.get(key) for part in (config, text_part(config)) for key in ("dtype", "torch_dtype")
    ]
    return next((names[dtype] for dtype in dtypes if dtype in ("float16", "float32")), "BF16")
