"""Real vLLM's loader places what we make of models that are published in 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures.coded_layers import (
    AWQ,
    FP8_ROWS,
    FP8_TILES,
    GPTQ,
    INT8_ROWS,
    INTEGERS,
    MXFP4,
    Code,
    awq,
    code_layers,
    fp8_rows,
    fp8_tiles,
    gptq,
    int8_rows,
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
# Codes that are kept, each by the scheme of its form.
KEPT: dict[str, tuple[dict[str, Any], Code, str, list[str]]] = {
    "AWQ": (AWQ, awq, "w4a16", ["group_size=32", "symmetric=false"]),
    "GPTQ": (GPTQ, gptq, "w4a16", ["group_size=32"]),
    "MXFP4": (MXFP4, mxfp4, "nvfp4", ["activations=float"]),
    "FP8 in tiles": (FP8_TILES, fp8_tiles, "fp8-block", []),
    "FP8": (FP8_ROWS, fp8_rows, "fp8", []),
    "INT8": (INT8_ROWS, int8_rows, "int8", []),
}
GPT_OSS, DEEPSEEK_V4 = "gpt-oss", "DeepSeek V4"
SETTINGS = {
    "fp8": [],
    "w4a16": ["algorithm=rtn", "group_size=32"],
    "nvfp4": ["algorithm=rtn", "activations=float"],
}

Load = Callable[[Sequence[Path]], Mapping[str, Sequence[str]]]


def write_coded(folder: Path, table: dict[str, Any], code: Code) -> Path:
    """A model in float16, as AWQ's scales are, all of whose layers are coded."""
    tensors = {name: tensor.half() for name, tensor in llama_tensors().items()}
    stored, _ = code_layers(tensors, lambda name: code if ".layers." in name else None)
    config = {**LLAMA, "torch_dtype": "float16", "quantization_config": table}
    return write_model(folder, stored, config)


@pytest.fixture(scope="module")
def faults(load: Load, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Sequence[str]]:
    """What vLLM says of every output, by its source and scheme."""
    root = tmp_path_factory.mktemp("sources")
    models = {
        name: write_coded(root / name / "model", table, code)
        for name, (table, code) in SOURCES.items()
    }
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
    for name, (table, code, scheme, settings) in KEPT.items():
        model = write_coded(root / "kept" / name / "model", table, code)
        out = model.with_name("out")
        outputs[str(out)] = f"kept {name}"
        bitpress.compress(model, out, scheme=scheme, settings=settings)
    texts = load([Path(out) for out in outputs])
    return {outputs[out]: texts[out] for out in outputs}


@pytest.mark.parametrize("scheme", SETTINGS)
@pytest.mark.parametrize("name", [*SOURCES, GPT_OSS, DEEPSEEK_V4])
def test_no_parameter_is_unfilled(
    faults: Mapping[str, Sequence[str]], name: str, scheme: str
) -> None:
    assert not faults[f"{name} {scheme}"]


@pytest.mark.parametrize("name", KEPT)
def test_codes_that_were_kept_are_placed(faults: Mapping[str, Sequence[str]], name: str) -> None:
    assert not faults[f"kept {name}"]
