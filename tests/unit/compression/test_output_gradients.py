"""Gradients of layers' outputs, held against those of the whole model as transformers runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from fixtures.learner_scheme import install_learner, runnable_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from bitpress.api import compress, plan
from bitpress.compression import calibrated
from bitpress.compression.calibration import output_gradients
from bitpress.compression.calibration.block import compress_block
from bitpress.compression.calibration.block_result import BlockResult
from bitpress.compression.calibration.layer_groups import BlockPlan
from bitpress.compression.calibration.output_gradients import StatisticsByGroup
from bitpress.conformance.commands import plugins
from bitpress.conformance.models import files_of, tensors_of
from bitpress.planning import memory_estimate
from bitpress.planning.memory_estimate import estimate_memory

SAMPLES, LENGTH = 6, 48

# Tokens of a batch: two sequences.
BATCH_TOKENS = 96


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(memory_estimate, "BATCH_TOKENS", BATCH_TOKENS)
    with plugins(install_learner(tmp_path / "plugins")):
        yield


def run(source: Path, out: Path, *settings: str, max_memory: int | None = None) -> Path:
    compress(
        source,
        out,
        scheme="learner",
        settings=settings,
        calibration=source.parent / "text.txt",
        samples=SAMPLES,
        sequence_length=LENGTH,
        max_memory=max_memory,
    )
    return out


def squared_gradients(source: Path, num_batches: int) -> dict[str, torch.Tensor]:
    """By layer the sum of the squares of its output's gradients (out,), by one backward pass of the
    whole model for each batch.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    words = (source.parent / "text.txt").read_text().split()[: SAMPLES * LENGTH]
    batches = torch.tensor([int(word[1:]) for word in words]).view(
        -1, BATCH_TOKENS // LENGTH, LENGTH
    )
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, gradient: torch.Tensor) -> None:
        square = gradient.flatten(0, 1).square().sum(0)
        sums[name] = sums.get(name, torch.zeros(())) + square

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_full_backward_hook(
                lambda module, inputs, outputs, name=name: add(name, outputs[0])
            )
    for number in range(num_batches):
        logits = model(input_ids=batches[number], use_cache=False).logits.flatten(0, 1)
        uniform = torch.rand(BATCH_TOKENS, generator=torch.Generator().manual_seed(number))
        cumulative = logits.detach().double().softmax(-1).cumsum(-1).numpy()
        drawn = [
            int(np.searchsorted(row, u))
            for row, u in zip(cumulative, uniform.tolist(), strict=True)
        ]
        functional.cross_entropy(logits, torch.tensor(drawn), reduction="sum").backward()
    return sums


@pytest.mark.parametrize(("gradient_tokens", "num_batches"), [(10_000, 3), (BATCH_TOKENS, 1)])
def test_a_scheme_that_names_it_is_given_the_gradient_of_every_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gradient_tokens: int, num_batches: int
) -> None:
    monkeypatch.setattr(memory_estimate, "GRADIENT_TOKENS", gradient_tokens)
    source = runnable_model(tmp_path / "m")
    tensors = tensors_of(run(source, tmp_path / "o", "slopes=true"))
    for name, expected in squared_gradients(source, num_batches).items():
        torch.testing.assert_close(tensors[f"{name}.slopes"], expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [[], ["slopes=true", "reference=none"]],
    ids=["the scheme makes no use of it", "the user wants nothing of the source"],
)
def test_no_gradient_is_taken_where_options_say_so(tmp_path: Path, settings: list[str]) -> None:
    source = runnable_model(tmp_path / "m")
    with patch.object(output_gradients._Backward, "run", side_effect=AssertionError):
        tensors = tensors_of(run(source, tmp_path / "o", *settings))
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("slopes"))


def test_rows_that_a_fold_has_rescaled_are_decided_without_gradients(tmp_path: Path) -> None:
    source = runnable_model(tmp_path / "m")
    tensors = tensors_of(run(source, tmp_path / "o", "slopes=true", "factors=2 1"))
    for name, tensor in tensors.items():
        if name.endswith("slopes"):
            # v_proj and up_proj make the inputs of others
            is_rescaled = any(
                part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_")
            )
            assert bool(tensor.any()) != is_rescaled, name


def test_states_and_statistics_on_disk_change_no_byte(tmp_path: Path) -> None:
    source = runnable_model(tmp_path / "m")
    roomy = files_of(run(source, tmp_path / "a", "slopes=true"))
    planned = plan(source, scheme="learner", settings=["slopes=true"])
    least = estimate_memory(planned, shape=(SAMPLES, LENGTH))
    assert files_of(run(source, tmp_path / "b", "slopes=true", max_memory=least + 1000)) == roomy


def test_a_resumed_run_takes_gradients_of_what_is_left_and_writes_the_same_bytes(
    tmp_path: Path,
) -> None:
    source, out = runnable_model(tmp_path / "m"), tmp_path / "b"
    whole = files_of(run(source, tmp_path / "a", "slopes=true"))

    def compress_first_block(block_plan: BlockPlan, *others: Any) -> BlockResult:
        if block_plan.prefix != "model.layers.0.":
            raise KeyboardInterrupt
        return compress_block(block_plan, *others)

    with (
        patch.object(calibrated, "compress_block", compress_first_block),
        pytest.raises(KeyboardInterrupt),
    ):
        run(source, out, "slopes=true")
    backward, positions = output_gradients._Backward.run, []

    def counted(self: output_gradients._Backward, position: int) -> StatisticsByGroup:
        positions.append(position)
        return backward(self, position)

    with patch.object(output_gradients._Backward, "run", counted):
        run(source, out, "slopes=true")
    assert len(positions) == 2 * SAMPLES * LENGTH // BATCH_TOKENS
    assert files_of(out) == whole


def test_a_model_that_cannot_be_run_backward_is_compressed_without_gradients(
    tmp_path: Path,
) -> None:
    source = runnable_model(tmp_path / "m")
    broken = RuntimeError("element 0 of tensors does not require grad")
    with patch.object(output_gradients._Backward, "run", side_effect=broken):
        out = run(source, tmp_path / "o", "slopes=true")
    assert not any(t.any() for name, t in tensors_of(out).items() if name.endswith("slopes"))
    warnings = json.loads((out / "bitpress.json").read_text())["warnings"]
    assert [w for w in warnings if "backward" in w] == [
        "the model cannot be run backward (element 0 of tensors does not require grad): rows do "
        "not make up for each other's errors"
    ]
