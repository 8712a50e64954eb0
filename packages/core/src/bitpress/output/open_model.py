"""Models on disk, plain ones and outputs, opened to be used."""

from __future__ import annotations

from pathlib import Path

from bitpress.checkpoint import filenames, layer_names
from bitpress.checkpoint.reader import Checkpoint, Reader, open_checkpoint
from bitpress.checkpoint.source import require_readable, resolve_source
from bitpress.errors import CheckpointError
from bitpress.modeling.block_runner import RunnableModel
from bitpress.output import compressed_model, verify as verification
from bitpress.output.manifest import Manifest, read_manifest
from bitpress.output.written_model import WrittenModel
from bitpress.planning import linear_layers, recipe
from bitpress.planning.recipe import Recipe
from bitpress.schemes.registry import discover


def open_runnable_model(folder: Path, reader: Reader) -> RunnableModel:
    """A plain model, or one that bitpress wrote, ready to be run."""
    checkpoint = open_checkpoint(folder)
    if (folder / filenames.MANIFEST).is_file():
        written = open_written(checkpoint)
        # of blocks that hold nothing compressed, all layers are plain
        in_blocks = next(written.modules_in_blocks, None)
        any_module = in_blocks or next(iter(linear_layers.linear_layers(checkpoint)))
        container = layer_names.container(any_module)
        return compressed_model.open_compressed(written, reader, container, folder)
    checkpoint = resolve_source(checkpoint)
    require_readable(checkpoint)
    any_layer = next(iter(linear_layers.linear_layers(checkpoint)))
    return RunnableModel(checkpoint, reader, layer_names.container(any_layer))


def read_written(manifest: Manifest, checkpoint: Checkpoint) -> WrittenModel:
    """An output as its manifest describes it."""
    return WrittenModel.from_manifest(
        manifest, checkpoint, read_recipe(manifest, checkpoint.folder)
    )


def read_recipe(manifest: Manifest, folder: Path) -> Recipe:
    """The recipe of an output's manifest."""
    return recipe.from_json(manifest.recipe, discover(), str(folder / filenames.MANIFEST))


def open_written(checkpoint: Checkpoint) -> WrittenModel:
    """An output whose files hold what its manifest says; raises CheckpointError where headers or
    config say otherwise.
    """
    written = read_written(read_manifest(checkpoint.folder), checkpoint)
    if fault := next(verification.find_structure_faults(written), None):
        raise CheckpointError(
            f"{checkpoint.folder} is not as it was written: {fault} (bitpress verify tells all "
            "that is wrong)"
        )
    return written
