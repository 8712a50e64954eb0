"""The head is compressed where a rule names it, and left alone in any other case."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.forked import ForkedCommand, torchrun
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from transformers import AutoModelForCausalLM

import bitpress
from bitpress.checkpoint.engine_facts import QuantizedLayers, facts_of
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import Reader
from bitpress.compression import data_free
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import LLAMA, files_of, llama_tensors, tensors_of, write_model
from bitpress.schemes import stored_layout
from bitpress.schemes.values import Layer

UNTIED = CONFIG | {"tie_word_embeddings": False}
HEAD = "lm_head"


def untied_model(folder: Path, config: Mapping[str, Any] = UNTIED) -> Path:
    """A model whose head is not its embeddings."""
    tensors = llama_tensors(config=config)
    embeddings = tensors["model.embed_tokens.weight"]
    tensors[f"{HEAD}.weight"] = embeddings.flip(0).contiguous()
    return runnable_model(folder, tensors, config)


def groups_of(out: Path) -> list[list[str]]:
    table = json.loads((out / "config.json").read_text())[KEY]
    return [group["targets"] for group in table["config_groups"].values()]


def test_a_scheme_for_all_layers_leaves_the_head_alone(tmp_path: Path, with_toy: Path) -> None:
    model = untied_model(tmp_path / "m")
    bitpress.compress(model, tmp_path / "o", scheme="toy")
    before, after = tensors_of(model), tensors_of(tmp_path / "o")
    assert torch.equal(before[f"{HEAD}.weight"], after[f"{HEAD}.weight"])
    assert HEAD in json.loads((tmp_path / "o/config.json").read_text())[KEY]["ignore"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"scheme": "toy", "head": "toy"},
        {
            "recipe": {
                "layers": [
                    {"match": HEAD, "steps": ["toy"]},
                    {"match": "*", "steps": ["toy"]},
                ]
            }
        },
    ],
    ids=["an option", "a rule"],
)
def test_a_head_that_is_named_is_compressed(
    tmp_path: Path, with_toy: Path, arguments: dict[str, Any]
) -> None:
    model, out = untied_model(tmp_path / "m"), tmp_path / "o"
    bitpress.compress(model, out, **arguments)
    before, after = tensors_of(model)[f"{HEAD}.weight"].float(), tensors_of(out)
    restored = after[f"{HEAD}.weight"].float() * after[f"{HEAD}.weight_scale"]
    assert after[f"{HEAD}.weight"].dtype == torch.int8
    assert ((restored - before).abs() <= 0.501 * after[f"{HEAD}.weight_scale"]).all()
    assert groups_of(out) == [["Linear", HEAD]]
    assert HEAD not in json.loads((out / "config.json").read_text())[KEY]["ignore"]
    assert not bitpress.verify(out, against=model).faults
    bitpress.decompress(out, tmp_path / "back")
    assert torch.equal(tensors_of(tmp_path / "back")[f"{HEAD}.weight"], restored.bfloat16())


def test_a_head_of_another_format_has_a_group_of_its_own(tmp_path: Path, with_toy: Path) -> None:
    model, out = untied_model(tmp_path / "m"), tmp_path / "o"
    rules = [
        {"match": HEAD, "steps": ["toy"]},
        {"match": "*.mlp.*", "steps": [{"use": "toy", "levels": 7}]},
    ]
    bitpress.compress(model, out, recipe={"layers": rules})
    table = json.loads((out / "config.json").read_text())[KEY]
    for facts in facts_of(json.loads((out / "config.json").read_text())):
        reading = QuantizedLayers.read(facts, table)
        layer = facts.layer(HEAD)
        assert layer is not None
        assert reading.groups_of(layer) != [None], facts.engine


@pytest.mark.parametrize("others", [{}, {"ignore": [HEAD]}], ids=["no steps", "ignored"])
def test_a_rule_may_name_the_head_to_leave_it_alone(
    tmp_path: Path, with_toy: Path, others: dict[str, Any]
) -> None:
    model = untied_model(tmp_path / "m")
    steps = ["toy"] if others else []
    rules = [{"match": HEAD, "steps": steps}, {"match": "*", "steps": ["toy"]}]
    bitpress.compress(model, tmp_path / "o", recipe={"layers": rules, **others})
    before, after = tensors_of(model), tensors_of(tmp_path / "o")
    assert torch.equal(before[f"{HEAD}.weight"], after[f"{HEAD}.weight"])
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_layers_are_calibrated_and_the_head_is_not(tmp_path: Path, with_toy: Path) -> None:
    install_learner(with_toy)
    model, out = untied_model(tmp_path / "m"), tmp_path / "o"
    with plugins(with_toy):
        bitpress.compress(
            model,
            out,
            scheme="learner",
            head="toy",
            calibration=tmp_path / "text.txt",
            samples=16,
            sequence_length=64,
        )
        assert not bitpress.verify(out, against=model).faults
        check = bitpress.eval(out, text=tmp_path / "text.txt", against=model, max_tokens=640)
    assert tensors_of(out)[f"{HEAD}.weight"].dtype == torch.int8
    assert check.kl is not None
    assert 0 < check.kl < 0.1


def test_eval_rounds_the_inputs_of_a_head_as_its_scheme_says(tmp_path: Path) -> None:
    folder = install_learner(tmp_path / "plugins")
    model, out = untied_model(tmp_path / "m"), tmp_path / "o"
    # a scheme that rounds inputs to multiples of 2, and needs no data
    (module,) = folder.rglob("bitpress_scheme_learner.py")
    text = module.read_text().replace(
        "def rescales(self)",
        "def calibrated(self): return False\n\n    @property\n    def rescales(self)",
    )
    module.write_text(text)
    rules = [{"match": HEAD, "steps": [{"use": "learner", "coarse": 2.0}]}]
    with plugins(folder):
        bitpress.compress(model, out, recipe={"layers": rules})
        check = bitpress.eval(
            out, text=tmp_path / "text.txt", against=model, sequence_length=48, max_tokens=960
        )
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    words = (tmp_path / "text.txt").read_text().split()[:960]
    ids = torch.tensor([int(word[1:]) for word in words]).view(20, 48)
    with torch.no_grad():
        log_p = source(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        tensors = tensors_of(out)
        source.lm_head.weight.data = (
            tensors[f"{HEAD}.weight"].float() * tensors[f"{HEAD}.weight_scale"]
        )
        source.lm_head.register_forward_pre_hook(lambda module, x: ((x[0] / 2).round() * 2,))
        log_q = source(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1].mean().item()
    assert check.kl == pytest.approx(expected, rel=1e-2)


def test_eval_tells_a_compressed_head_from_one_of_float32(tmp_path: Path, with_toy: Path) -> None:
    tensors = {name: x.float() for name, x in llama_tensors(config=UNTIED).items()}
    model, out = runnable_model(tmp_path / "m", tensors, UNTIED), tmp_path / "o"
    bitpress.compress(model, out, recipe={"layers": [{"match": HEAD, "steps": ["toy"]}]})
    text = tmp_path / "text.txt"
    check = bitpress.eval(out, text=text, against=model, sequence_length=48, max_tokens=960)
    assert check.kl is not None
    assert 0 < check.kl < 0.01
    assert check.drift == (0.0,) * UNTIED["num_hidden_layers"]


def test_plan_says_what_a_head_takes_that_could_be_compressed(
    tmp_path: Path, with_toy: Path
) -> None:
    model = untied_model(tmp_path / "m")
    words = ["plan", model, "--scheme", "toy"]
    # 96 words of 128 channels in bfloat16
    offer = "outside 0.02 MB of head stay as they are: --head NAME compresses them"
    assert offer in command(*words, path=with_toy).stdout
    assert "--head NAME" not in command(*words, "--head", "toy", path=with_toy).stdout


def test_a_head_that_is_tied_is_refused(tmp_path: Path, with_toy: Path) -> None:
    tied = LLAMA | {"tie_word_embeddings": True}
    stored = {name: x for name, x in llama_tensors().items() if not name.startswith(HEAD)}
    plain = write_model(tmp_path / "plain", stored, tied)
    line = refusal("plan", plain, "--scheme", "toy", "--head", "toy", path=with_toy)
    assert "stores no head, which is tied to the embeddings" in line
    both = untied_model(tmp_path / "both", UNTIED | {"tie_word_embeddings": True})
    line = refusal("plan", both, "--scheme", "toy", "--head", "toy", path=with_toy)
    assert "lm_head cannot be compressed: the head is tied to the embeddings" in line


def test_a_head_that_an_engine_does_not_look_for_is_refused(tmp_path: Path, with_toy: Path) -> None:
    # vLLM's class passes no name on to it
    config = UNTIED | {"architectures": ["AfmoeForCausalLM"], "model_type": "afmoe"}
    model = untied_model(tmp_path / "m", config)
    line = refusal("plan", model, "--scheme", "toy", "--head", "toy", path=with_toy)
    assert "lm_head cannot be compressed: vLLM" in line


SAMPLES, LENGTH = 96, 48


def fit_head(model: Path, out: Path, *settings: str, blocks: str = "learner") -> Path:
    """Compress with a head that is fitted to the text beside the model."""
    bitpress.compress(
        model,
        out,
        recipe={
            "layers": [{"match": HEAD, "steps": ["learner"]}, {"match": "*", "steps": [blocks]}]
        },
        settings=[f"learner.{setting}" for setting in settings],
        calibration=model.parent / "text.txt",
        samples=SAMPLES,
        sequence_length=LENGTH,
    )
    return out


def head_inputs(model: Path, out: Path) -> torch.Tensor:
    """What transformers gives the head of a model (tokens, in), with an output's blocks."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    stored = tensors_of(out)
    of_blocks = [name for name in stored if name.endswith("_proj.weight_scale")]
    for name in of_blocks:
        weight = stored[name.removesuffix("_scale")].float() * stored[name]
        module.get_submodule(name.removesuffix(".weight_scale")).weight.data = weight
    words = (model.parent / "text.txt").read_text().split()[: SAMPLES * LENGTH]
    ids = torch.tensor([int(word[1:]) for word in words]).view(SAMPLES, LENGTH)
    with torch.no_grad():
        return module.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)


@pytest.mark.parametrize(
    ("blocks", "num_blocks"),
    [("learner", 3), ("toy", 3), ("learner", 1)],
    ids=["fitted too", "rounded without data", "one alone"],
)
def test_a_head_is_fitted_to_what_the_compressed_blocks_make(
    tmp_path: Path, with_toy: Path, forwards_in_float32: None, blocks: str, num_blocks: int
) -> None:
    install_learner(with_toy)
    model = untied_model(tmp_path / "m", UNTIED | {"num_hidden_layers": num_blocks})
    with plugins(with_toy):
        out = fit_head(model, tmp_path / "o", "bits=4", blocks=blocks)
        assert not bitpress.verify(out, against=model).faults
    stored, x = tensors_of(out), head_inputs(model, out)
    torch.testing.assert_close(stored[f"{HEAD}.seen"][0], x.sum(0), rtol=1e-4, atol=1e-2)


def test_ranks_fit_a_head_together_to_what_all_of_them_see(tmp_path: Path, with_toy: Path) -> None:
    install_learner(with_toy)
    model, out = untied_model(tmp_path / "m"), tmp_path / "o"
    words = ["compress", model, out, "--scheme", "toy", "--head", "learner", "--threads", "1"]
    words += ["--samples", SAMPLES, "--sequence-length", LENGTH]
    words += ["--calibration", tmp_path / "text.txt", "--set", "learner.bits=4"]
    completed = torchrun(2, *words, path=with_toy)
    assert completed.returncode == 0, completed.stderr
    with plugins(with_toy):
        assert not bitpress.verify(out, against=model).faults
    stored, x = tensors_of(out), head_inputs(model, out)
    # ranks run blocks in bfloat16
    assert_close = torch.testing.assert_close
    assert_close(stored[f"{HEAD}.seen"][0] / len(x), x.mean(0), rtol=0.01, atol=0.01)


def test_a_fitted_head_loses_less_than_a_rounded_one(tmp_path: Path, with_toy: Path) -> None:
    install_learner(with_toy)
    model = untied_model(tmp_path / "m")
    with plugins(with_toy):
        out = fit_head(model, tmp_path / "o", "bits=4", blocks="toy")
    weight, stored = tensors_of(model)[f"{HEAD}.weight"].float(), tensors_of(out)
    # to nearest, each row with a scale by which its largest weight is 7
    scale = weight.abs().amax(1, keepdim=True) / 7
    rounded = (weight / scale).round() * scale
    fitted = stored[f"{HEAD}.weight"].float() * stored[f"{HEAD}.weight_scale"]
    x = head_inputs(model, out)
    errors = [float((x @ (head - weight).T).norm()) for head in (fitted, rounded)]
    assert errors[0] < 0.8 * errors[1], errors


def test_a_fitted_head_does_not_depend_on_its_row_tiles(
    tmp_path: Path, with_toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_learner(with_toy)
    model = untied_model(tmp_path / "m")
    with plugins(with_toy):
        whole = fit_head(model, tmp_path / "whole")
        monkeypatch.setattr(stored_layout, "FITTED_TILE_WEIGHTS", 32 * 128)
        tiled = fit_head(model, tmp_path / "tiled")
    files, others = (
        {n: x for n, x in files_of(out).items() if n.endswith(".safetensors")}
        for out in (whole, tiled)
    )
    assert files == others


def test_without_statistics_row_tiles_are_small_whatever_the_steps(
    tmp_path: Path, with_toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_learner(with_toy)
    model = untied_model(tmp_path / "m")
    monkeypatch.setattr(stored_layout, "WEIGHTS_PER_TILE", 32 * 128)
    heights = []

    def read(*arguments: Any) -> Layer:
        layer = read_tile(*arguments)
        heights.append(len(layer.weight))
        return layer

    read_tile = data_free._read_tile
    monkeypatch.setattr(data_free, "_read_tile", read)
    with plugins(with_toy), Reader() as reader:
        plan = bitpress.plan(model, scheme="learner", head="learner")
        (head,) = (stack for stack in plan.stacks if stack.is_head)
        list(data_free.compress_stack(head, reader, torch.device("cpu")))
    assert set(heights) == {32}


def test_a_run_that_is_killed_at_the_head_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    learner = install_learner(tmp_path / "plugins")
    model = untied_model(tmp_path / "m")
    # four groups in each of three blocks are decided before the head
    deadly = tmp_path / "kill.13"
    words = ["compress", model, tmp_path / "o", "--scheme", "learner", "--head", "learner"]
    words += ["--samples", "16", "--sequence-length", "64", "--set", f"deadly={deadly}"]
    words += ["--calibration", tmp_path / "text.txt"]
    first = ForkedCommand(*words, path=learner)
    assert first.wait(timeout=120) == -signal.SIGKILL
    # what lies outside, and three blocks
    assert len(list((tmp_path / "o").glob("*.safetensors"))) == 4
    assert ForkedCommand(*words, path=learner).wait(timeout=120) == 0
    deadly.write_text("x" * 100)
    words[2] = tmp_path / "whole"
    assert ForkedCommand(*words, path=learner).wait(timeout=120) == 0
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")


def test_embeddings_are_refused_a_scheme_that_needs_data(tmp_path: Path) -> None:
    folder = install_learner(tmp_path / "plugins")
    model = untied_model(tmp_path / "m")
    line = refusal("plan", model, "--scheme", "learner", "--embeddings", "learner", path=folder)
    assert "model.embed_tokens is compressed without data, and learner needs data" in line


def test_two_schemes_are_refused_for_a_head_that_is_fitted(tmp_path: Path, with_toy: Path) -> None:
    install_learner(with_toy)
    model = untied_model(tmp_path / "m")
    line = refusal("plan", model, "--scheme", "toy", "--head", "toy+learner", path=with_toy)
    assert "lm_head can be fitted to data by one scheme alone, and not by toy+learner" in line
