"""transformers, reading our files through compressed-tensors, computes with exactly the weights
that we restore.
"""

from __future__ import annotations

import functools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import disable_quantization
from fixtures.processes import kit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from bitpress import compress, numerics
from bitpress.checkpoint.reader import open_checkpoint
from bitpress.conformance.commands import install
from bitpress.conformance.models import LLAMA, tensors_of, write_model
from bitpress.planning.planner import make_plan
from bitpress.planning.recipe import Recipe, RecipeChanges, from_file, from_scheme
from bitpress.schemes import pipeline
from bitpress.schemes.registry import discover
from bitpress.schemes.template import write_package

TINY = Path(__file__).parents[2] / "examples/tiny-llama"
TOKENS = torch.arange(48).reshape(2, 24) * 2 % 96

# no zero points: transformers 5.24 with compressed-tensors 0.20 makes room for them unpacked, and
# takes no file that packs them
CASES = {
    "channel": ("fp8", []),
    "tensor": ("fp8", ["weights=tensor"]),
    "block": ("fp8-block", []),
    "int8": ("int8", ["algorithm=rtn"]),
    "int8 per tensor": ("int8", ["algorithm=rtn", "weights=tensor"]),
    "int8, asymmetric": ("int8", ["algorithm=rtn", "symmetric_activations=false"]),
    "4 bits": ("w4a16", ["algorithm=rtn"]),
    "4 bits per channel": ("w4a16", ["algorithm=rtn", "group_size=channel"]),
    "8 bits": ("w8a16", []),
    "2:4": ("sparse-2of4", ["algorithm=magnitude"]),
    "half": ("sparse", []),
    "2:4, then fp8": ("sparse-2of4+fp8", ["sparse-2of4.algorithm=magnitude"]),
    "2:4, then int8": (
        "sparse-2of4+int8",
        ["sparse-2of4.algorithm=magnitude", "int8.algorithm=rtn"],
    ),
    "half, then 4 bits": ("sparse+w4a16", ["w4a16.algorithm=rtn"]),
}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("num_columns", [1, 31, 32, 96, 130])
def test_codes_of_every_width_are_packed_as_compressed_tensors_packs_them(
    bits: int, num_columns: int
) -> None:
    low, high = numerics.integer_range(bits)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(low, high + 1, (6, num_columns), generator=generator, dtype=torch.int8)
    words = numerics.pack_words(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)
    assert torch.equal(numerics.unpack_words(words, bits, num_columns), codes)


def with_restored_weights(source: Path, out: Path, recipe: Recipe) -> torch.nn.Module:
    """A plain float32 Llama that holds the weights restored from the output's files."""
    plan = make_plan(open_checkpoint(source), recipe)
    stored, state = tensors_of(out), {}
    for stack in plan.stacks:
        for module in stack.members:
            specs, config = stack.describe_stored(module)
            tensors = {suffix: stored.pop(f"{module}.{suffix}") for suffix in specs}
            state[f"{module}.weight"] = pipeline.dequantize(tensors, config, stack.steps)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(source)).float()
    missing, unexpected = model.load_state_dict(
        {**{n: t.float() for n, t in stored.items()}, **state}, strict=False
    )
    assert not unexpected
    # tied
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def loaded(out: Path) -> torch.nn.Module:
    """The output as transformers loads it, its activations left unquantized."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    model.apply(disable_quantization)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("shards", "config"),
    [(1, LLAMA), (3, LLAMA), (1, LLAMA | {"tie_word_embeddings": True})],
    ids=["single file", "sharded", "tied head"],
)
def test_transformers_computes_with_the_restored_weights(
    tmp_path: Path, case: str, shards: int, config: dict[str, Any]
) -> None:
    scheme, settings = CASES[case]
    source, out = write_model(tmp_path / "m", config=config, shards=shards), tmp_path / "o"
    compress(source, out, scheme=scheme, settings=settings)
    ours, theirs = (
        with_restored_weights(
            source, out, from_scheme(scheme, discover(), RecipeChanges(settings))
        ),
        loaded(out),
    )
    with torch.inference_mode():
        expected, result = ours(TOKENS).logits, theirs(TOKENS).logits
    assert expected.std() > 0.1
    assert torch.equal(result, expected)


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16"])
@pytest.mark.parametrize("group", ["32", "channel"])
def test_transformers_reads_zero_points_when_it_decodes_while_loading(
    tmp_path: Path, scheme: str, group: str
) -> None:
    # left packed, transformers 5.24 expects zero points of another shape than compressed-tensors
    # writes, and refuses
    source, out, settings = (
        write_model(tmp_path / "m"),
        tmp_path / "o",
        ["algorithm=rtn", "symmetric=false", f"group_size={group}"],
    )
    compress(source, out, scheme=scheme, settings=settings)
    ours = with_restored_weights(
        source, out, from_scheme(scheme, discover(), RecipeChanges(settings))
    ).state_dict()
    decode = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, quantization_config=decode
    ).state_dict()
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        assert torch.equal(weight, ours[name].bfloat16()), name


@pytest.mark.parametrize("activations", ["float", "quantized"])
def test_transformers_runs_nvfp4_in_bfloat16_with_the_restored_weights(
    tmp_path: Path, activations: str
) -> None:
    # its decoder gives bfloat16 whatever is asked for, so that a model in float32 fails
    settings = ["algorithm=rtn", f"activations={activations}"]
    data = {"calibration": TINY.parent / "chapters.txt", "samples": 4, "sequence_length": 128}
    compress(TINY, tmp_path / "o", scheme="nvfp4", settings=settings, **data)
    expected = with_restored_weights(
        TINY, tmp_path / "o", from_scheme("nvfp4", discover(), RecipeChanges(settings))
    ).state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        # decodes the weights
        logits = model(TOKENS).logits
        model.apply(disable_quantization)
        assert torch.equal(model(TOKENS).logits, logits) == (activations == "float")
    for name, weight in model.named_parameters():
        if name in expected:
            assert torch.equal(weight, expected[name].bfloat16()), name
    assert {name for name, _ in model.named_parameters()} >= {
        n for n in expected if n.endswith("_proj.weight")
    }


MIXED = """
[[layers]]
match = "*.self_attn.*"
steps = ["fp8"]
[[layers]]
match = "*.layers.0.mlp.*"
steps = [{ use = "w4a16", algorithm = "rtn" }]
[[layers]]
match = "*.down_proj"
steps = []
[[layers]]
match = "*.mlp.*"
steps = [{ use = "sparse-2of4", algorithm = "magnitude" }]
"""


def test_a_model_of_unlike_layers_is_read_layer_by_layer(tmp_path: Path) -> None:
    source, out, recipe = write_model(tmp_path / "m"), tmp_path / "o", tmp_path / "recipe.toml"
    recipe.write_text(MIXED)
    compress(source, out, recipe=recipe)
    ours, theirs = with_restored_weights(source, out, from_file(recipe, discover())), loaded(out)
    with torch.inference_mode():
        assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)


def test_layers_left_alone_are_loaded_as_they_were(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m"), tmp_path / "o"
    compress(source, out, scheme="fp8", ignore=["*.layers.0.*", "*.o_proj"])
    before, after = tensors_of(source), dict(loaded(out).named_parameters())
    for name in (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "lm_head.weight",
    ):
        assert torch.equal(after[name], before[name].float())


CALIBRATED = {
    "fp8, static": ("fp8", ["activations=static"]),
    "int8": ("int8", []),
    "int8 per tensor": ("int8", ["weights=tensor"]),
    "int8, static": ("int8", ["activations=static"]),
    "int8, static and asymmetric": ("int8", ["activations=static", "symmetric_activations=false"]),
    "4 bits": ("w4a16", []),
}


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's first two blocks, which a third of the time is enough for."""
    folder = tmp_path_factory.mktemp("shallow") / "model"
    tensors = {
        name: tensor
        for name, tensor in tensors_of(TINY).items()
        if not re.match(r"model\.layers\.[2-9]\.", name)
    }
    config = json.loads((TINY / "config.json").read_text()) | {"num_hidden_layers": 2}
    write_model(folder, tensors, config)
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("case", CALIBRATED)
def test_transformers_computes_with_the_scales_that_calibration_found(
    shallow: Path, tmp_path: Path, case: str
) -> None:
    scheme, settings = CALIBRATED[case]
    text = TINY.parent / "chapters.txt"
    compress(
        shallow,
        tmp_path / "o",
        scheme=scheme,
        settings=settings,
        calibration=text,
        samples=4,
        sequence_length=128,
    )
    ours, theirs = (
        with_restored_weights(
            shallow, tmp_path / "o", from_scheme(scheme, discover(), RecipeChanges(settings))
        ),
        loaded(tmp_path / "o"),
    )
    stored = {
        name: tensor
        for name, tensor in tensors_of(tmp_path / "o").items()
        if name.endswith(("input_scale", "input_zero_point"))
    }
    assert bool(stored) == ("static" in case)
    held = theirs.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(held[name].float(), tensor.float()), name
    with torch.inference_mode():
        # activations left alone
        assert torch.equal(theirs(TOKENS).logits, ours(TOKENS).logits)
    # activations as they are served
    change = loss(tmp_path / "o", 2000) - loss(shallow, 2000)
    assert change != 0
    assert abs(change) < math.log(1.02)


@functools.cache
def loss(folder: Path, characters: int) -> float:
    """Mean nats for each token of the beginning of the example's text, as transformers runs the
    model.
    """
    text = (TINY.parent / "chapters.txt").read_text()[:characters]
    ids = torch.tensor([AutoTokenizer.from_pretrained(TINY)(text)["input_ids"][:1025]])
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            ids[:, :-1]
        ).logits
    return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item()


def test_the_example_s_perplexity_stays_within_one_percent(tmp_path: Path) -> None:
    compress(TINY, tmp_path / "o", scheme="fp8")
    before, after = loss(TINY, 6000), loss(tmp_path / "o", 6000)
    # nats for each of 4096 tokens: a model that knows English
    assert before < 5
    assert before != after
    assert abs(after - before) < math.log(1.01)


# What an author may change in the template, and what the kit says of it.
MISTAKES = {
    "scales that only dequantize halves": (
        [
            (
                '"weight_scale": layer.qparams["scale"]',
                '"weight_scale": 2 * layer.qparams["scale"]',
            ),
            ('tensors["weight_scale"])', 'tensors["weight_scale"] / 2)'),
        ],
        "transformers computes with other weights: logits differ by",
    ),
    "a reason": (
        [("    bits = 4\n", '    bits = 4\n    transformers_reason = "it is a secret"\n')],
        "`Options.transformers_reason`: it is a secret",
    ),
}


@pytest.mark.parametrize("mistake", [None, *MISTAKES])
def test_the_kit_proves_that_transformers_loads_what_a_scheme_stores(
    tmp_path: Path, mistake: str | None
) -> None:
    package = write_package("my-own", tmp_path)
    module = package / "bitpress_my_own.py"
    text = module.read_text()
    changes, words = MISTAKES[mistake] if mistake else ([], "1 passed")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    folder = install(
        tmp_path / "site", "bitpress-my-own", text, "[bitpress.schemes]\nmy-own = bitpress_my_own\n"
    )
    done = kit(folder, "--scheme", "my-own", "-k", "transformers")
    assert words in done.stdout
    assert done.returncode == (0 if mistake in (None, "a reason") else 1)
