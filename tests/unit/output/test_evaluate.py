"""Perplexity, KL divergence and agreement are what the whole models give, whatever is in memory at
a time.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.learner_scheme import CONFIG, runnable_model
from transformers import AutoModelForCausalLM

import bitpress
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import llama_tensors, write_model
from bitpress.modeling import metrics
from bitpress.runtime import memory

LENGTH, TOKENS = 48, 48 * 20


def text_ids(source: Path) -> torch.Tensor:
    words = (source.parent / "text.txt").read_text().split()[: TOKENS + 1]
    return torch.tensor([int(word[1:]) for word in words])


def log_probabilities(model: Path, ids: torch.Tensor) -> torch.Tensor:
    """(tokens, vocabulary) float64, of the whole model at once."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return (
            whole(input_ids=ids[:-1].view(-1, LENGTH), use_cache=False)
            .logits.flatten(0, 1)
            .double()
            .log_softmax(-1)
        )


def figures(model: Path, against: Path, ids: torch.Tensor) -> dict[str, float]:
    """The figures by their definitions."""
    q, p = log_probabilities(model, ids), log_probabilities(against, ids)
    nll, nll_p = (-(x.gather(1, ids[1:, None])).mean().item() for x in (q, p))
    return {
        "perplexity": math.exp(nll),
        "source_perplexity": math.exp(nll_p),
        "rise": nll - nll_p,
        "kl": (p.exp() * (p - q)).sum(1).mean().item(),
        "top1": (p.argmax(1) == q.argmax(1)).double().mean().item(),
    }


def run(model: Path, against: Path | None, **options: Any) -> Any:
    text = model.parent / "text.txt"
    return bitpress.eval(
        model, text, against, sequence_length=LENGTH, max_tokens=TOKENS, threads=1, **options
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return runnable_model(tmp_path / "model")


@pytest.fixture
def other(tmp_path: Path, model: Path) -> Path:
    """The same with slightly other blocks."""
    tensors = {
        name: tensor
        if "layers" not in name
        else tensor + 0.02 * torch.randn(tensor.shape).bfloat16()
        for name, tensor in llama_tensors(config=CONFIG).items()
    }
    return write_like(model, tmp_path / "other", tensors, CONFIG)


def write_like(
    model: Path, folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> Path:
    write_model(folder, tensors, config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    return folder


def test_one_model_s_perplexity_is_that_of_the_whole_model(model: Path) -> None:
    result = run(model, None)
    assert result.perplexity == pytest.approx(
        figures(model, model, text_ids(model))["perplexity"], rel=1e-5
    )
    assert (result.tokens, result.sequence_length, result.text) == (TOKENS, LENGTH, "text.txt")
    assert (result.kl, result.top1, result.rise, result.drift) == (None, None, None, ())


def test_two_models_are_compared_token_by_token(model: Path, other: Path) -> None:
    result, expected = run(other, model), figures(other, model, text_ids(model))
    assert expected["kl"] > 1e-3
    assert 0 < expected["top1"] < 1
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-4), name
    assert len(result.drift) == CONFIG["num_hidden_layers"]
    assert list(result.drift) == sorted(result.drift)
    assert result.drift[0] > 0


def test_a_model_is_its_own_equal(model: Path) -> None:
    result = run(model, model)
    assert (result.kl, result.rise, result.top1, set(result.drift)) == (0, 0, 1, {0})


def test_a_tied_head_computes_with_the_embeddings(tmp_path: Path) -> None:
    model = runnable_model(tmp_path / "model", config=CONFIG | {"tie_word_embeddings": True})
    assert run(model, None).perplexity == pytest.approx(
        figures(model, model, text_ids(model))["perplexity"], rel=1e-5
    )


def test_models_with_unlike_heads_are_compared_too(model: Path, tmp_path: Path) -> None:
    tensors = llama_tensors(config=CONFIG)
    tensors["lm_head.weight"] *= 1.25
    other = write_like(model, tmp_path / "other", tensors, CONFIG)
    result, expected = run(other, model), figures(other, model, text_ids(model))
    assert result.kl == pytest.approx(expected["kl"], rel=1e-4)
    assert set(result.drift) == {0}


@pytest.mark.parametrize(
    "logits", [1, 96 * 7, 1 << 30], ids=["a token", "seven tokens", "all tokens"]
)
@pytest.mark.parametrize("spilled", [False, True], ids=["in memory", "on disk"])
def test_the_figures_do_not_depend_on_how_much_is_held(
    model: Path, other: Path, monkeypatch: pytest.MonkeyPatch, logits: int, spilled: bool
) -> None:
    whole = run(other, model)
    monkeypatch.setattr(metrics, "MAX_LOGITS", logits)
    monkeypatch.setattr(memory, "available_bytes", lambda: 0 if spilled else 1 << 40)
    result = run(other, model)
    for name in ("perplexity", "source_perplexity", "kl", "top1"):
        assert getattr(result, name) == pytest.approx(getattr(whole, name), rel=1e-5), name


def test_an_output_is_run_with_its_restored_weights(model: Path, toy: Path, tmp_path: Path) -> None:
    with plugins(toy):
        bitpress.compress(model, tmp_path / "out", scheme="toy", settings=["levels=7"])
        bitpress.decompress(tmp_path / "out", tmp_path / "dense")
        result, dense = run(tmp_path / "out", model), run(tmp_path / "dense", model)
    # decompressed weights are rounded to bfloat16
    assert result.kl == pytest.approx(dense.kl, rel=0.02)
    assert result.kl > 1e-4


def test_a_scheme_that_rounds_activations_must_say_how(
    model: Path, toy: Path, tmp_path: Path
) -> None:
    module = toy / "bitpress_scheme_toy.py"
    module.write_text(
        module.read_text().replace(
            '"weights": weights}', '"weights": weights, "input_activations": {"num_bits": 8}}'
        )
    )
    with plugins(toy):
        bitpress.compress(model, tmp_path / "out", scheme="toy")
    message = refusal("eval", tmp_path / "out", "--text", model.parent / "text.txt", path=toy)
    assert "scheme toy (bitpress-scheme-toy 1.0): it has no `quantize_activations` hook" in message
    module.write_text(
        module.read_text() + "\n@hookimpl\ndef quantize_activations(inputs): return inputs * 0\n"
    )
    with plugins(toy):
        result = run(tmp_path / "out", model)
    # blocks add nothing but what they were given
    assert result.drift[-1] > 0.3


def test_the_command_prints_figures_for_people_and_for_scripts(model: Path, other: Path) -> None:
    words = [
        "eval",
        other,
        "--text",
        model.parent / "text.txt",
        "--against",
        model,
        "--sequence-length",
        LENGTH,
        "--threads",
        1,
    ]
    words += ["--max-tokens", TOKENS]
    done = command(*words)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(command(*words, "--json").stdout)
    assert {
        "model",
        "against",
        "perplexity",
        "source_perplexity",
        "rise",
        "kl",
        "top1",
        "tokens",
        "sequence_length",
    } <= set(document)
    for shown in (
        f"{document['perplexity']:.4f}",
        f"{document['kl']:.6f} nats per token",
        f"{document['top1']:.3%}",
        "960 tokens of text",
    ):
        assert shown in done.stdout


def test_what_cannot_be_evaluated_is_told_in_one_line(
    model: Path, tmp_path: Path, toy: Path
) -> None:
    text = model.parent / "text.txt"
    assert "no such file" in refusal("eval", model, "--text", tmp_path / "nothing.txt")
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    assert "it gives 3 tokens, too few" in refusal("eval", model, "--text", tmp_path / "short.txt")
    assert "both are at least 1" in refusal("eval", model, "--text", text, "--max-tokens", 0)
    assert "more than the 10 MB allowed" in refusal(
        "eval", model, "--text", text, "--max-memory", "10MB"
    )
    foreign = write_like(
        model,
        tmp_path / "foreign",
        llama_tensors(config=CONFIG),
        CONFIG | {"quantization_config": {"quant_method": "awq"}},
    )
    assert "is already quantized (awq)" in refusal("eval", foreign, "--text", text)
    shallow = CONFIG | {"num_hidden_layers": 2}
    assert "number of blocks" in refusal(
        "eval",
        write_like(model, tmp_path / "shallow", llama_tensors(config=shallow), shallow),
        "--text",
        text,
        "--against",
        model,
    )
    wide = CONFIG | {"vocab_size": 128}
    assert "vocabularies of unlike size" in refusal(
        "eval",
        write_like(model, tmp_path / "wide", llama_tensors(config=wide), wide),
        "--text",
        text,
        "--against",
        model,
        # it runs the blocks, and a slow run says how far it is
        "--quiet",
    )


CHECK = ["--scheme", "toy", "--set", "levels=7", "--threads", 1]


def test_a_run_is_checked_in_the_same_breath(model: Path, toy: Path, tmp_path: Path) -> None:
    text, out = model.parent / "text.txt", tmp_path / "out"
    done = command("compress", model, out, *CHECK, "--check", text, path=toy)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(
        command(
            "eval", out, "--text", text, "--against", model, "--threads", "1", "--json", path=toy
        ).stdout
    )
    check = json.loads((out / "bitpress.json").read_text())["check"]
    assert check["kl"] > 1e-4
    assert check == {name: document[name] for name in check}
    assert f"KL divergence {check['kl']:.6f} nats per token" in done.stdout
    assert command("verify", out, "--against", model, path=toy).returncode == 0
    assert json.loads(command("inspect", out, "--json").stdout)["check"] == check


def test_a_result_that_is_too_far_from_its_source_does_not_look_finished(
    model: Path, toy: Path, tmp_path: Path
) -> None:
    text, out = model.parent / "text.txt", tmp_path / "out"
    done = command(
        "compress", model, out, *CHECK, "--check", text, "--max-kl", "1e-6", "--json", path=toy
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "nats per token, more than --max-kl 1e-06; config.json is not written" in done.stderr
    assert not {"config.json", "bitpress.json"} & {file.name for file in out.iterdir()}
    shard = (out / "model.safetensors").stat()
    again = command("compress", model, out, *CHECK, "--check", text, "--max-kl", "1", path=toy)
    assert again.returncode == 0
    # taken up, not made anew
    assert (out / "model.safetensors").stat().st_mtime_ns == shard.st_mtime_ns
    assert command("verify", out, path=toy).returncode == 0


def test_what_a_check_cannot_do_is_refused_before_the_work(
    model: Path, toy: Path, tmp_path: Path
) -> None:
    text, out = model.parent / "text.txt", tmp_path / "out"
    assert "needs a text to measure it on" in refusal(
        "compress", model, out, *CHECK, "--max-kl", "1", path=toy
    )
    assert "from 0 on" in refusal(
        "compress", model, out, *CHECK, "--max-kl", "-1", "--check", text, path=toy
    )
    assert "no such file" in refusal(
        "compress", model, out, *CHECK, "--check", tmp_path / "no.txt", path=toy
    )
    assert "more than the 800 MB allowed" in refusal(
        "compress", model, out, *CHECK, "--check", text, "--max-memory", "800MB", path=toy
    )
    tensors = {
        n: t for n, t in llama_tensors(config=CONFIG).items() if "2.input_layernorm" not in n
    }
    broken = write_like(model, tmp_path / "broken", tensors, CONFIG)
    assert "tensor model.layers.2.input_layernorm.weight, which" in refusal(
        "compress", broken, out, *CHECK, "--check", text, path=toy
    )
    assert not out.exists()


def test_a_model_that_leaves_float16_is_said_to_in_one_line(model: Path, tmp_path: Path) -> None:
    tensors = llama_tensors(config=CONFIG)
    tensors["model.layers.1.mlp.down_proj.weight"] *= 2e6
    large = write_like(model, tmp_path / "large", tensors, CONFIG)
    with pytest.warns(UserWarning, match="float16 ends at 65,504") as caught:
        run(large, model)
    (warning,) = caught
    text = str(warning.message)
    assert re.search(r"model\.layers\.1(\.mlp\.down_proj)?(\.weight)? reaches [1-9][\d,]{6,}", text)
    assert "--dtype bfloat16" in text


def test_a_weight_of_bfloat16_beyond_float16_is_said_too(model: Path, tmp_path: Path) -> None:
    tensors = llama_tensors(config=CONFIG)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e9
    # nothing of it reaches the output
    tensors["model.layers.0.mlp.gate_proj.weight"][0] = 0
    large = write_like(model, tmp_path / "large", tensors, CONFIG)
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.mlp\.up_proj"):
        run(large, None)


def test_a_model_that_answers_nan_has_no_figures(model: Path, tmp_path: Path, toy: Path) -> None:
    tensors = llama_tensors(config=CONFIG)
    tensors["model.layers.1.mlp.down_proj.weight"][:] = 1e38
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e10
    broken = write_like(model, tmp_path / "broken", tensors, CONFIG)
    with pytest.raises(bitpress.VerificationError, match="broken: the model answers NaN on this"):
        run(broken, model)
    with pytest.raises(bitpress.CheckpointError, match="broken: the model answers NaN on this"):
        run(broken, None)
    with pytest.raises(bitpress.CheckpointError, match="broken: the model answers NaN on this"):
        run(model, broken)


def test_a_run_whose_result_answers_nan_is_not_finished(
    model: Path, tmp_path: Path, toy: Path
) -> None:
    module = toy / "bitpress_scheme_toy.py"
    text = module.read_text().replace("weights}", 'weights, "input_activations": {"num_bits": 8}}')
    inputs = 'inputs * float("nan")'
    hook = f"@hookimpl\ndef quantize_activations(inputs): return {inputs}\n"
    module.write_text(f"{text}\n{hook}")
    with plugins(toy), pytest.raises(bitpress.VerificationError, match="the model answers NaN"):
        bitpress.compress(model, tmp_path / "out", scheme="toy", check=model.parent / "text.txt")
    assert not (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out/bitpress.json").exists()
