"""Every scheme works on numbers that lie on a GPU, though the GPU is pretended (`elsewhere`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fixtures.fake_gpu import GPU, Elsewhere, Pretended, bare
from fixtures.learner_scheme import CONFIG, runnable_model
from torch import Tensor

import bitpress
from bitpress import Layer
from bitpress.conformance import trial
from bitpress.numerics import kernel_trial
from bitpress.runtime import devices
from bitpress.schemes import pipeline
from bitpress.schemes.activation_quantizer import find_activation_quantizer
from bitpress.schemes.registry import Step, discover

STEPS = {
    f"{name}, {label}": step
    for name in sorted(discover().schemes)
    for label, step in trial.variants(name, (), discover()).items()
}
TOKENS = 160


@pytest.fixture(autouse=True)
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels do not find the numbers of a GPU that is not there."""
    monkeypatch.setattr(kernel_trial, "can_fuse", lambda device: False)


def everything(step: Step, weight: Tensor, move: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """All tensors that a scheme's hooks give back for a layer whose weight and inputs lie
    somewhere.
    """
    draw = torch.Generator().manual_seed(0)
    out, width = weight.shape
    layer, stats = Layer("layer", move(weight), torch.bfloat16), {}
    for _ in range(2 if step.calibrated else 0):
        inputs = torch.randn(TOKENS, width, generator=draw)
        reference = inputs + 0.01 * torch.randn(TOKENS, width, generator=draw)
        residual = torch.randn(TOKENS, out, generator=draw)
        pipeline.merge(
            stats,
            pipeline.observe(step, layer.weight, move(inputs), move(reference), move(residual)),
        )
    if step.scheme.takes_argument("observe", "weight"):
        pipeline.merge(stats, pipeline.observe(step, layer.weight))
    record = pipeline.serialize(
        pipeline.pack(pipeline.quantize(layer, [step], [stats]), [step]), [step]
    )
    result = {"restored": pipeline.dequantize(record.tensors, record.config, [step], (out, width))}
    if step.rescales and (factors := pipeline.rescale(layer, [step], [stats])) is not None:
        result["factors"] = factors
    if (quantizer := find_activation_quantizer(record.tensors, record.config, [step])) is not None:
        result["inputs"] = quantizer(move(torch.randn(TOKENS, width, generator=draw)))
    return {**record.tensors, **result}


@pytest.mark.parametrize("name", STEPS)
def test_hooks_give_on_a_gpu_what_they_give_on_the_cpu(name: str) -> None:
    step = STEPS[name]
    weight = trial.weights(step)["normal"]
    expected = everything(step, weight, torch.clone)
    with Pretended():
        result = everything(step, weight, lambda tensor: tensor.to(GPU))
    assert result.keys() == expected.keys()
    for key in ("restored", *({"inputs", "factors"} & result.keys())):
        assert result[key].device == GPU, key
    for key, tensor in expected.items():
        assert trial.are_equal(bare(result[key]), tensor), key


# of rows that a program has and the weight has not
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in STEPS if STEPS[name].calibrated])
def test_a_gpu_with_triton_gives_what_the_cpu_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fixtures.interpreted_triton import interpret_on_fake_gpu

    interpret_on_fake_gpu(monkeypatch, block=64)
    step = STEPS[name]
    weight = trial.weights(step)["normal"][:16]
    expected = everything(step, weight, torch.clone)
    with Pretended():
        result = everything(step, weight, lambda tensor: tensor.to(GPU))
    for key, tensor in expected.items():
        assert trial.are_equal(bare(result[key]), tensor), key


RUNS = {
    "fp8": ("fp8", ()),
    "int8": ("int8", ("smoothing=0.5",)),
    "w4a16 by GPTQ": ("w4a16", ("group_size=32",)),
    "nvfp4": ("nvfp4", ()),
    "2:4, then fp8": ("sparse-2of4+fp8", ()),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runnable_model(
        tmp_path_factory.mktemp("elsewhere") / "model", config=CONFIG | {"num_hidden_layers": 2}
    )
    (folder.parent / "check.txt").write_text((folder.parent / "text.txt").read_text()[:2000])
    return folder


class NoStream:
    """In place of one: the CPU does one thing after the other."""

    def __init__(self, device: torch.device) -> None:
        assert device == GPU


@pytest.fixture
def threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a pool have the GPU as well."""
    for name in ("set_device", "set_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    assign = devices.ThreadDevices.assign

    def assign_pretended(self: devices.ThreadDevices) -> None:
        assign(self)
        # as long as the thread lives
        Pretended().__enter__()

    monkeypatch.setattr(devices.ThreadDevices, "assign", assign_pretended)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_is_proved_and_as_good_as_on_the_cpu(
    model: Path, tmp_path: Path, threads_too: None, name: str
) -> None:
    scheme, settings = RUNS[name]
    text = model.parent / "check.txt"
    options = {
        "calibration": model.parent / "text.txt",
        "samples": 12,
        "sequence_length": 32,
        "threads": 1,
    }
    # blocks run in bfloat16 there: what is drawn for gradients follows from the last digits
    with patch("bitpress.compression.calibrated.has_cpu_feature", lambda *names: True):
        here = bitpress.compress(
            model, tmp_path / "cpu", scheme=scheme, settings=settings, **options
        )
    with Pretended():
        on_gpu = bitpress.compress(
            model,
            tmp_path / "gpu",
            scheme=scheme,
            settings=settings,
            device="cuda:0",
            check=text,
            **options,
        )
    assert on_gpu.check is not None
    assert not [warning for warning in on_gpu.warnings if "backward" in warning]
    for module, layer in here.layers.items():
        assert on_gpu.layers[module].error == pytest.approx(layer.error, rel=0.05), module
    assert on_gpu.check.kl == pytest.approx(
        bitpress.eval(tmp_path / "cpu", against=model, text=text).kl, rel=0.3
    )


def test_tensors_on_two_devices_do_not_meet() -> None:
    with Pretended():
        x = torch.ones(3).to(GPU)
        assert isinstance(x, Elsewhere)
        assert (x + x).cpu().tolist() == [2.0, 2.0, 2.0]
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: x.numpy(),
            lambda: torch.where(x > 0, x, torch.ones(3)),
        ):
            with pytest.raises((RuntimeError, TypeError)):
                wrong()
