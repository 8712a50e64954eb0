"""A compressed model on disk, and what was meant to be in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from attrs import field, frozen

from bitpress.checkpoint.layer_names import BLOCK
from bitpress.checkpoint.reader import DTYPES, Checkpoint, Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import CheckpointError
from bitpress.output.manifest import LayerRecord, Manifest
from bitpress.output.rescaling import Rescaled, rescale
from bitpress.planning.attention_caches import AttentionCache
from bitpress.planning.recipe import Recipe
from bitpress.runtime.devices import CPU
from bitpress.schemes import stored_layout
from bitpress.schemes.attention_cache import CacheShape
from bitpress.schemes.registry import Step
from bitpress.schemes.values import StoredLayer


@frozen(eq=False)
class WrittenModel:
    """The files of an output, and what was meant to be in them.

    Attributes:
        checkpoint: the files as they are.
        recipe: by which they were written.
        layers: the record of every compressed layer, by module name.
        rescaled: by tensor of the source, the exponents of two by which its "columns" and "rows"
            were multiplied before it was compressed or copied.
        caches: of attentions, for which something is stored.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    layers: Mapping[str, LayerRecord]
    rescaled: Mapping[str, Rescaled] = field(factory=dict)
    caches: Sequence[AttentionCache] = ()

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, checkpoint: Checkpoint, recipe: Recipe
    ) -> WrittenModel:
        """An output as its manifest describes it.

        Raises:
            CheckpointError: the recipe has no steps for a layer of the manifest, or its dtype is
                unknown.
        """
        for module, record in manifest.layers.items():
            if not recipe.steps(module) or record.dtype not in DTYPES:
                raise CheckpointError(
                    f"{checkpoint.folder}: bitpress.json does not say how layer {module} was "
                    "written"
                )
        caches = []
        for module, cache in manifest.caches.items():
            if recipe.cache is None or cache.dtype not in DTYPES:
                raise CheckpointError(
                    f"{checkpoint.folder}: bitpress.json does not say how the cache of {module} is "
                    "kept"
                )
            shape = CacheShape(cache.query_heads, cache.heads, cache.channels)
            caches.append(AttentionCache(module, shape, DTYPES[cache.dtype], recipe.cache))
        return cls(checkpoint, recipe, manifest.layers, manifest.rescaled, tuple(caches))

    @property
    def modules_in_blocks(self) -> Iterator[str]:
        """Names of modules of decoder blocks for which something is stored."""
        modules = [*self.layers, *(f"{cache.module}.cache" for cache in self.caches)]
        return (module for module in modules if BLOCK.fullmatch(f"{module}.weight"))

    def steps(self, module: str) -> tuple[Step, ...]:
        """The steps that wrote a layer."""
        return self.recipe.steps(module)

    def expected_layer(self, module: str, num_rows: int) -> StoredLayer:
        """Dtypes, shapes and config that so many rows of a layer must have been stored with."""
        record = self.layers[module]
        return stored_layout.describe(
            num_rows, record.shape[1], DTYPES[record.dtype], self.steps(module)
        )

    def entries(self, module: str) -> dict[str, Entry | None]:
        """What is stored of a layer, by suffix; None for an expected tensor that is missing."""
        expected = self.expected_layer(module, self.layers[module].shape[0]).tensors
        return {suffix: self.checkpoint.entries.get(f"{module}.{suffix}") for suffix in expected}

    def read_tiles(
        self,
        module: str,
        reader: Reader,
        first_row: int = 0,
        last_row: int | None = None,
        device: torch.device = CPU,
    ) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
        """Read a layer in row tiles: first and last (exclusive) row of each, and the stored tensors
        cut to these rows, on which `dequantize` works.

        Args:
            first_row: tiles that end before it are left out.
            last_row: tiles that begin at it or after it are left out; None leaves out none.
            device: on which the tensors are.
        """
        record, steps = self.layers[module], self.steps(module)
        entries = {
            suffix: entry for suffix, entry in self.entries(module).items() if entry is not None
        }
        end = record.shape[0] if last_row is None else last_row
        for tile in stored_layout.row_tiles(record.shape, steps):
            if tile[1] <= first_row or tile[0] >= end:
                continue
            tensors = {}
            ranges = stored_layout.row_ranges(record.shape, DTYPES[record.dtype], steps, tile)
            for suffix, rows in ranges.items():
                entry = entries[suffix]
                first, last = rows or (0, entry.shape[0] if entry.shape else 1)
                tensors[suffix] = reader.rows(entry, first, last, device)
            yield *tile, tensors

    def rescale_source(self, tensor: torch.Tensor, name: str, first_row: int = 0) -> torch.Tensor:
        """The source's numbers after the factors that the run folded into them.

        Args:
            tensor: rows of the source's tensor, (rows, ...).
            name: of the source's tensor.
            first_row: where these rows begin in it.

        Returns:
            Of the same shape and dtype.
        """
        return rescale(tensor, self.rescaled.get(name, {}), first_row)
