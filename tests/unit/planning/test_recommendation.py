"""What is recommended follows from plans, from what schemes say of a device, and from losses that
they name; every scheme is an alternative, or out for one reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from fixtures.toy_scheme import TOY

import bitpress
from bitpress.conformance.commands import command, install, plugins, refusal
from bitpress.conformance.models import LLAMA, llama_tensors, write_model

GB = 10**9

# On an A100 integers run, on an H100 they are a fallback; weights only run anywhere, and nothing on
# a TPU.
INTEGERS = """
MEASURED_LOSSES = [
    bitpress.MeasuredLoss("a small model", 0.004),
    bitpress.MeasuredLoss("a small model", 0.003, {"levels": 100}),
]

@hookimpl
def validate_hardware(hardware):
    levels = {"NVIDIA A100": "recommended", "NVIDIA H100": "degraded", "Google TPU": "unsupported"}
    level = levels.get(hardware.name, "supported")
    return [Finding(level, f"{level} there"), Finding("degraded", "worse news")]
"""

COPY = '''
"""Leaves layers as they are."""
from bitpress import Finding, MeasuredLoss, StoredLayer, hookimpl

MEASURED_LOSSES = [
    MeasuredLoss("a small model", 0.1, then="integers"),
    MeasuredLoss("a small model", 0.1, then="absent"),
]

@hookimpl
def quantize(layer): return layer

@hookimpl
def serialize(layer): return StoredLayer({"weight": layer.weight.to(layer.dtype)}, None)

@hookimpl
def dequantize(tensors): return tensors["weight"].float()

@hookimpl
def validate_hardware(hardware): return [Finding("supported", "runs anywhere")]
'''


@pytest.fixture
def schemes(tmp_path: Path) -> Path:
    """Schemes `integers`, which quantizes activations; `weights`, which does not; and `copy`."""
    folder = tmp_path / "plugins"
    text = TOY.rpartition("@hookimpl")[0]
    weights = text + INTEGERS.replace("0.004", "0.00001")
    integers = text.replace(
        '"weights": weights}',
        '"weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}',
    )
    for name, module in (("integers", integers + INTEGERS), ("weights", weights), ("copy", COPY)):
        points = f"[bitpress.schemes]\n{name} = bitpress_scheme_{name}\n"
        install(folder, f"bitpress-scheme-{name}", module, points)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("device", "best"),
    [("A100", "integers"), ("H100", "integers"), ("RTX 4090", "integers"), ("Google TPU", None)],
)
def test_the_device_decides(schemes: Path, model: Path, device: str, best: str | None) -> None:
    with plugins(schemes):
        result = bitpress.recommend(model, serve_on=device)
    assert result.device.name.endswith(device)
    assert (result.best and result.best.variant.scheme) == best
    names = [alternative.variant.scheme for alternative in result.alternatives]
    assert names == (["integers", "weights"] if best else [])
    causes = {out.scheme: out.cause for out in result.rejected}
    assert causes.pop("copy") == "size"
    if not best:
        assert {out.reason for out in result.rejected if out.cause == "device"} == {
            "unsupported there"
        }


def test_a_loss_is_one_that_was_measured_with_these_options(schemes: Path, model: Path) -> None:
    with plugins(schemes):
        best = bitpress.recommend(model, serve_on="A100").best
    assert best is not None
    assert [(loss.model, loss.kl) for loss in best.variant.losses] == [("a small model", 0.004)]
    assert best.reason == "recommended there"
    assert (best.quantizes_activations, best.needs_data, best.max_tokens) == (True, False, None)


def test_sizes_are_those_of_the_plan(schemes: Path, model: Path) -> None:
    memory = 10 * GB
    with plugins(schemes):
        result = bitpress.recommend(model, serve_on="A100", memory=memory)
        plan = bitpress.plan(model, scheme="integers")
    assert result.best is not None
    assert result.best.num_bytes == plan.output_bytes
    rows = LLAMA["num_key_value_heads"] * LLAMA["head_dim"] * 2 * LLAMA["num_hidden_layers"]
    assert result.best.max_tokens == (int(0.9 * memory) - plan.output_bytes) // (2 * rows)


def test_what_does_not_fit_is_out_and_nothing_may_be_left(schemes: Path, model: Path) -> None:
    with plugins(schemes):
        size = bitpress.plan(model, scheme="integers").output_bytes
        fits = bitpress.recommend(model, serve_on="A100", memory=int(size / 0.9) + 100)
        result = bitpress.recommend(model, serve_on="A100", memory=int(size / 0.9) - 100)
    assert fits.best is not None
    assert (result.best, result.alternatives) == (None, ())
    assert {out.scheme: out.cause for out in result.rejected} == {
        "copy": "size",
        "integers": "memory",
        "copy+integers": "memory",
        "weights": "memory",
    }


def test_a_composition_that_is_no_smaller_than_a_step_is_out(schemes: Path, model: Path) -> None:
    with plugins(schemes):
        result = bitpress.recommend(model, serve_on="A100")
    reasons = {out.scheme: out.reason for out in result.rejected}
    assert reasons["copy+integers"] == "it is no smaller than integers alone"


def test_a_model_that_nothing_takes_is_an_error(schemes: Path, tmp_path: Path) -> None:
    config = LLAMA | {"quantization_config": {"quant_method": "gptq"}}
    model = write_model(tmp_path / "quantized", llama_tensors(), config)
    with plugins(schemes), pytest.raises(bitpress.CheckpointError, match="already quantized"):
        bitpress.recommend(model, serve_on="A100")
    assert "no known device 'X9'" in refusal("recommend", model, "--serve-on", "X9")
    assert "--memory much" in refusal("recommend", model, "--memory", "much")


def test_without_schemes_it_says_where_they_come_from(model: Path) -> None:
    with plugins(None), pytest.raises(bitpress.RecipeError, match="no schemes are installed"):
        bitpress.recommend(model)


def test_the_command_prints_the_command_to_run(schemes: Path, model: Path) -> None:
    done = command("recommend", model, "--serve-on", "a100", "--memory", "80GB", path=schemes)
    assert (done.returncode, done.stderr) == (0, "")
    assert "measured on a small model: KL 0.004 nats per token" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "bitpress compress" in line)
    assert line.split() == [
        "bitpress", "compress", str(model), "model-integers", "--scheme", "integers",
    ]  # fmt: skip
    text = command("recommend", model, "--serve-on", "A100", "--json", path=schemes).stdout
    document = json.loads(text)
    assert document["alternatives"][0]["command"] == line.strip()
    assert document["alternatives"][0]["measured"] == [{"model": "a small model", "kl": 0.004}]
    assert {out["scheme"] for out in document["rejected"]} >= {"copy"}


def test_where_nothing_fits_the_exit_code_is_1(schemes: Path, model: Path) -> None:
    done = command("recommend", model, "--serve-on", "A100", "--memory", "1kB", path=schemes)
    assert done.returncode == 1
    assert "of weights do not fit" in done.stdout
    assert (
        "NVIDIA A100 serves it with no installed scheme; a device with more memory" in done.stderr
    )


def test_the_result_is_frozen(schemes: Path, model: Path) -> None:
    with plugins(schemes):
        result = bitpress.recommend(model, serve_on="A100")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        result.memory = 1  # type: ignore[misc]


def test_losses_that_are_none_are_a_problem_of_the_scheme(tmp_path: Path) -> None:
    module = TOY + "\nMEASURED_LOSSES = {'llama': 0.1}\n"
    points = "[bitpress.schemes]\ntoy = bitpress_scheme_toy\n"
    folder = install(tmp_path / "p", "bitpress-scheme-toy", module, points)
    done = command("schemes", path=folder)
    assert "MEASURED_LOSSES is not a list of bitpress.MeasuredLoss" in done.stderr
