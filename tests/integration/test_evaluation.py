"""What `eval` says of an output is what transformers, with compressed-tensors, makes of it: weights
and activations.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fixtures.learner_scheme import CONFIG, runnable_model
from transformers import AutoModelForCausalLM

import bitpress
from bitpress.api import evaluate
from bitpress.conformance.models import llama_tensors

LENGTH, TOKENS = 64, 64 * 16
CASES = {
    "fp8": ("fp8", []),
    "fp8 per tensor": ("fp8", ["weights=tensor"]),
    "fp8, static": ("fp8", ["activations=static"]),
    "fp8 in blocks": ("fp8-block", []),
    "int8": ("int8", ["algorithm=rtn"]),
    "int8, rotated": ("int8", ["algorithm=rtn", "rotate=hadamard"]),
    "int8, asymmetric": ("int8", ["algorithm=rtn", "symmetric_activations=false"]),
    "int8, static": ("int8", ["algorithm=rtn", "smoothing=0", "activations=static"]),
    "int8, static and asymmetric": (
        "int8",
        ["algorithm=rtn", "smoothing=0", "activations=static", "symmetric_activations=false"],
    ),
    "4 bits": ("w4a16", ["algorithm=rtn"]),
    "8 bits": ("w8a16", []),
    "8 bits, 16-bit inputs": ("w8a16", ["activations=int16"]),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runnable_model(
        tmp_path_factory.mktemp("made") / "model", config=CONFIG | {"num_key_value_heads": 4}
    )


def log_probabilities(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return (
            model(input_ids=ids[:-1].view(-1, LENGTH), use_cache=False)
            .logits.flatten(0, 1)
            .double()
            .log_softmax(-1)
        )


@pytest.mark.parametrize("case", CASES)
def test_kl_divergence_agrees_with_transformers_within_one_percent(
    model: Path, tmp_path: Path, case: str
) -> None:
    (scheme, settings), text = CASES[case], model.parent / "text.txt"
    bitpress.compress(
        model,
        tmp_path / "out",
        scheme=scheme,
        settings=settings,
        calibration=text,
        samples=4,
        sequence_length=64,
    )
    result = bitpress.eval(
        tmp_path / "out", text, model, sequence_length=LENGTH, max_tokens=TOKENS, threads=1
    )
    ids = torch.tensor([int(word[1:]) for word in text.read_text().split()[: TOKENS + 1]])
    p, q = log_probabilities(model, ids), log_probabilities(tmp_path / "out", ids)
    kl = (p.exp() * (p - q)).sum(1).mean().item()
    assert kl > 0
    assert result.kl == pytest.approx(kl, rel=0.01)
    assert result.rise == pytest.approx(
        (p - q).gather(1, ids[1:, None]).mean().item(), rel=0.02, abs=1e-6
    )


def test_int8_loses_less_of_a_rotated_model_with_outlier_channels(tmp_path: Path) -> None:
    tensors = llama_tensors(config=CONFIG)
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[[5, 77]] *= 40
    model, losses = runnable_model(tmp_path / "model", tensors), {}
    for rotate in ("none", "hadamard"):
        settings = ["algorithm=rtn", "smoothing=0", f"rotate={rotate}"]
        out = tmp_path / rotate
        bitpress.compress(model, out, scheme="int8", settings=settings)
        text = tmp_path / "text.txt"
        check = evaluate(out, text, model, sequence_length=LENGTH, max_tokens=TOKENS)
        losses[rotate] = check.kl
    assert losses["hadamard"] < losses["none"] / 2
