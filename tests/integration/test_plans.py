"""What a plan promises of each scheme is what a run then writes; shapes that engines refuse are
told before.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import bitpress
from bitpress.conformance.models import LLAMA, files_of, llama_tensors, write_model
from bitpress.planning import memory_estimate
from bitpress.planning.tensor_parallel import remarks

SCHEMES = {
    "fp8": ("fp8", []),
    "fp8 per tensor": ("fp8", ["weights=tensor"]),
    "fp8 in blocks": ("fp8-block", []),
    "int8": ("int8", ["algorithm=rtn"]),
    "4 bits": ("w4a16", ["algorithm=rtn"]),
    "4 bits with zero points": ("w4a16", ["algorithm=rtn", "symmetric=false", "group_size=64"]),
    "8 bits": ("w8a16", []),
}


@pytest.mark.parametrize("case", SCHEMES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_file_has_the_size_that_was_planned(tmp_path: Path, case: str, shards: int) -> None:
    (scheme, settings), model = SCHEMES[case], write_model(tmp_path / "model", shards=shards)
    plan = bitpress.plan(model, scheme=scheme, settings=settings)
    bitpress.compress(model, tmp_path / "out", scheme=scheme, settings=settings)
    written = {
        name: len(data)
        for name, data in files_of(tmp_path / "out").items()
        if name not in ("bitpress.json", "README.md")
    }
    assert plan.file_sizes == written
    descriptions = (tmp_path / "out" / name for name in ("bitpress.json", "README.md"))
    measured = sum(file.stat().st_size for file in descriptions)
    assert measured < memory_estimate.estimate_descriptions(plan)
    assert bitpress.verify(tmp_path / "out", model).faults == ()


RANKS = {  # (scheme, settings, ranks) of a model with hidden size 128 and 256: what is refused
    "whole tiles": ("fp8-block", [], 1, {}),
    "parts of tiles": (
        "fp8-block",
        [],
        2,
        {
            "q_proj": "64 rows: a rank must hold whole tiles",
            "k_proj": "64 rows",
            "v_proj": "64 rows",
            "o_proj": "64 columns: a rank must hold whole tiles",
        },
    ),
    "channels divide by anything": ("fp8", [], 4, {}),
    "whole groups": ("w4a16", ["group_size=32"], 4, {}),
    "parts of groups": (
        "w4a16",
        ["group_size=128"],
        2,
        {"o_proj": "64 columns: a rank must hold whole groups of 128"},
    ),
    "channels of 4 bits": ("w4a16", ["group_size=channel"], 4, {}),
    "heads": (
        "int8",
        [],
        3,
        {"model": "4 attention heads", "q_proj": "128 rows", "down_proj": "256 columns"},
    ),
}


@pytest.mark.parametrize("case", RANKS)
def test_what_ranks_cannot_hold_is_told_from_headers(tmp_path: Path, case: str) -> None:
    scheme, settings, ranks, expected = RANKS[case]
    plan = bitpress.plan(write_model(tmp_path / "model"), scheme=scheme, settings=settings)
    result = {
        remark.layers.rpartition(".")[2].split()[-1]: remark.finding
        for remark in remarks(plan, ranks)
    }
    assert bool(result) == bool(expected)
    for layer, words in expected.items():
        assert result[layer].level == "unsupported"
        assert words in result[layer].text


def test_the_cpu_kernel_s_multiples_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LLAMA | {"intermediate_size": 272}
    model = write_model(tmp_path / "model", llama_tensors(config=config), config)
    plan = bitpress.plan(model, scheme="w4a16", settings=["group_size=channel"])
    texts = {remark.layers: remark.finding.text for remark in remarks(plan)}
    assert (
        texts["model.layers.*.mlp.down_proj"]
        == "vLLM's CPU kernel takes multiples of 32, not 128 x 272"
    )
