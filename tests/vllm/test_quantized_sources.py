"""Real vLLM's loader places what we make of models that are published in 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from fixtures.coded_layers import (
    AWQ,
    GPTQ,
    INTEGERS,
    MXFP4,
    awq,
    code_layers,
    gptq,
    mxfp4,
    packed,
    write_gpt_oss,
)
from fixtures.deepseek_v4 import write_deepseek_v4

import bitpress
from bitpress.conformance.models import LLAMA, llama_tensors, write_model

SOURCES = {
    "AWQ": (AWQ, awq),
    "GPTQ": (GPTQ, gptq),
    "packed integers": (INTEGERS, packed),
    "MXFP4": (MXFP4, mxfp4),
}
GPT_OSS, DEEPSEEK_V4 = "gpt-oss", "DeepSeek V4"
SETTINGS = {
    "fp8": [],
    "w4a16": ["algorithm=rtn", "group_size=32"],
    "nvfp4": ["algorithm=rtn", "activations=float"],
}

Load = Callable[[Sequence[Path]], Mapping[str, Sequence[str]]]


@pytest.fixture(scope="module")
def faults(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Sequence[str]]:
    """What vLLM says of every output, by its source and scheme."""
    root = tmp_path_factory.mktemp("sources")
    models = {}
    for name, (table, code) in SOURCES.items():
        stored, _ = code_layers(
            llama_tensors(), lambda module, code=code: code if ".layers." in module else None
        )
        config = LLAMA | {"quantization_config": table}
        models[name] = write_model(root / name / "model", stored, config)
    models[GPT_OSS], _ = write_gpt_oss(root / GPT_OSS)
    models[DEEPSEEK_V4], _ = write_deepseek_v4(root / DEEPSEEK_V4)

    outputs = {}
    for name, model in models.items():
        ignore = ["*.experts"] if name == GPT_OSS else []
        for scheme, settings in SETTINGS.items():
            out = root / name / scheme
            outputs[str(out)] = f"{name} {scheme}"
            bitpress.compress(
                model, out, scheme=scheme, settings=settings, ignore=ignore, more_bits=True
            )
    texts = load([Path(out) for out in outputs])
    return {outputs[out]: texts[out] for out in outputs}


@pytest.mark.parametrize("scheme", SETTINGS)
@pytest.mark.parametrize("name", [*SOURCES, GPT_OSS, DEEPSEEK_V4])
def test_no_parameter_is_unfilled(
    faults: Mapping[str, Sequence[str]], name: str, scheme: str
) -> None:
    assert not faults[f"{name} {scheme}"]
