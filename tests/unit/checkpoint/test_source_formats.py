"""A source format is a plugin: it claims a model by its config, and the model is then read as what
it stands for.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fixtures.toy_scheme import install_toy
from fixtures.toy_source import TOY_SOURCE, install_toy_source
from torch import Tensor

import bitpress
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.checkpoint.source import resolve_source
from bitpress.conformance.commands import plugins, refusal
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model

QUANTIZED = {**LLAMA, "quantization_config": {"quant_method": "toy"}}


def is_coded(name: str, tensor: Tensor) -> bool:
    return ".layers." in name and tensor.ndim == 2


def coded_tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors in the toy format, and those that they stand for."""
    stored, plain = {}, {}
    for name, tensor in llama_tensors().items():
        if not is_coded(name, tensor):
            stored[name] = plain[name] = tensor
            continue
        # powers of two: in bfloat16 the model is the same
        steps = (tensor.float().abs().amax(1, keepdim=True) / 127).log2().ceil().exp2()
        codes = (tensor.float() / steps).round().char()
        module = name.removesuffix(".weight")
        stored |= {f"{module}.codes": codes, f"{module}.steps": steps}
        plain[name] = (codes * steps).bfloat16()
    return stored, plain


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model in the toy format, and the model that it stands for."""
    stored, plain = coded_tensors()
    return write_model(tmp_path / "coded", stored, QUANTIZED), write_model(
        tmp_path / "plain", plain
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The toy scheme and the toy source format."""
    return install_toy_source(install_toy(tmp_path / "plugins"))


def test_it_is_compressed_as_what_it_stands_for(
    tmp_path: Path, models: tuple[Path, Path], installed: Path
) -> None:
    with plugins(installed):
        for model in models:
            out = tmp_path / f"{model.name}-out"
            bitpress.compress(model, out, scheme="toy", ignore=["*.layers.0.mlp.*"])
        assert not bitpress.verify(tmp_path / "coded-out", models[1]).faults
        assert not bitpress.verify(tmp_path / "plain-out", models[0]).faults
    first, second = (tensors_of(tmp_path / f"{model.name}-out") for model in models)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("pieces", [1, 7, 1 << 22])
def test_rows_do_not_depend_on_how_many_are_dequantized_together(
    models: tuple[Path, Path], installed: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr("bitpress.checkpoint.dequantized_source.NUMBERS_PER_PIECE", pieces)
    plain = tensors_of(models[1])
    with plugins(installed), Reader() as reader:
        source = resolve_source(open_checkpoint(models[0]))
        for name, tensor in plain.items():
            assert torch.equal(reader.whole(source.entries[name]), tensor.float()), name
            rows = reader.rows(source.entries[name], 3, 17)
            assert torch.equal(rows, tensor[3:17].float()), name


def test_tensors_get_their_names_in_the_model(tmp_path: Path, installed: Path) -> None:
    stored, plain = coded_tensors()
    renamed = {f"own.{name}" if "norm" in name else name: tensor for name, tensor in stored.items()}
    model = write_model(tmp_path / "m", renamed, QUANTIZED)
    with plugins(installed):
        assert resolve_source(open_checkpoint(model)).entries.keys() == plain.keys()


def test_files_that_describe_the_format_stay_behind(
    tmp_path: Path, models: tuple[Path, Path], installed: Path
) -> None:
    (models[0] / "toy.json").write_text("{}")
    (models[0] / "LICENSE").write_text("free")
    with plugins(installed):
        bitpress.compress(models[0], tmp_path / "out", scheme="toy", copy=["toy.json"])
    assert not (tmp_path / "out/toy.json").exists()
    assert (tmp_path / "out/LICENSE").exists()


def test_a_run_does_not_resume_what_another_version_of_the_format_has_read(
    models: tuple[Path, Path], installed: Path
) -> None:
    with plugins(installed):
        before = [bitpress.plan(model, scheme="toy").digest for model in models]
    (metadata,) = installed.glob("bitpress_source_toy-*/METADATA")
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    with plugins(installed):
        after = [bitpress.plan(model, scheme="toy").digest for model in models]
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_without_a_package_that_reads_it_the_refusal_names_one(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    line = refusal("plan", models[0], "--scheme", "toy", path=install_toy(tmp_path / "plugins"))
    assert "is already quantized (toy)" in line
    assert "pip install bitpress-sources" in line


BROKEN = {
    "it cannot be imported": ("import nothing_of_that_name", "nothing_of_that_name"),
    "it has another hook": (
        TOY_SOURCE.replace("def find_quantized_weights(config, ", "def find_weights(config, "),
        "find_weights",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_format_is_named_and_does_not_stop_others(
    tmp_path: Path, models: tuple[Path, Path], case: str
) -> None:
    module, word = BROKEN[case]
    path = install_toy_source(install_toy(tmp_path / "plugins"), module)
    line = refusal("plan", models[0], "--scheme", "toy", path=path)
    assert "toy of bitpress-source-toy is broken" in line
    assert word in line
    plain = models[1]
    with plugins(path):
        bitpress.compress(plain, tmp_path / "out", scheme="toy")


FAILING = {
    "it raises": (
        TOY_SOURCE.replace("    modules = ", "    1 / 0\n    modules = "),
        "ZeroDivisionError",
    ),
    "it returns something else": (
        TOY_SOURCE.replace("return QuantizedSource", "return 'codes' or QuantizedSource"),
        "not a QuantizedSource",
    ),
    "it names a tensor that is not stored": (
        TOY_SOURCE.replace('f"{module}.{name}", 1', 'f"{module}.{name}s", 1'),
        "which is missing",
    ),
}


WRONG_WEIGHTS = {
    "decode raises": (TOY_SOURCE.replace('parts["steps"])', 'parts["none"])'), "KeyError"),
    "decode gives other rows": (
        TOY_SOURCE.replace('parts["codes"], parts["steps"])', 'parts["codes"].T, parts["steps"])'),
        "and not [",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_weights_that_a_format_makes_wrongly_are_named(
    tmp_path: Path, models: tuple[Path, Path], case: str
) -> None:
    module, word = WRONG_WEIGHTS[case]
    path = install_toy_source(install_toy(tmp_path / "plugins"), module)
    line = refusal("compress", models[0], tmp_path / "out", "--scheme", "toy", "-q", path=path)
    assert word in line
    assert "the source format of model.layers." in line


@pytest.mark.parametrize("case", FAILING)
def test_a_format_that_fails_on_a_model_gives_one_line(
    tmp_path: Path, models: tuple[Path, Path], case: str
) -> None:
    module, word = FAILING[case]
    path = install_toy_source(install_toy(tmp_path / "plugins"), module)
    assert word in refusal("plan", models[0], "--scheme", "toy", path=path)


def test_the_config_of_the_output_says_nothing_of_the_format(
    tmp_path: Path, models: tuple[Path, Path], installed: Path
) -> None:
    with plugins(installed):
        bitpress.compress(models[0], tmp_path / "out", scheme="toy")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
