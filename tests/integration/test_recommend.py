"""What the installed schemes are recommended for: as docs/choosing-a-scheme.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

import bitpress
from bitpress.conformance.models import LLAMA, llama_tensors, write_model
from bitpress.schemes.registry import discover

# Widths into which every scheme's groups go.
CONFIG = LLAMA | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}

GB = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    return write_model(folder, llama_tensors(config=CONFIG), CONFIG)


@pytest.mark.parametrize(
    ("device", "scheme"),
    [
        ("H100", "fp8"),
        ("L4", "fp8"),
        ("NVIDIA GeForce RTX 4090", "fp8"),
        ("A100", "int8"),
        ("T4", "int8"),
        ("B200", "fp8"),
        ("MI300X", "fp8"),
        ("RX 7900 XTX", "int8"),
        ("CPU x86", "int8"),
        ("V100", None),
    ],
)
def test_each_device_gets_what_the_page_says(model: Path, device: str, scheme: str | None) -> None:
    best = bitpress.recommend(model, serve_on=device).best
    assert (best and best.variant.scheme) == scheme


@pytest.mark.parametrize(("device", "scheme"), [("L4", "w4a16"), ("B200", "nvfp4")])
def test_where_memory_is_short_four_bits_are_taken(model: Path, device: str, scheme: str) -> None:
    size = bitpress.plan(model, scheme="nvfp4").output_bytes
    result = bitpress.recommend(model, serve_on=device, memory=int(size / 0.9) + 10)
    assert result.best is not None
    assert result.best.variant.scheme == scheme
    causes = {out.scheme: out.cause for out in result.rejected}
    assert causes["fp8"] == causes["int8"] == causes["w8a16"] == "memory"


def test_widths_that_the_default_does_not_take_get_options_that_do(tmp_path: Path) -> None:
    config = CONFIG | {"hidden_size": 320, "intermediate_size": 576}
    model = write_model(tmp_path / "model", llama_tensors(config=config), config)
    result = bitpress.recommend(model, serve_on="L4")
    (w4a16,) = (a for a in result.alternatives if a.variant.scheme == "w4a16")
    assert w4a16.variant.settings == ("group_size=64",)
    assert {out.scheme: out.cause for out in result.rejected}["fp8-block"] == "plan"


def test_every_scheme_that_quantizes_names_a_measured_loss() -> None:
    for scheme in discover().schemes.values():
        assert all(loss.kl > 0 for loss in scheme.losses)
        assert scheme.losses, scheme.name
