"""A compressed model is read as the weights that it is served with."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import torch

import bitpress
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.conformance.models import LLAMA, llama_tensors, write_model
from bitpress.output.compressed_model import open_compressed
from bitpress.output.manifest import read_manifest
from bitpress.output.written_model import WrittenModel
from bitpress.planning import recipe
from bitpress.schemes import pipeline
from bitpress.schemes.registry import discover

WIDE = LLAMA | {"intermediate_size": 4096, "num_hidden_layers": 1}
NAME = "model.layers.0.mlp.gate_proj.weight"


def test_rows_of_a_layer_are_those_of_the_whole_and_no_other_is_dequantized(
    tmp_path: Path, with_toy: Path
) -> None:
    # a layer of two row tiles
    model = write_model(tmp_path / "model", llama_tensors(config=WIDE), WIDE)
    out = tmp_path / "out"
    bitpress.compress(model, out, scheme="toy")
    manifest = read_manifest(out)
    out_recipe = recipe.from_json(manifest.recipe, discover(), str(out))
    written = WrittenModel(open_checkpoint(out), out_recipe, manifest.layers, {})
    with Reader() as reader:
        opened = open_compressed(written, reader, "model.layers", model)
        entry = opened.checkpoint.entries[NAME]
        whole = opened.reader.whole(entry)
        assert whole.shape == (4096, 128)
        with patch.object(pipeline, "dequantize", wraps=pipeline.dequantize) as dequantize:
            for first, last, num_tiles in ((0, 4096, 2), (2000, 2100, 2), (0, 2048, 1), (9, 10, 1)):
                dequantize.reset_mock()
                rows = opened.reader.rows(entry, first, last)
                assert torch.equal(rows, whole[first:last])
                assert dequantize.call_count == num_tiles
