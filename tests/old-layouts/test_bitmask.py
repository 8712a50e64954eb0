"""compressed-tensors 0.14.0.1, the last that read sparse layouts, decodes what we write (`tox -e
old-layouts`).
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

import bitpress
from bitpress.conformance.models import tensors_of, write_model

VERSION = importlib.metadata.version("compressed-tensors")
pytestmark = pytest.mark.skipif(
    VERSION != "0.14.0.1", reason=f"compressed-tensors {VERSION} has no sparse layouts"
)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm=magnitude"],
        ["algorithm=magnitude", "pattern=6:8"],
        ["sparsity=0.3"],
        ["sparsity=0.9"],
    ],
    ids=["2:4", "6:8", "30 %", "90 %"],
)
def test_files_decode_to_the_weights_of_the_dense_layout(
    tmp_path: Path, settings: list[str], shards: int
) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from transformers import AutoConfig

    scheme = "sparse-2of4" if "algorithm=magnitude" in settings else "sparse"
    source = write_model(tmp_path / "m", shards=shards)
    bitpress.compress(source, tmp_path / "dense", scheme=scheme, settings=settings)
    bitpress.compress(source, tmp_path / "o", scheme=scheme, settings=[*settings, "layout=bitmask"])
    config = AutoConfig.from_pretrained(tmp_path / "o").quantization_config
    compressor = ModelCompressor.from_compression_config(config)
    assert compressor is not None
    tensors = dict(compressor.sparsity_compressor.decompress(str(tmp_path / "o")))
    expected = tensors_of(tmp_path / "dense")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
