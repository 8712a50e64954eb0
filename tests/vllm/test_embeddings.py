"""Real vLLM's loader fills its quantized lookup from embeddings that we compress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fixtures.small_models import build_small_model

import bitpress

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM")


def test_compressed_embeddings_are_placed(
    load: Callable[[Sequence[Path]], Mapping[str, Sequence[str]]], tmp_path: Path
) -> None:
    folders = []
    for architecture in ARCHITECTURES:
        source = build_small_model(architecture, tmp_path / architecture / "m")
        folders.append(tmp_path / architecture / "o")
        bitpress.compress(
            source,
            folders[-1],
            scheme="fp8",
            embeddings="w8a16",
            settings=["w8a16.group_size=32"],
        )
    assert load(folders) == {str(folder): [] for folder in folders}
