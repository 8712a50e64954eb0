"""A compressed model on disk, and what was meant to be in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from attrs import field, frozen

from bitpress.checkpoint.reader import DTYPES, Checkpoint, Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import CheckpointError
from bitpress.output.manifest import LayerNote, Manifest, Rescaled
from bitpress.planning.recipe import Recipe
from bitpress.schemes import stored_layout
from bitpress.schemes.registry import Step


@frozen(eq=False)
class Written:
    """An output and what was meant to be in it."""

    checkpoint: Checkpoint
    recipe: Recipe
    layers: Mapping[str, LayerNote]
    rescaled: Mapping[str, Rescaled] = field(factory=dict)

    def given(self, tensor: torch.Tensor, name: str, first: int = 0) -> torch.Tensor:
        """The source's numbers, float32, after the factors that the run folded into them; of the
        rows from `first` on.
        """
        tensor, change = tensor.float(), self.rescaled.get(name, {})
        if "columns" in change:
            tensor = tensor * torch.tensor(change["columns"]).exp2()
        if "rows" in change:
            factors = torch.tensor(change["rows"][first : first + len(tensor)]).exp2()
            tensor = tensor * factors.reshape(-1, *[1] * (tensor.ndim - 1))
        return tensor

    def entries(self, module: str) -> dict[str, Entry | None]:
        """What is stored of a layer, by suffix; None for a planned tensor that is not there."""
        planned = self.planned(module, self.layers[module].shape[0]).tensors
        return {suffix: self.checkpoint.entries.get(f"{module}.{suffix}") for suffix in planned}

    def planned(self, module: str, rows: int) -> Any:
        """The StoredLayer that this many rows of a layer must have become."""
        note = self.layers[module]
        return stored_layout.describe(rows, note.shape[1], DTYPES[note.dtype], self.steps(module))

    def steps(self, module: str) -> tuple[Step, ...]:
        """The steps that wrote a layer."""
        return self.recipe.steps(module)

    def tiles(
        self, module: str, reader: Reader
    ) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        """First and last (exclusive) row of each row tile, and the stored tensors cut to it, on
        which `dequantize` works.
        """
        shape, block = self.layers[module].shape, stored_layout.row_block(self.steps(module))
        entries = {
            suffix: entry for suffix, entry in self.entries(module).items() if entry is not None
        }
        whole = {
            suffix: tuple(t.shape) for suffix, t in self.planned(module, shape[0]).tensors.items()
        }
        for first, last in stored_layout.row_tiles(shape, self.steps(module)):
            tensors = {}
            for suffix, tensor in self.planned(module, last - first).tensors.items():
                # one tile is all, or the tensor does not follow the rows
                if tuple(tensor.shape) == whole[suffix]:
                    tensors[suffix] = reader.whole(entries[suffix])
                else:
                    start = first // block * self.planned(module, block).tensors[suffix].shape[0]
                    tensors[suffix] = reader.rows(entries[suffix], start, start + tensor.shape[0])
            yield first, last, tensors


def written_by(manifest: Manifest, checkpoint: Checkpoint, recipe: Recipe) -> Written:
    """An output as its manifest describes it."""
    for module, note in manifest.layers.items():
        if not recipe.steps(module) or note.dtype not in DTYPES:
            raise CheckpointError(
                f"{checkpoint.folder}: bitpress.json does not say how layer {module} was written"
            )
    return Written(checkpoint, recipe, manifest.layers, manifest.rescaled)
