"""Bad input is one clear line with exit code 2, and nothing is left behind that looks finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bitpress.conformance.commands import refusal
from bitpress.conformance.models import LLAMA, files_of, llama_tensors, write_model

LAYER = "model.layers.1.mlp.up_proj.weight"


def compress_refused(
    model: Path, toy: Path, *words: str, arguments: tuple[object, ...] = ("--scheme", "toy")
) -> None:
    """Law of this file: refused with all words in the line, and no output folder is made."""
    out = model.parent / "out"
    line = refusal("compress", model, out, *arguments, path=toy)
    for word in words:
        assert word in line, line
    assert not out.exists()


# --- the model folder
# ----------------------------------------------------------------------


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def config_is_a_list(model: Path) -> None:
    (model / "config.json").write_text("[]")


def config_is_cut_short(model: Path) -> None:
    (model / "config.json").write_text('{"hidden_size": ')


def config_is_not_text(model: Path) -> None:
    (model / "config.json").write_bytes(b"\xff\xfe\x00")


def config_is_quantized(model: Path) -> None:
    (model / "config.json").write_text(
        json.dumps({**LLAMA, "quantization_config": {"quant_method": "gptq"}})
    )


def weights_are_fp8(model: Path) -> None:
    tensors = llama_tensors()
    save_file(
        {**tensors, LAYER: tensors[LAYER].to(torch.float8_e4m3fn)}, model / "model.safetensors"
    )


def weights_are_pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(llama_tensors(), model / "pytorch_model.bin")


def weights_are_cut_short(model: Path) -> None:
    os.truncate(model / "model.safetensors", 400_000)


def nothing_but_a_config(model: Path) -> None:
    (model / "model.safetensors").unlink()


def everything_is_gone(model: Path) -> None:
    shutil.rmtree(model)


def it_is_a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("model")


def two_files_and_no_index(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "a.safetensors")
    (model / "model.safetensors").rename(model / "b.safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (everything_is_gone, ["model is not a folder", "name one with config.json"]),
        (it_is_a_file, ["model is not a folder", "name one with config.json"]),
        (no_config, ["not a model folder", "config.json"]),
        (config_is_a_list, ["config.json", "an object is expected"]),
        (config_is_cut_short, ["config.json", "not valid JSON"]),
        (config_is_not_text, ["config.json", "not valid JSON"]),
        (config_is_quantized, ["already quantized (gptq)", "start from the original"]),
        (weights_are_fp8, [LAYER, "F8_E4M3", "already quantized"]),
        (weights_are_pickled, ["pytorch_model.bin", "from_pretrained", "save_pretrained"]),
        (
            weights_are_cut_short,
            ["model.safetensors", "400000 bytes", "cut short", "fetch it again"],
        ),
        (nothing_but_a_config, ["no safetensors files"]),
        (two_files_and_no_index, ["2 safetensors files", "model.safetensors.index.json"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_model_folder_is_refused(
    tmp_path: Path, toy: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    model = write_model(tmp_path / "model")
    damage(model)
    compress_refused(model, toy, *words)


SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("../elsewhere.safetensors", ["'../elsewhere.safetensors'", "not a file of this folder"]),
        ("/etc/passwd", ["'/etc/passwd'", "not a file of this folder"]),
        ("model-00009-of-00003.safetensors", ["model-00009-of-00003.safetensors", "missing"]),
        (SECOND, [LAYER, SECOND, "not there"]),
        (17, ["17", "not a file of this folder"]),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    tmp_path: Path, toy: Path, file: object, words: list[str]
) -> None:
    model = write_model(tmp_path / "model", shards=3)
    shutil.copy(model / SECOND, tmp_path / "elsewhere.safetensors")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert index["weight_map"][LAYER] != SECOND
    index["weight_map"][LAYER] = file
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    compress_refused(model, toy, *words)


def test_a_missing_shard_is_named(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "model", shards=3)
    (model / SECOND).unlink()
    compress_refused(model, toy, SECOND, "missing")


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_number_that_is_not_finite_is_named_with_its_place(
    tmp_path: Path, toy: Path, number: float
) -> None:
    tensors = llama_tensors()
    tensors[LAYER][3, 5] = number
    line = refusal(
        "compress",
        write_model(tmp_path / "model", tensors),
        tmp_path / "out",
        "--scheme",
        "toy",
        path=toy,
    )
    assert f"tensor {LAYER} has {number} at row 3, column 5" in line
    assert files_of(tmp_path / "out") == {}


# --- what is asked for
# ----------------------------------------------------------------------

RECIPE = '[[layers]]\nmatch = "*"\nsteps = ["toy"]\n'


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "fp8"], ["scheme 'fp8' is not installed", "pip install"]),
        (
            ["--scheme", "fp9"],
            ["scheme 'fp9' is not installed", "(installed: toy)"],
        ),
        (["--scheme", "tou"], ["scheme 'tou' is not installed", "did you mean 'toy'"]),
        (["--scheme", "toy+toy"], ["toy cannot follow a step that stores codes"]),
        (["--scheme", "toy", "--set", "level=3"], ["no option 'level'", "did you mean 'levels'"]),
        (["--scheme", "toy", "--set", "levels=many"], ["levels", "'many'", "whole number"]),
        (["--scheme", "toy", "--set", "levels"], ["--set levels", "OPTION=VALUE"]),
        (["--scheme", "toy", "--set", "fp8.weights=x"], ["'fp8' is not used here"]),
        (
            ["--scheme", "toy", "--set", "multiple=96"],
            ["is not a multiple of 96; try multiple=1", "--ignore '*."],
        ),
        (
            ["--scheme", "toy", "--set", "multiple=256"],
            ["width 128 is not a multiple of 256", "--ignore '*."],
        ),
        (
            ["--scheme", "toy", "--ignore", "zzz*"],
            ["'zzz*' matches none of the 14", "like 'model.layers.0.mlp.down_proj'"],
        ),
        (
            ["--scheme", "toy", "--ignore", "*.up_prog"],
            ["'*.up_prog' matches none of the 14", "did you mean '*.up_proj'?"],
        ),
        (["--scheme", "toy", "--ignore", "*.mpl.*"], ["did you mean '*.mlp.*'?"]),
        (["--scheme", "toy", "--ignore", "model.layer.*"], ["did you mean 'model.layers.*'?"]),
        (
            ["--scheme", "toy", "--ignore", "model.layers.1.mlp.up"],
            ["did you mean 'model.layers.1.mlp.up_proj'?"],
        ),
        (["--scheme", "toy", "--ignore", "*"], ["leaves every layer alone"]),
        (["--scheme", "toy", "--recipe", "r.toml"], ["either a scheme or a recipe"]),
        ([], ["either a scheme or a recipe"]),
        (["--recipe", "missing.toml"], ["missing.toml", "No such file"]),
        (["--scheme", "toy", "--device", "gpu"], ["--device gpu", "cuda:N"]),
        (["--scheme", "toy", "--max-memory", "1MB"], ["needs about", "1 MB allowed"]),
        (["--scheme", "toy", "--max-memory", "much"], ["--max-memory much", "4GB"]),
        (["--scheme", "toy", "--threads", "0"], ["--threads"]),
        (["--shceme", "toy"], ["--shceme"]),
    ],
    ids=lambda value: (
        " ".join(value)
        if isinstance(value, list) and (not value or value[0].startswith("--"))
        else ""
    ),
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, toy: Path, arguments: list[str], words: list[str]
) -> None:
    compress_refused(write_model(tmp_path / "model"), toy, *words, arguments=tuple(arguments))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers = [", ["not valid TOML"]),
        ("", ["at least one [[layers]]"]),
        (RECIPE.replace("match", "macth"), ["number 1", "`match`"]),
        (RECIPE.replace('"*"', "[]"), ["number 1", "`match`"]),
        (RECIPE.replace('"*"', '["*", 3]'), ["number 1", "`match`"]),
        (
            RECIPE.replace('"*"', '["*", "*.up_prog"]'),
            ["'*.up_prog' matches none", "did you mean '*.up_proj'?"],
        ),
        (RECIPE + "ignored = []\n", ["unknown key 'ignored'"]),
        (RECIPE.replace('["toy"]', '"toy"'), ["number 1", "`steps`"]),
        (RECIPE.replace('["toy"]', "[3]"), ["a step is a scheme's name", "3"]),
        (
            RECIPE.replace('["toy"]', '[{ use = "toy", levles = 3 }]'),
            ["no option 'levles'", "did you mean 'levels'"],
        ),
        (
            RECIPE.replace('"*"', '"*.up_prog"'),
            ["'*.up_prog' matches none", "did you mean '*.up_proj'?"],
        ),
        (
            RECIPE.replace('"*"', '"*.q_proj"'),
            ["q_proj", "k_proj", "are one layer in serving engines"],
        ),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_is_refused(
    tmp_path: Path, toy: Path, text: str, words: list[str]
) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    model = write_model(tmp_path / "model")
    compress_refused(model, toy, *words, arguments=("--recipe", tmp_path / "recipe.toml"))
