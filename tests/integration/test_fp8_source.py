"""A model that comes in FP8 is compressed as the bfloat16 model that it stands for, and no such
model is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.fake_gpu import GPU, Pretended, bare
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from fixtures.toy_scheme import install_toy
from torch import Tensor

import bitpress
from bitpress.api import evaluate
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.checkpoint.source import resolve_source
from bitpress.checkpoint.views import View
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model

KEPT = ("lm_head", "embed", "norm")
E4M3_MAX = 448


def tiles(weight: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """Codes and one scale for each tile, by loops."""
    rows, width = weight.shape
    codes, scales = torch.zeros(rows, width), torch.zeros(-(-rows // high), -(-width // wide))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            tile = slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide)
            # a power of two: in bfloat16 the model is the same
            largest = weight[tile].float().abs().max() / E4M3_MAX
            scales[i, j] = largest.log2().ceil().exp2()
            codes[tile] = weight[tile].float() / scales[i, j]
    return codes.to(torch.float8_e4m3fn), scales


def decoded(codes: Tensor, scales: Tensor, high: int, wide: int) -> Tensor:
    """What they stand for, number by number's tile."""
    result = codes.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            result[i * high : (i + 1) * high, j * wide : (j + 1) * wide] *= scales[i, j]
    return result.bfloat16()


def group(strategy: str, **keys: Any) -> dict[str, Any]:
    weights = {"type": "float", "num_bits": 8, "strategy": strategy, "symmetric": True, **keys}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


OWN = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
# config, scale's name, tile, its shape
LAYOUTS: Mapping[str, tuple[dict[str, Any], str, tuple[int, int] | None, str]] = {
    "tiles of 128": (
        OWN | {"weight_block_size": [128, 128]},
        "weight_scale_inv",
        (128, 128),
        "tiles",
    ),
    "tiles that do not fill": (
        OWN | {"weight_block_size": [96, 80]},
        "weight_scale_inv",
        (96, 80),
        "tiles",
    ),
    "one for all": (
        OWN | {"activation_scheme": "static", "weight_block_size": None},
        "weight_scale_inv",
        None,
        "number",
    ),
    "compressed-tensors, tiles": (
        group("block", block_structure=[64, 32]),
        "weight_scale",
        (64, 32),
        "tiles",
    ),
    "compressed-tensors, rows": (group("channel"), "weight_scale", (1, 10**6), "column"),
    "compressed-tensors, one for all": (group("tensor"), "weight_scale", None, "list"),
}


def both(
    folder: Path,
    layout: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] = LLAMA,
    write: Any = write_model,
) -> tuple[Path, Path]:
    """The FP8 model, and the bfloat16 model that it stands for."""
    table, name, tile, shape = LAYOUTS[layout]
    coded, plain = {}, {}
    for tensor, weight in tensors.items():
        if any(word in tensor for word in KEPT):
            coded[tensor] = plain[tensor] = weight
            continue
        high, wide = tile or tuple(weight.shape)
        codes, scales = tiles(weight, high, wide)
        module = tensor.removesuffix(".weight")
        coded[tensor] = codes
        coded[f"{module}.{name}"] = scales.reshape(
            {"number": (), "list": (1,)}.get(shape, tuple(scales.shape))
        )
        if tile is None:
            coded[f"{module}.{'activation_scale' if shape == 'number' else 'input_scale'}"] = (
                torch.tensor(0.5)
            )
        plain[tensor] = decoded(codes, scales, high, wide)
    (folder / "coded").mkdir()
    (folder / "plain").mkdir()
    quantized = dict(config) | {"quantization_config": table}
    return write(folder / "coded/m", coded, quantized), write(
        folder / "plain/m", plain, dict(config)
    )


def same(first: Path, second: Path) -> None:
    tensors, expected = tensors_of(first), tensors_of(second)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name
    assert (first / "config.json").read_text() == (second / "config.json").read_text()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_multiplies_codes_with_scales_itself(tmp_path: Path, layout: str) -> None:
    coded, _ = both(tmp_path, layout, llama_tensors())
    checkpoint = resolve_source(open_checkpoint(coded))
    views = [entry for entry in checkpoint.entries.values() if isinstance(entry, View)]
    with Reader() as reader, Pretended():
        for view in views:
            first, last = view.shape[0] // 3, view.shape[0] - 1
            rows = view.rows(reader, first, last, torch.bfloat16, device=GPU)
            assert rows.device == GPU
            assert torch.equal(bare(rows), reader.rows(view, first, last))
    assert views


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_compressed_as_what_it_stands_for(tmp_path: Path, layout: str) -> None:
    toy = install_toy(tmp_path / "plugins")
    coded, plain = both(tmp_path, layout, llama_tensors())
    with plugins(toy):
        for source in (coded, plain):
            bitpress.compress(
                source, source.parent / "o", scheme="toy", ignore=["*.layers.0.mlp.*"]
            )
    same(coded.parent / "o", plain.parent / "o")
    assert command("verify", coded.parent / "o", "--against", coded, path=toy).returncode == 0
    assert command("verify", coded.parent / "o", "--against", plain, path=toy).returncode == 0


@pytest.mark.parametrize("layout", ["tiles of 128", "compressed-tensors, rows"])
def test_it_is_calibrated_and_judged_as_what_it_stands_for(tmp_path: Path, layout: str) -> None:
    learner = install_learner(tmp_path / "plugins")
    coded, plain = both(tmp_path, layout, llama_tensors(config=CONFIG), CONFIG, runnable_model)
    with plugins(learner):
        for source in (coded, plain):
            text = source.parent / "text.txt"
            bitpress.compress(
                source,
                source.parent / "o",
                scheme="learner",
                calibration=text,
                samples=3,
                sequence_length=32,
                # its scales are wide beside layers of 64 columns
                more_bits=True,
            )
        result = [
            evaluate(source, source.parent / "text.txt", max_tokens=300)
            for source in (coded, plain)
        ]
    same(coded.parent / "o", plain.parent / "o")
    assert result[0].perplexity == result[1].perplexity


LAYER = "model.layers.1.self_attn.q_proj"
WRONG = {
    "no scale": (
        lambda t: t.pop(f"{LAYER}.weight_scale_inv"),
        [f"{LAYER}.weight is in FP8", "weight_scale_inv"],
    ),
    "a scale of another shape": (
        lambda t: t.update({f"{LAYER}.weight_scale_inv": torch.ones(3, 5)}),
        [f"{LAYER}.weight_scale_inv is [3, 5]", "in no way"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_codes_without_a_scale_that_fits_are_refused_by_name(tmp_path: Path, case: str) -> None:
    harm, words = WRONG[case]
    coded, _ = both(tmp_path, "tiles of 128", llama_tensors())
    tensors = tensors_of(coded)
    harm(tensors)
    broken = write_model(
        tmp_path / "m", tensors, LLAMA | {"quantization_config": LAYOUTS["tiles of 128"][0]}
    )
    line = refusal("plan", broken, "--scheme", "toy", path=install_toy(tmp_path / "plugins"))
    assert all(word in line for word in words), line
