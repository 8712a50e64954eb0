"""Caches of keys and values: what a scheme for them is given, and what becomes of what it
stores.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.cache_scheme import install_cache_scheme
from fixtures.forked import ForkedCommand, torchrun
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from fixtures.signed_manifest import change_tensors, forge
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import bitpress
from bitpress.checkpoint.model_config import KEY
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import files_of, llama_tensors, tensors_of
from bitpress.modeling.attention import watch, watched_attention
from bitpress.planning.memory_estimate import estimate_memory

SAMPLES, LENGTH = 96, 48
ATTENTIONS = [f"model.layers.{block}.self_attn" for block in range(3)]
NAMES = {"query": "q", "key": "k", "value": "v"}


@pytest.fixture(autouse=True)
def schemes(tmp_path: Path) -> Iterator[Path]:
    """The schemes `cache-int8` and `learner`."""
    folder = install_cache_scheme(tmp_path / "plugins")
    install_learner(folder)
    with plugins(folder):
        yield folder


def run(model: Path, out: Path, scheme: str = "cache-int8", **options: Any) -> Path:
    """Compress on the text beside the model."""
    arguments = {
        "calibration": model.parent / "text.txt",
        "samples": SAMPLES,
        "sequence_length": LENGTH,
        **options,
    }
    bitpress.compress(model, out, scheme=scheme, **arguments)
    return out


def token_ids(source: Path) -> torch.Tensor:
    words = (source.parent / "text.txt").read_text().split()[: SAMPLES * LENGTH]
    return torch.tensor([int(word[1:]) for word in words]).view(SAMPLES, LENGTH)


class RecordingCache(DynamicCache):
    """transformers' own cache, which keeps keys (after the rotation) and values of each layer."""

    def states(self, layer: int) -> Mapping[str, torch.Tensor]:
        """(tokens, heads, channels) each."""
        kept = {"key": self.layers[layer].keys, "value": self.layers[layer].values}
        return {name: x.transpose(1, 2).flatten(0, 1) for name, x in kept.items()}


def kept_states(model: torch.nn.Module, ids: torch.Tensor) -> Sequence[Mapping[str, torch.Tensor]]:
    """What transformers' cache keeps of some texts, layer by layer."""
    cache = RecordingCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return [cache.states(layer) for layer in range(len(cache.layers))]


def load(source: Path, out: Path | None = None) -> torch.nn.Module:
    """The source as transformers runs it; with the weights that `learner` has stored in an output,
    where one is given.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tensors = {} if out is None else tensors_of(out)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        weight = tensors[f"{module}.weight"].float() * tensors[name]
        model.get_submodule(module).weight.data = weight
    return model


@pytest.mark.parametrize("scheme", ["cache-int8", "learner+cache-int8"])
def test_a_scheme_is_given_what_the_cache_of_the_compressed_model_keeps(
    tmp_path: Path, scheme: str
) -> None:
    source = runnable_model(tmp_path / "m")
    out = run(source, tmp_path / "o", scheme)
    tensors, model = tensors_of(out), load(source, tmp_path / "o" if "+" in scheme else None)
    for name, states in zip(ATTENTIONS, kept_states(model, token_ids(source)), strict=True):
        for kind, expected in states.items():
            stored = {
                suffix: tensors[f"{name}.{NAMES[kind]}_{suffix}"]
                for suffix in ("scale", "seen", "tokens")
            }
            assert stored["tokens"].item() == SAMPLES * LENGTH
            torch.testing.assert_close(
                stored["scale"], expected.abs().amax((0, 2)) / 127, rtol=1e-3, atol=0
            )
            torch.testing.assert_close(stored["seen"], expected.sum(0), rtol=1e-3, atol=2e-2)


def test_queries_are_those_of_all_heads_after_the_rotation(tmp_path: Path) -> None:
    source = runnable_model(tmp_path / "m")
    tensors = tensors_of(run(source, tmp_path / "o"))
    seen = tensors[f"{ATTENTIONS[0]}.q_seen"]
    assert seen.shape == (CONFIG["num_attention_heads"], 128 // CONFIG["num_attention_heads"])

    model, captured = load(source), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, inputs, output: captured.append(output)
    )
    with torch.no_grad():
        model(input_ids=token_ids(source), use_cache=False)
    # a rotation keeps the length of a head's query, and moves its sum
    plain = captured[0].view(-1, *seen.shape)
    assert not torch.allclose(plain.sum(0), seen, rtol=1e-2)
    amax = tensors[f"{ATTENTIONS[0]}.q_scale"] * 127
    assert (amax <= plain.norm(dim=2).amax(0) * 1.001).all()


def test_forward_passes_that_start_anew_count_each_token_once(tmp_path: Path) -> None:
    source = runnable_model(tmp_path / "m")
    whole = tensors_of(run(source, tmp_path / "whole", "learner+cache-int8"))
    bitpress_plan = bitpress.plan(source, scheme="learner+cache-int8")
    least = estimate_memory(bitpress_plan, shape=(SAMPLES, LENGTH))
    run(source, tmp_path / "o", "learner+cache-int8", max_memory=least + 1000)
    short = tensors_of(tmp_path / "o")
    assert whole.keys() == short.keys()
    assert all(torch.equal(whole[name], short[name]) for name in whole)


def words(source: Path, out: Path, scheme: str, *others: object) -> list[object]:
    return [
        *("compress", source, out, "--scheme", scheme),
        *("--calibration", source.parent / "text.txt", "--samples", 16, "--sequence-length", 64),
        *others,
    ]


def test_ranks_add_up_what_they_have_seen(tmp_path: Path, schemes: Path) -> None:
    # computed in float32, which rounds alike in batches of any size
    tensors = {name: x.float() for name, x in llama_tensors(config=CONFIG).items()}
    source = runnable_model(tmp_path / "m", tensors)
    assert command(*words(source, tmp_path / "one", "cache-int8"), path=schemes).returncode == 0
    completed = torchrun(2, *words(source, tmp_path / "two", "cache-int8"), path=schemes)
    assert completed.returncode == 0, completed.stderr
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    name = f"{ATTENTIONS[0]}.k_"
    assert two[f"{name}tokens"].item() == 16 * 64
    for suffix in ("seen", "scale"):
        torch.testing.assert_close(one[name + suffix], two[name + suffix], rtol=1e-3, atol=1e-2)


def test_a_run_that_was_killed_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, schemes: Path
) -> None:
    source = runnable_model(tmp_path / "m")
    # the seventh layer that is decided lies in the second block
    deadly = tmp_path / "kill.7"
    setting = ["learner+cache-int8", "--set", f"deadly={deadly}"]
    first = ForkedCommand(*words(source, tmp_path / "o", *setting), path=schemes)
    assert first.wait(timeout=120) == -signal.SIGKILL
    again = ForkedCommand(*words(source, tmp_path / "o", *setting), path=schemes)
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    deadly.write_text("x" * 100)
    whole = ForkedCommand(*words(source, tmp_path / "whole", *setting), path=schemes)
    assert whole.wait(timeout=120) == 0
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")


def test_weights_stay_as_they_are_where_a_scheme_for_the_cache_stands_alone(tmp_path: Path) -> None:
    source = runnable_model(tmp_path / "m")
    before, after = tensors_of(source), tensors_of(run(source, tmp_path / "o"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    added = {f"{name}.{x}_{y}" for name in ATTENTIONS for x in "qkv" for y in ("scale", "seen")}
    added |= {f"{name}.{x}_tokens" for name in ATTENTIONS for x in "qkv"}
    assert after.keys() - before.keys() == added
    table = json.loads((tmp_path / "o/config.json").read_text())[KEY]
    assert table["kv_cache_scheme"] == {"num_bits": 8, "type": "int", "levels": 127}
    assert table["config_groups"] == {}
    assert table["format"] == "dense"


def test_decompress_leaves_the_scales_out(tmp_path: Path) -> None:
    source = runnable_model(tmp_path / "m")
    bitpress.decompress(run(source, tmp_path / "o"), tmp_path / "back")
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert KEY not in json.loads((tmp_path / "back/config.json").read_text())


@pytest.mark.parametrize("levels", [127, 3])
def test_eval_rounds_keys_and_values_as_the_scheme_says(tmp_path: Path, levels: int) -> None:
    source = runnable_model(tmp_path / "m")
    out = run(source, tmp_path / "o", settings=[f"levels={levels}"])
    check = bitpress.eval(
        out, against=source, text=tmp_path / "text.txt", sequence_length=LENGTH, max_tokens=960
    )
    tensors, ids = tensors_of(out), token_ids(source)[:20]

    class RoundingCache(DynamicCache):
        def update(
            self, keys: torch.Tensor, values: torch.Tensor, layer: int, *others: Any, **named: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rounded = []
            for short, states in (("k", keys), ("v", values)):
                scale = tensors[f"{ATTENTIONS[layer]}.{short}_scale"].view(1, -1, 1, 1)
                rounded.append((states / scale).round().clamp(-levels, levels) * scale)
            return super().update(*rounded, layer, *others, **named)

    model = load(source)
    with torch.no_grad():
        log_p, log_q = (
            model(input_ids=ids, past_key_values=cache, use_cache=True).logits.log_softmax(-1)
            for cache in (DynamicCache(), RoundingCache())
        )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[:, :-1].mean().item()
    assert check.kl == pytest.approx(expected, rel=1e-2)
    assert expected > 1e-6


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop(f"{ATTENTIONS[0]}.k_scale"), "k_scale is missing"),
        (lambda t: t[f"{ATTENTIONS[0]}.k_scale"].fill_(torch.nan), "k_scale is NaN or infinity"),
        (lambda t: t[f"{ATTENTIONS[0]}.v_scale"].zero_(), "all values of a head become 0"),
        (
            lambda t: t.update({f"{ATTENTIONS[0]}.v_scale": torch.ones(1)}),
            "v_scale is F32 [1], planned was F32 [2]",
        ),
        (lambda t: t.update({f"{ATTENTIONS[0]}.p_scale": torch.ones(1)}), "was not planned"),
    ],
    ids=["missing", "NaN", "zero", "of another shape", "one more"],
)
def test_verify_finds_damage(tmp_path: Path, change: Any, fault: str) -> None:
    source = runnable_model(tmp_path / "m")
    out = run(source, tmp_path / "o")
    assert not bitpress.verify(out, against=source).faults
    file = next(f for f in out.glob("*.safetensors") if f"{ATTENTIONS[0]}.k_scale" in load_file(f))
    change_tensors(file, change)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: file.name for file in out.glob("*.safetensors") for name in load_file(file)
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    forge(out)
    faults = [str(fault) for fault in bitpress.verify(out, against=source).faults]
    assert any(fault in text for text in faults), faults


def test_inspect_and_report_count_caches(tmp_path: Path, schemes: Path) -> None:
    out = run(runnable_model(tmp_path / "m"), tmp_path / "o")
    assert "scales for the caches of 3 attentions" in command("inspect", out, path=schemes).stdout
    page = bitpress.report(out).read_text()
    assert "<b>3</b><span>attentions with scales for their caches</span>" in page
    assert "cache-int8" in page.partition("Where it serves")[2]


def test_plan_says_what_a_token_takes(tmp_path: Path, schemes: Path) -> None:
    source = runnable_model(tmp_path / "m")
    shown = command("plan", source, "--scheme", "cache-int8", path=schemes).stdout
    # 3 blocks, keys and values, 2 heads of 32 channels
    assert "cache   cache-int8: 3 attentions keep 384 bytes of each token instead of 768" in shown
    document = json.loads(
        command("plan", source, "--scheme", "cache-int8", "--json", path=schemes).stdout
    )
    assert document["caches"] == [{"name": name, "bytes_per_token": 128} for name in ATTENTIONS]


def test_a_recipe_names_a_scheme_for_the_cache_beside_the_layers(
    tmp_path: Path, schemes: Path
) -> None:
    source, recipe = runnable_model(tmp_path / "m"), tmp_path / "recipe.toml"
    recipe.write_text(
        'cache = { use = "cache-int8", levels = 7 }\n'
        '[[layers]]\nmatch = "*.mlp.*"\nsteps = ["learner"]\n'
    )
    plan = bitpress.plan(source, recipe=recipe)
    assert plan.config[KEY]["kv_cache_scheme"]["levels"] == 7
    assert {stack.steps[0].scheme.name for stack in plan.stacks} == {"learner"}
    assert [cache.module for cache in plan.caches] == ATTENTIONS


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ('cache = "learner"', "learner is a scheme of layers"),
        ('[[layers]]\nmatch = "*"\nsteps = ["cache-int8"]', "cache-int8 is a scheme of `cache`"),
        ('cache = ["cache-int8"]', "`cache`: a step is a scheme's name"),
    ],
)
def test_a_recipe_that_mixes_up_layers_and_cache_is_refused(
    tmp_path: Path, schemes: Path, recipe: str, message: str
) -> None:
    source = runnable_model(tmp_path / "m")
    (tmp_path / "recipe.toml").write_text(recipe)
    line = refusal("plan", source, "--recipe", tmp_path / "recipe.toml", path=schemes)
    assert message in line


def test_two_schemes_for_one_cache_are_refused(tmp_path: Path, schemes: Path) -> None:
    source = runnable_model(tmp_path / "m")
    line = refusal("plan", source, "--scheme", "cache-int8+cache-int8", path=schemes)
    assert "both for the cache" in line


def test_a_source_that_has_scales_of_its_own_is_refused(tmp_path: Path, schemes: Path) -> None:
    tensors = llama_tensors(config=CONFIG) | {f"{ATTENTIONS[1]}.k_scale": torch.ones(1)}
    source = runnable_model(tmp_path / "m", tensors)
    line = refusal("plan", source, "--scheme", "cache-int8", path=schemes)
    assert f"holds a tensor {ATTENTIONS[1]}.k_scale already" in line


def test_the_attention_functions_of_transformers_are_left_as_they_were(tmp_path: Path) -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS)
    run(runnable_model(tmp_path / "m"), tmp_path / "o")
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_function_is_watched(implementation: str) -> None:
    config = LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "architectures"})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    seen: list[tuple[torch.Size, ...]] = []

    def double_values(*states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(tuple(x.shape for x in states))
        return states[1], states[2] * 2

    attention, ids = model.model.layers[0].self_attn, torch.arange(12).view(2, 6)
    outputs: list[torch.Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    watch(attention, double_values)
    with torch.no_grad(), watched_attention():
        model(input_ids=ids)
    with torch.no_grad():
        model(input_ids=ids)
    channels = 128 // CONFIG["num_attention_heads"]
    heads = [CONFIG["num_attention_heads"], *[CONFIG["num_key_value_heads"]] * 2]
    assert seen == [tuple((2, count, 6, channels) for count in heads)]
    torch.testing.assert_close(outputs[0], outputs[1] * 2)
