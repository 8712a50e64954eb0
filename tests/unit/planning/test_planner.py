"""What a plan promises is what a run then does; and it is told from headers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model

import bitpress
from bitpress.checkpoint.filenames import MANIFEST, MODEL_CARD as CARD
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import LLAMA, files_of, llama_tensors, tensors_of, write_model

SHAPED = """
@hookimpl
def validate_shape(shape, cut, hardware):
    text = f"{shape[0]} x {shape[1]} cut by {cut}"
    return [Finding("unsupported", text)] if shape[1] < 100 else None
"""


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "config", [LLAMA, LLAMA | {"tie_word_embeddings": True}], ids=["head", "tied head"]
)
def test_every_file_has_the_size_that_was_planned(
    tmp_path: Path, with_toy: Path, shards: int, config: dict
) -> None:
    model = write_model(tmp_path / "model", llama_tensors(config=config), config, shards)
    (model / "README.md").write_text("# A model")
    plan = bitpress.plan(model, scheme="toy", ignore=["*.o_proj"])
    bitpress.compress(model, tmp_path / "out", scheme="toy", ignore=["*.o_proj"])
    written = {name: len(data) for name, data in files_of(tmp_path / "out").items()}
    del written[MANIFEST], written[CARD]
    assert plan.file_sizes == written


def test_a_calibrated_run_has_its_files_planned_too(tmp_path: Path) -> None:
    model = runnable_model(tmp_path / "model")
    with plugins(install_learner(tmp_path / "plugins")):
        plan = bitpress.plan(model, scheme="learner")
        bitpress.compress(
            model,
            tmp_path / "out",
            scheme="learner",
            calibration=tmp_path / "text.txt",
            samples=4,
            sequence_length=32,
            threads=1,
        )
    written = {name: len(data) for name, data in files_of(tmp_path / "out").items()}
    assert plan.file_sizes == {
        name: size for name, size in written.items() if name not in (MANIFEST, CARD)
    }


def test_layers_get_the_steps_that_were_planned_and_every_other_tensor_has_a_reason(
    tmp_path: Path, toy: Path
) -> None:
    model = write_model(tmp_path / "model")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[layers]]\nmatch="*.down_proj"\nsteps=[]\n[[layers]]\nmatch="*.mlp.*"\nsteps=["toy"]\n'
    )
    words = [model, "--recipe", recipe, "--ignore", "*.0.mlp.*"]
    document = json.loads(command("plan", *words, "--json", path=toy).stdout)
    assert command("compress", model, tmp_path / "out", *words[1:], path=toy).returncode == 0
    layers = json.loads((tmp_path / "out" / MANIFEST).read_text())["layers"]
    assert {layer["name"]: [s["use"] for s in layer["steps"]] for layer in document["layers"]} == {
        n: v["steps"] for n, v in layers.items()
    }
    assert {layer["reason"] for layer in document["layers"]} == {"the rule for '*.mlp.*'"}
    reasons = {tensor["name"]: tensor["reason"] for tensor in document["left_alone"]}
    assert len(reasons) == len(llama_tensors()) - len(layers)
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "ignored by '*.0.mlp.*'"
    assert (
        reasons["model.layers.1.mlp.down_proj.weight"] == "the rule for '*.down_proj' has no steps"
    )
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == "no rule matches it"
    assert reasons["model.embed_tokens.weight"] == "embeddings"
    assert reasons["lm_head.weight"] == "the head"
    assert reasons["model.norm.weight"] == "not a matrix (a norm, a bias)"
    shown = command("plan", *words, path=toy).stdout
    assert all(reason in shown for reason in reasons.values())


def test_a_rule_that_comes_too_late_is_said_to(tmp_path: Path, toy: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[[layers]]\nmatch="*"\nsteps=["toy"]\n[[layers]]\nmatch="*.mlp.*"\nsteps=[]\n'
    )
    done = command("plan", write_model(tmp_path / "model"), "--recipe", recipe, path=toy)
    assert "the rule for '*.mlp.*' comes too late" in done.stderr


# Of a config what it is warned of: which engine's facts are missing, for which layers.
UNKNOWN = {
    "a model that engines know": ({}, []),
    "an architecture that nobody knows": (
        {"architectures": ["NobodyForCausalLM"]},
        ["NobodyForCausalLM", "transformers", "vLLM", "verify cannot check it"],
    ),
    "layers of other names than the architecture's": (
        {"architectures": ["Gemma3nForCausalLM"], "tie_word_embeddings": True},
        [],
    ),
    "layers that the architecture does not have": (
        {"architectures": ["OPTForCausalLM"]},
        ["OPTForCausalLM", "whether vLLM", "14 of the layers", "model.layers.0.mlp.down_proj"],
    ),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_no_facts_of_an_engine_decide_is_warned_of(
    tmp_path: Path, with_toy: Path, case: str
) -> None:
    keys, words = UNKNOWN[case]
    config = LLAMA | keys
    model = write_model(tmp_path / "model", llama_tensors(config=config), config)
    warnings = "; ".join(bitpress.plan(model, scheme="toy").warnings)
    assert all(word in warnings for word in words), warnings
    assert bool(words) == bool(warnings)


def test_a_layer_that_an_engine_never_quantizes_is_copied_with_that_reason(
    tmp_path: Path, with_toy: Path
) -> None:
    router = {"model.layers.0.altup.modality_router.weight": torch.ones(4, 128).bfloat16()}
    config = LLAMA | {"architectures": ["Gemma3nForCausalLM"]}
    model = write_model(tmp_path / "model", llama_tensors(config=config) | router, config)
    reasons = {entry.name: why for entry, why in bitpress.plan(model, scheme="toy").uncompressed}
    (name,) = router
    assert "its class computes in the dtype of this weight" in reasons[name]


def test_layers_that_an_engine_knows_by_one_name_get_one_scheme(tmp_path: Path, toy: Path) -> None:
    layers = {
        f"language_model.model.layers.{block}.mlp.shared_experts.down_proj.weight": torch.ones(
            64, 64
        ).bfloat16()
        for block in (0, 1)
    }
    config = LLAMA | {"architectures": ["AriaForConditionalGeneration"]}
    config |= {"tie_word_embeddings": True}
    model = write_model(tmp_path / "model", layers, config)
    line = refusal("plan", model, "--scheme", "toy", "--ignore", "*.0.*", path=toy)
    assert "are one to vLLM" in line
    assert "as .down_proj" in line


def test_layers_of_unlike_dtypes_that_engines_fuse_are_refused_before_work_starts(
    tmp_path: Path, toy: Path
) -> None:
    tensors = llama_tensors()
    name = "model.layers.0.self_attn.k_proj"
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float()
    model = write_model(tmp_path / "model", tensors)
    line = refusal("plan", model, "--scheme", "toy", path=toy)
    assert f"model.layers.0.self_attn.q_proj (BF16) and {name} (F32) are one layer" in line
    assert "--ignore" in line


def test_a_plan_needs_no_numbers(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "model")
    file, before = (
        model / "model.safetensors",
        command("plan", model, "--scheme", "toy", "--json", path=toy).stdout,
    )
    header = file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    size = file.stat().st_size
    file.write_bytes(header)
    # nothing but zeros behind the header
    os.truncate(file, size)
    assert command("plan", model, "--scheme", "toy", "--json", path=toy).stdout == before


MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=2)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_memory_stays_below_what_was_planned(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "model")
    planned = json.loads(
        command("plan", model, "--scheme", "toy", "--threads", 1, "--json", path=toy).stdout
    )
    words = [
        "-m",
        "bitpress",
        "compress",
        str(model),
        str(tmp_path / "out"),
        "--scheme",
        "toy",
        "--threads",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(toy)}
    run = [sys.executable, "-c", MEASURED, sys.executable, *words]
    used = 1024 * int(
        subprocess.run(run, check=True, capture_output=True, text=True, env=environment).stdout
    )
    assert used <= planned["memory"]
    assert planned["scratch"] == 0
    assert planned["data"] is False


def test_a_calibrated_plan_says_what_it_needs(tmp_path: Path) -> None:
    model = runnable_model(tmp_path / "model")
    shown = command(
        "plan", model, "--scheme", "learner", path=install_learner(tmp_path / "plugins")
    )
    document = json.loads(
        command("plan", model, "--scheme", "learner", "--json", path=tmp_path / "plugins").stdout
    )
    assert document["data"] is True
    # tokens, channels, bytes, and the eighth that the source is run on
    assert document["scratch"] == 256 * 512 * 128 * 4 * 9 // 8
    assert "data    needed" in shown.stdout
    assert "of hidden states go to disk" in shown.stdout


def serving(model: Path, ranks: int, path: Path) -> list[tuple[str, int, str]]:
    document = json.loads(
        command(
            "plan", model, "--scheme", "toy", "--tensor-parallel", ranks, "--json", path=path
        ).stdout
    )
    return [(remark["layers"], remark["count"], remark["text"]) for remark in document["serving"]]


def test_a_scheme_is_asked_about_the_shape_that_each_rank_holds(tmp_path: Path, toy: Path) -> None:
    module = toy / "bitpress_scheme_toy.py"
    module.write_text(module.read_text() + SHAPED)
    model = write_model(tmp_path / "model")
    assert serving(model, 1, toy) == []
    assert serving(model, 2, toy) == [
        ("model.layers.*.self_attn.o_proj", 2, "128 x 64 cut by columns")
    ]
    texts = {name: text for name, _, text in serving(model, 4, toy)}
    assert texts["model.layers.*.self_attn.o_proj"] == "128 x 32 cut by columns"
    assert texts["model.layers.*.mlp.down_proj"] == "128 x 64 cut by columns"
    assert len(texts) == 2
    shown = command("plan", model, "--scheme", "toy", "--tensor-parallel", 2, path=toy)
    assert (
        "model.layers.*.self_attn.o_proj (2 layers): unsupported: 128 x 64 cut by columns"
        in shown.stderr
    )


def test_what_no_engine_can_share_among_its_ranks_is_told(tmp_path: Path, toy: Path) -> None:
    model = write_model(tmp_path / "model")
    texts = serving(model, 3, toy)
    assert ("the model", 1, "4 attention heads cannot be shared by 3 ranks") in texts
    assert ("model.layers.*.mlp.up_proj", 2, "256 rows cannot be shared by 3 ranks") in texts
    assert ("model.layers.*.mlp.down_proj", 2, "256 columns cannot be shared by 3 ranks") in texts
    assert "--tensor-parallel 0" in refusal(
        "plan", model, "--scheme", "toy", "--tensor-parallel", 0, path=toy
    )


def test_keys_and_values_are_repeated_where_there_are_more_ranks_than_heads_of_them(
    tmp_path: Path, toy: Path
) -> None:
    module = toy / "bitpress_scheme_toy.py"
    module.write_text(
        module.read_text() + SHAPED.replace("shape[1] < 100", 'cut == "rows" and shape[0] < 33')
    )
    config = CONFIG | {"num_key_value_heads": 2}
    texts = serving(write_model(tmp_path / "model", llama_tensors(config=config), config), 4, toy)
    assert {name.rpartition(".")[2] for name, *_ in texts} == {"q_proj", "k_proj", "v_proj"}
    assert {text for *_, text in texts} == {"32 x 128 cut by rows"}


def test_a_scheme_whose_files_an_engine_would_refuse_is_found_out_before_it_writes_any(
    tmp_path: Path, toy: Path
) -> None:
    module = toy / "bitpress_scheme_toy.py"
    module.write_text(module.read_text().replace('"symmetric": True', '"symmetric": False'))
    texts = serving(write_model(tmp_path / "model"), 1, toy)
    assert (
        "model.layers.*.mlp.up_proj",
        2,
        "weight_zero_point is missing, and the config's weights say otherwise",
    ) in texts


def test_a_tensor_named_as_one_that_a_scheme_stores_is_refused_before_anything_is_written(
    tmp_path: Path, with_toy: Path
) -> None:
    name = "model.layers.0.mlp.down_proj.weight_scale"
    model = write_model(tmp_path / "model", {**llama_tensors(), name: torch.ones(1)})
    with pytest.raises(bitpress.CheckpointError, match="down_proj has a tensor weight_scale"):
        bitpress.compress(model, tmp_path / "out", scheme="toy")
    assert not (tmp_path / "out").exists()


def test_a_tensor_beside_a_layer_s_weight_is_refused_unless_the_layer_is_left_alone(
    tmp_path: Path, with_toy: Path
) -> None:
    layer = "model.layers.0.mlp.up_proj"
    tensors = llama_tensors() | {f"{layer}.extra": torch.zeros(3)}
    model, out = write_model(tmp_path / "model", tensors), tmp_path / "out"
    with pytest.raises(bitpress.CheckpointError, match=f"layer {layer} has a tensor extra beside"):
        bitpress.plan(model, scheme="toy")
    bitpress.compress(model, out, scheme="toy", ignore=["*.0.mlp.*"])
    assert not bitpress.verify(out).faults
    assert not bitpress.verify(out, model).faults
    bitpress.decompress(out, tmp_path / "dense")
    assert tensors_of(tmp_path / "dense").keys() == tensors.keys()
