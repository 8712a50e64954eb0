"""The model card says of each scheme's output only what loaders do with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bitpress
from bitpress.conformance.models import LLAMA, llama_tensors, write_model
from bitpress.planning.loaders import describe_loaders

CONFIG = LLAMA | {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        dtype: write_model(
            folder / str(dtype),
            {name: tensor.to(dtype) for name, tensor in llama_tensors(config=CONFIG).items()},
            CONFIG | {"dtype": str(dtype).removeprefix("torch.")},
        )
        for dtype in (torch.bfloat16, torch.float16)
    }


@pytest.mark.parametrize(
    ("scheme", "settings", "vllm", "transformers"),
    [
        ("fp8", (), True, True),
        ("int8", ("algorithm=rtn",), True, True),
        ("w4a16", (), True, True),
        ("w4a16", ("symmetric=false",), True, "dequantize"),
        ("w4a16", ("activations=fp8",), True, True),
        ("w4a16", ("activations=int8",), True, True),
        ("nvfp4", (), True, True),
        ("mxfp4", (), True, True),
        ("mxfp8", (), True, True),
        ("sparse-2of4", (), True, True),
        ("sparse-2of4", ("layout=bitmask",), True, False),
        ("sparse", ("layout=bitmask",), True, False),
        ("w8a16", ("activations=int16",), False, True),
    ],
)
def test_what_is_claimed_of_a_scheme(
    models: dict[torch.dtype, Path],
    scheme: str,
    settings: tuple[str, ...],
    vllm: bool,
    transformers: bool | str,
) -> None:
    plan = bitpress.plan(models[torch.bfloat16], scheme=scheme, settings=settings)
    loaders = describe_loaders(plan)
    assert (loaders.vllm_reason is None) == vllm == (loaders.vllm_devices is not None)
    assert (loaders.transformers_reason is None) == bool(transformers)
    assert loaders.needs_dequantizing == (transformers == "dequantize")


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp8"])
def test_small_scales_in_float16_models_are_not_said_to_load_in_transformers(
    models: dict[torch.dtype, Path], scheme: str
) -> None:
    loaders = describe_loaders(bitpress.plan(models[torch.float16], scheme=scheme))
    assert loaders.transformers_reason is not None
    assert "bfloat16" in loaders.transformers_reason
    others = describe_loaders(bitpress.plan(models[torch.float16], scheme="fp8"))
    assert others.transformers_reason is None
