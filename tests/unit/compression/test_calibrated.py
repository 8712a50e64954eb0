"""The calibrated line, from a model on disk to a smaller one, with a scheme that stores what it has
seen.
"""

from __future__ import annotations

import gc
import json
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from fixtures.forked import ForkedCommand
from fixtures.learner_scheme import CONFIG, install_learner, runnable_model
from transformers import AutoConfig, AutoModelForCausalLM

from bitpress import DataError
from bitpress.api import compress, plan
from bitpress.compression import calibrated
from bitpress.compression.calibration import resumable_forward
from bitpress.compression.calibration.activation_streams import ActivationStreams
from bitpress.conformance.commands import command, plugins, refusal
from bitpress.conformance.models import files_of, llama_tensors, tensors_of
from bitpress.modeling.decoder import Decoder
from bitpress.planning import memory_estimate
from bitpress.planning.memory_estimate import CalibrationMemory, estimate_memory

# in three batches, and more than those of which statistics are taken together
SAMPLES, LENGTH = 96, 48
HEAD = ["--scheme", "learner", "--samples", "16", "--sequence-length", "64"]
ORDER = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Path]:
    folder = install_learner(tmp_path / "plugins")
    with plugins(folder):
        yield folder


def run(model: Path, out: Path, *settings: str, **options: Any) -> Path:
    """Compress with the toy, on the text beside the model."""
    compress(
        model,
        out,
        scheme="learner",
        settings=settings,
        **{
            "calibration": model.parent / "text.txt",
            "samples": SAMPLES,
            "sequence_length": LENGTH,
            **options,
        },
    )
    return out


def dense(source: Path, out: Path, replaced: set[str], coarse: float = 0.0) -> torch.nn.Module:
    """The source as transformers runs it, with those layers computing what the output's files say,
    from rounded inputs.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    replace_layers(model, tensors_of(out), replaced, coarse)
    return model


def replace_layers(
    model: torch.nn.Module, tensors: dict[str, torch.Tensor], names: set[str], coarse: float
) -> None:
    """Let layers compute with an output's tensors, from rounded inputs."""
    for name in names:
        module = model.get_submodule(name)
        module.weight.data = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        if coarse:
            module.register_forward_pre_hook(
                lambda module, inputs: (inputs[0] / coarse).round() * coarse
            )


def sums_of_inputs(model: torch.nn.Module, layer: str, ids: torch.Tensor) -> torch.Tensor:
    """Σ x (in,) over the tokens that reach a layer."""
    captured: list[torch.Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(
        lambda module, inputs: captured.append(inputs[0].flatten(0, 1).sum(0))
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return captured[0]


def token_ids(source: Path) -> torch.Tensor:
    words = (source.parent / "text.txt").read_text().split()[: SAMPLES * LENGTH]
    return torch.tensor([int(word[1:]) for word in words]).view(SAMPLES, LENGTH)


def moved_before(
    source: Path, out: Path, layer: str, module: str, num_sequences: int = SAMPLES
) -> torch.Tensor:
    """Σ x of a module's inputs in the source, less that with every layer compressed that comes
    before a layer, over the first sequences.
    """
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [
        f"mlp.{x}_proj" for x in ("gate", "up", "down")
    ]
    layers = [f"model.layers.{block}.{part}" for block in range(3) for part in parts]
    shifted = dense(source, out, set(layers[: layers.index(layer)]))
    ids = token_ids(source)[:num_sequences]
    return sums_of_inputs(dense(source, out, set()), module, ids) - sums_of_inputs(
        shifted, module, ids
    )


@pytest.mark.parametrize(
    "coarse", [0.0, 0.5], ids=["inputs as they come", "inputs that are rounded while serving"]
)
def test_every_layer_sees_the_inputs_that_the_compressed_layers_before_it_make(
    tmp_path: Path, learner: Path, coarse: float
) -> None:
    source = runnable_model(tmp_path / "m")
    out = run(source, tmp_path / "o", "bits=2", f"coarse={coarse}")
    tensors, ids = tensors_of(out), token_ids(source)
    model = dense(source, out, set())
    for block in range(3):
        for layer_name in ORDER:
            layer = f"model.layers.{block}.{layer_name}"
            expected = sums_of_inputs(model, layer, ids)
            torch.testing.assert_close(tensors[f"{layer}.seen"][0], expected, rtol=1e-4, atol=1e-2)
            members = [
                name
                for name in tensors
                if name.startswith(layer.rpartition(".")[0]) and name.endswith("_scale")
            ]
            stack = {
                "self_attn.q_proj": "qkv",
                "self_attn.o_proj": "o",
                "mlp.gate_proj": "gu",
                "mlp.down_proj": "d",
            }[layer_name]
            compressed = {
                name.removesuffix(".weight_scale")
                for name in members
                if name.rpartition(".")[0].split(".")[-1][0] in stack
            }
            replace_layers(model, tensors, compressed, coarse)


# batches are of 42 sequences
@pytest.mark.parametrize(
    ("tokens_per_channel", "reference", "num_sequences"),
    [(16, "auto", SAMPLES), (1, "auto", 42), (1, "all", SAMPLES)],
    ids=[
        "of all batches where tokens are few for the width",
        "of every eighth batch",
        "of all batches where the user says so",
    ],
)
def test_the_reference_is_what_the_source_makes(
    tmp_path: Path, learner: Path, tokens_per_channel: int, reference: str, num_sequences: int
) -> None:
    source = runnable_model(tmp_path / "m")
    with patch.object(memory_estimate, "REFERENCE_TOKENS_PER_CHANNEL", tokens_per_channel):
        out = run(source, tmp_path / "o", "bits=2", f"reference={reference}")
    layer = "model.layers.2.mlp.down_proj"
    moved = moved_before(source, out, layer, layer, num_sequences)
    torch.testing.assert_close(tensors_of(out)[f"{layer}.seen"][1], moved, rtol=1e-3, atol=1e-2)
    assert moved.norm() > 1


def test_the_source_is_not_run_where_the_user_wants_nothing_of_it(
    tmp_path: Path, learner: Path
) -> None:
    source = runnable_model(tmp_path / "m")
    with patch.object(calibrated, "ReferenceStates", side_effect=AssertionError):
        tensors = tensors_of(run(source, tmp_path / "o", "bits=2", "reference=none"))
    seen = [tensor for name, tensor in tensors.items() if name.endswith(".seen")]
    assert all(of_inputs.any() and not moved.any() for of_inputs, moved in seen)


@pytest.mark.parametrize(
    ("layer_name", "norm"),
    [("self_attn.o_proj", "input_layernorm"), ("mlp.down_proj", "post_attention_layernorm")],
)
def test_a_layer_whose_output_is_added_to_the_stream_is_told_how_far_the_stream_has_moved(
    tmp_path: Path, learner: Path, layer_name: str, norm: str
) -> None:
    source = runnable_model(tmp_path / "m")
    out = run(source, tmp_path / "o", "bits=2")
    behind = moved_before(source, out, f"model.layers.1.{layer_name}", f"model.layers.1.{norm}")
    torch.testing.assert_close(
        tensors_of(out)[f"model.layers.1.{layer_name}.behind"], behind, rtol=1e-3, atol=1e-2
    )
    assert behind.norm() > 1
    assert not tensors_of(out)["model.layers.1.mlp.up_proj.behind"].any()


@pytest.mark.parametrize(
    ("dtype", "in_bfloat16"),
    [(torch.bfloat16, True), (torch.float16, False), (torch.float32, False)],
)
def test_a_cpu_that_multiplies_bfloat16_runs_models_of_it_as_they_are_served(
    tmp_path: Path, learner: Path, dtype: torch.dtype, in_bfloat16: bool
) -> None:
    source = runnable_model(
        tmp_path / "m",
        {name: tensor.to(dtype) for name, tensor in llama_tensors(config=CONFIG).items()},
    )
    exact, layer = run(source, tmp_path / "exact"), "model.layers.2.mlp.down_proj.seen"
    with patch("bitpress.compression.calibrated.has_cpu_feature", lambda *names: True):
        out = run(source, tmp_path / "o")
    expected, tensors = tensors_of(exact)[layer][0], tensors_of(out)[layer][0]
    assert torch.equal(tensors, expected) != in_bfloat16
    assert (tensors - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("shards", [1, 3])
def test_there_is_a_file_for_every_block_and_every_tensor_is_in_one(
    tmp_path: Path, learner: Path, shards: int
) -> None:
    source = runnable_model(tmp_path / "m", shards=shards)
    out = run(source, tmp_path / "o")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 1 + 3
    for name, tensor in tensors_of(source).items():
        if "_proj" not in name:
            assert torch.equal(tensors_of(out)[name], tensor)
        block = name.split(".")[2] if "layers" in name else None
        assert {
            file for other, file in index.items() if other.startswith(f"model.layers.{block}.")
        } <= {index[name]}


def test_what_was_found_is_kept_beside_the_files(tmp_path: Path, learner: Path) -> None:
    tensors = llama_tensors(config=CONFIG)
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    out = run(runnable_model(tmp_path / "m", tensors), tmp_path / "o", "bits=4")
    manifest = json.loads((out / "bitpress.json").read_text())
    assert manifest["data"]["source"] == "text.txt"
    assert manifest["data"]["tokens"] == str(SAMPLES * LENGTH)
    assert "prefix" not in manifest["data"]
    errors = {name: layer["output_error"] for name, layer in manifest["layers"].items()}
    assert all(0 < error < 0.2 for name, error in errors.items() if "layers.1.mlp" not in name)
    assert "model.layers.1.mlp.up_proj: all its weights are zero" in manifest["warnings"]
    assert not list(out.glob("*.notes"))


def test_memory_that_is_short_changes_no_byte(tmp_path: Path, learner: Path) -> None:
    source = runnable_model(tmp_path / "m")
    roomy = files_of(run(source, tmp_path / "a"))
    least = estimate_memory(plan(source, scheme="learner"), shape=(SAMPLES, LENGTH))
    assert files_of(run(source, tmp_path / "b", max_memory=least + 1000)) == roomy
    line = refusal("compress", source, tmp_path / "c", *HEAD, "--max-memory", "500MB", path=learner)
    assert "500 MB allowed" in line


def test_where_memory_is_short_no_forward_is_left_waiting(tmp_path: Path, learner: Path) -> None:
    source, begun, waiting = runnable_model(tmp_path / "m"), resumable_forward._run_block, []

    def counted(*arguments: Any) -> torch.Tensor:
        waiting.append(waiting[-1] + 1 if waiting else 1)
        try:
            return begun(*arguments)
        finally:
            waiting.append(waiting[-1] - 1)

    with patch.object(resumable_forward, "_run_block", counted):
        run(
            source,
            tmp_path / "o",
            "factors=2 1",
            max_memory=estimate_memory(plan(source, scheme="learner"), shape=(SAMPLES, LENGTH))
            + 1000,
        )
    # one, and the source's
    assert max(waiting) <= 2


def test_a_block_s_weights_are_freed_as_soon_as_it_is_left(
    tmp_path: Path, learner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled, alive = [], []

    def note(make_block: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
        def noted(*arguments: Any) -> torch.nn.Module:
            alive.append(sum(reference() is not None for reference in filled))
            result = make_block(*arguments)
            filled.append(weakref.ref(next(result.parameters())))
            return result

        return noted

    for name in ("load_block", "copy_block"):
        monkeypatch.setattr(Decoder, name, note(getattr(Decoder, name)))
    source = runnable_model(tmp_path / "m", config=CONFIG | {"num_hidden_layers": 4})
    # a block may take gigabytes: they cannot wait until garbage is looked for
    gc.disable()
    try:
        run(source, tmp_path / "o", "coarse=0.05", samples=16)
    finally:
        gc.enable()
    assert len(filled) > 8
    # the same block, as it will be compressed and as the source has it
    assert max(alive) <= 1


@pytest.mark.parametrize(
    "factors", ["4 0.25 1 2 8", "0.3 5"], ids=["powers of two", "others, which are rounded"]
)
def test_factors_folded_into_what_makes_the_inputs_leave_the_function_as_it_was(
    tmp_path: Path, learner: Path, factors: str
) -> None:
    source = runnable_model(tmp_path / "m")
    out = run(source, tmp_path / "o", f"factors={factors}")
    manifest = json.loads((out / "bitpress.json").read_text())
    assert {name.split(".", 3)[3] for name in manifest["rescaled"] if ".layers.0." in name} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }
    model, plain = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(),
        token_ids(source)[:4],
    )
    with torch.no_grad():
        expected = model(plain).logits
        for name, tensor in model.named_parameters():
            change, result = manifest["rescaled"].get(name, {}), tensors_of(out).get(name)
            if "norm" in name and change:
                assert torch.equal(
                    result, (tensor * torch.tensor(change["rows"]).exp2()).to(result.dtype)
                )
                assert not torch.equal(result.float(), tensor)
            tensor.mul_(torch.tensor(change.get("columns", 0)).exp2())
            tensor.mul_(
                torch.tensor(change.get("rows", [0])).exp2().reshape(-1, *[1] * (tensor.ndim - 1))
            )
        assert torch.allclose(model(plain).logits, expected, atol=1e-5)
    assert command("verify", out, "--against", source, path=learner).returncode == 0


def test_a_norm_that_feeds_more_than_the_layer_is_left_alone_and_named(
    tmp_path: Path, learner: Path
) -> None:
    source = runnable_model(tmp_path / "m")
    keys = {
        name: value for name, value in CONFIG.items() if name not in ("model_type", "architectures")
    }
    config = AutoConfig.for_model("phi", **keys)
    torch.manual_seed(0)
    # Phi's attention and MLP read one norm
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    out = run(source, tmp_path / "o", "factors=4 2")
    manifest = json.loads((out / "bitpress.json").read_text())
    assert "input_layernorm feeds more than this" in " ".join(manifest["warnings"])
    assert not [name for name in manifest["rescaled"] if "norm" in name]
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(tensors_of(out)[norm], tensors_of(source)[norm])


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(
    tmp_path: Path, learner: Path
) -> None:
    source = runnable_model(tmp_path / "m", config=CONFIG | {"num_hidden_layers": 1})
    first, same, other = (
        files_of(run(source, tmp_path / name, "bits=4", samples=16, threads=1, seed=seed))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert same == first
    changed = {name for name in first if other[name] != first[name]}
    assert changed == {
        "bitpress.json",
        "README.md",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize(
    ("setting", "states_bytes", "numbers"),
    [
        ("bits=4", 0, (1, 3)),
        ("factors=2 1", 0, (1, 16)),
        ("slopes=true", 0, (1, 3, 16)),
        ("slopes=true", 1, (1, 3)),
    ],
    ids=["in memory", "rescaled", "gradients", "gradients, on disk"],
)
def test_any_number_of_threads_gives_the_same_bytes(
    tmp_path: Path, learner: Path, setting: str, states_bytes: int, numbers: Sequence[int]
) -> None:
    source = runnable_model(tmp_path / "m")
    with (
        patch.object(memory_estimate, "BATCH_TOKENS", 4 * LENGTH),
        patch.object(memory_estimate, "STATISTICS_TOKENS", 8 * LENGTH),
        patch.object(CalibrationMemory, "spilled_bytes", return_value=states_bytes),
    ):
        files = {
            threads: files_of(run(source, tmp_path / str(threads), setting, threads=threads))
            for threads in numbers
        }
    assert all(written == files[1] for written in files.values())


def test_as_many_batches_run_side_by_side_as_there_are_threads(
    tmp_path: Path, learner: Path
) -> None:
    # it breaks unless all of them come to it, twice in each block
    meeting, finish = threading.Barrier(16, timeout=60), ActivationStreams._finish

    def meet(self: ActivationStreams, batch: int, is_needed: bool) -> tuple[float, float]:
        meeting.wait()
        return finish(self, batch, is_needed)

    with (
        patch.object(memory_estimate, "BATCH_TOKENS", 3 * LENGTH),
        patch.object(ActivationStreams, "_finish", meet),
    ):
        run(runnable_model(tmp_path / "m"), tmp_path / "o", "bits=4", threads=16)


def test_every_batch_that_runs_beside_others_is_counted_in_the_memory(
    tmp_path: Path, learner: Path
) -> None:
    planned = plan(runnable_model(tmp_path / "m"), scheme="learner")
    estimate = memory_estimate.estimate_calibration(planned, SAMPLES * LENGTH, LENGTH)
    for least in (estimate.in_memory, estimate.on_disk):
        with patch.object(
            CalibrationMemory, "spilled_bytes", return_value=estimate.in_memory - least
        ):
            for count in (1, 2, 16):
                needed = least + (count - 1) * estimate.per_lane
                assert estimate.num_lanes(needed, 64) == count
                assert estimate.num_lanes(needed - 1, 64) == max(count - 1, 1)
                assert estimate.num_lanes(needed, 2) == min(count, 2)


@pytest.mark.parametrize(
    ("end", "setting"),
    [("kill", "factors=1.3 0.7"), ("interrupt", "factors=2 1"), ("kill", "coarse=0.5")],
    ids=["killed", "interrupted", "killed, where inputs are rounded while serving"],
)
def test_a_run_that_ends_half_way_goes_on_and_writes_the_same_bytes(
    tmp_path: Path, learner: Path, end: str, setting: str
) -> None:
    source = runnable_model(tmp_path / "m")
    text = ["--calibration", tmp_path / "text.txt"]
    # the seventh layer that is decided lies in the second block
    deadly = tmp_path / f"{end}.7"
    words = [
        "compress",
        source,
        tmp_path / "o",
        *HEAD,
        *text,
        "--set",
        f"deadly={deadly}",
        "--set",
        setting,
    ]
    first = ForkedCommand(*words, path=learner)
    assert first.wait(timeout=120) == (-signal.SIGKILL if end == "kill" else 130)
    assert not (tmp_path / "o/config.json").exists()
    # what lies outside the blocks, and the first block
    assert len(list((tmp_path / "o").glob("*.safetensors"))) == 2
    again = ForkedCommand(*words, path=learner)
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    deadly.unlink()
    words[2] = tmp_path / "whole"
    deadly.write_text("x" * 100)
    assert ForkedCommand(*words, path=learner).wait(timeout=120) == 0
    assert files_of(tmp_path / "o") == files_of(tmp_path / "whole")


DATED = (
    "{% for m in messages %}{% for i in range(40) %}"
    "w{{ strftime_now('%f') | int % 96 }} {{ m.content }} {% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("is_text_changed", [False, True])
def test_a_run_whose_chat_template_writes_the_date_goes_on_with_the_tokens_that_it_began_with(
    tmp_path: Path, learner: Path, is_text_changed: bool
) -> None:
    # the template writes microseconds in place of a day
    source = runnable_model(tmp_path / "m")
    config = source / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": DATED}))
    chats, deadly = tmp_path / "chats.jsonl", tmp_path / "kill.7"
    chat = json.dumps({"messages": [{"role": "user", "content": "w1 w2 w3"}]})
    chats.write_text(f"{chat}\n" * 50)
    words = ["compress", source, tmp_path / "o", *HEAD, "--calibration", chats]
    words += ["--set", f"deadly={deadly}"]
    assert ForkedCommand(*words, path=learner).wait(timeout=120) == -signal.SIGKILL
    before = {file.name: file.read_bytes() for file in (tmp_path / "o").glob("*.safetensors")}
    assert len(before) == 2

    if is_text_changed:
        chats.write_text(f"{chat}\n" * 51)
    again = ForkedCommand(*words, path=learner)
    _, error = again.communicate(timeout=120)
    if is_text_changed:
        assert again.returncode == 2
        assert "of the text 1 was" in error
        return
    assert again.returncode == 0, error
    assert "the model's chat template writes the date" in error
    for name, data in before.items():
        assert (tmp_path / "o" / name).read_bytes() == data
    assert not (tmp_path / "o/.bitpress.tokens").exists()
    assert command("verify", tmp_path / "o", "--against", source, path=learner).returncode == 0


def test_numbers_that_the_model_itself_makes_infinite_are_named(
    tmp_path: Path, learner: Path
) -> None:
    tensors = llama_tensors(config=CONFIG)
    for name in ("up_proj", "gate_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"] *= 1e30
    source = runnable_model(tmp_path / "m", tensors)
    line = refusal(
        "compress",
        source,
        tmp_path / "o",
        *HEAD,
        "--calibration",
        tmp_path / "text.txt",
        path=learner,
    )
    assert "layer model.layers.1.mlp.down_proj" in line
    assert "NaN or infinity" in line
    assert not (tmp_path / "o/config.json").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, learner: Path) -> None:
    tensors = llama_tensors(config=CONFIG)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    line = refusal(
        "compress", runnable_model(tmp_path / "m", tensors), tmp_path / "o", *HEAD, path=learner
    )
    assert "model.layers.2.mlp.up_proj.weight" in line


@pytest.mark.parametrize("fault", ["a norm is missing", "a class that transformers has not"])
def test_a_model_that_cannot_be_run_is_refused_before_a_folder_is_made(
    tmp_path: Path, learner: Path, fault: str
) -> None:
    tensors, config = llama_tensors(config=CONFIG), CONFIG
    if fault == "a norm is missing":
        del tensors["model.layers.1.input_layernorm.weight"]
    else:
        config = {**CONFIG, "architectures": ["Other"], "model_type": "other"}
    model = runnable_model(tmp_path / "m", tensors, config)
    line = refusal("compress", model, tmp_path / "o", *HEAD, path=learner)
    assert str(model) in line
    assert not (tmp_path / "o").exists()


def test_fewer_tokens_than_columns_are_enough_for_a_finite_result(
    tmp_path: Path, learner: Path
) -> None:
    source = runnable_model(tmp_path / "m")
    out = run(source, tmp_path / "o", samples=1, sequence_length=20)
    assert all(tensor.float().isfinite().all() for tensor in tensors_of(out).values())


def after_blocks(model: torch.nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The hidden states after each block."""
    captured: list[torch.Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(
            lambda module, inputs, output: captured.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return captured


def test_how_far_each_block_s_output_is_from_the_source_s_is_recorded(
    tmp_path: Path, learner: Path
) -> None:
    source = runnable_model(tmp_path / "m")
    out = run(source, tmp_path / "o", "bits=3")
    drift = json.loads((out / "bitpress.json").read_text())["blocks"]
    layers = {
        f"model.layers.{b}.{s}" for b in range(3) for s in [f"self_attn.{x}_proj" for x in "qkvo"]
    }
    layers |= {f"model.layers.{b}.mlp.{s}_proj" for b in range(3) for s in ("gate", "up", "down")}
    # the source is run on all batches, since tokens are few for the width
    ids = token_ids(source)
    shifted, before = (
        after_blocks(dense(source, out, layers), ids),
        after_blocks(dense(source, out, set()), ids),
    )
    expected = [float((a - b).norm() / b.norm()) for a, b in zip(shifted, before, strict=True)]
    assert list(drift) == [f"model.layers.{block}" for block in range(3)]
    assert list(drift.values()) == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 0.01


def test_calibration_texts_may_be_a_list(tmp_path: Path, learner: Path) -> None:
    model = runnable_model(tmp_path / "m")
    text = (tmp_path / "text.txt").read_text()
    of_file = run(model, tmp_path / "file")
    for name, texts in {"texts": [text], "rows": [{"text": text}]}.items():
        out = run(model, tmp_path / name, calibration=texts)
        expected = tensors_of(of_file)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors_of(out).items())
        assert "--calibration FILE" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"text": "w1"}, "a list of texts or rows is expected, not dict"),
        (3, "a list of texts or rows is expected, not 3"),
        ([3], "text 1 of the list: an object"),
        ([], "a list of texts: it holds no text"),
    ],
)
def test_calibration_texts_of_a_wrong_type_are_refused(
    tmp_path: Path, learner: Path, wrong: Any, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        run(runnable_model(tmp_path / "m"), tmp_path / "o", calibration=wrong)
