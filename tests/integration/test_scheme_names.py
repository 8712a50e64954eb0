"""Names that people bring from other tools lead to the right scheme with the right options."""

from __future__ import annotations

from typing import Any

import pytest

from bitpress.errors import RecipeError
from bitpress.schemes.registry import discover


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    [
        ("FP8", "fp8", {}),
        ("FP8_DYNAMIC", "fp8", {"activations": "dynamic"}),
        ("FP8_BLOCK", "fp8-block", {}),
        ("W8A8", "int8", {"activations": "dynamic"}),
        ("INT8", "int8", {}),
        ("W8A16", "w8a16", {"activations": "float"}),
        ("W4A16", "w4a16", {"symmetric": True, "group_size": 128}),
        ("W4A16_ASYM", "w4a16", {"symmetric": False, "group_size": 128}),
        ("W4AFP8", "w4a16", {"activations": "fp8"}),
        ("W4A8", "w4a16", {"activations": "int8"}),
        ("int4", "w4a16", {}),
        ("gptq", "w4a16", {"algorithm": "gptq"}),
        ("AWQ", "w4a16", {"algorithm": "awq"}),
        ("NVFP4", "nvfp4", {"activations": "quantized"}),
        ("NVFP4A16", "nvfp4", {"activations": "float"}),
        ("MXFP4", "mxfp4", {"activations": "quantized"}),
        ("MXFP4A16", "mxfp4", {"activations": "float"}),
        ("MXFP8", "mxfp8", {"activations": "quantized"}),
        ("MXFP8A16", "mxfp8", {"activations": "float"}),
        ("2:4", "sparse-2of4", {}),
        ("SparseGPT", "sparse", {"algorithm": "sparsegpt"}),
        ("wanda", "sparse", {"algorithm": "wanda"}),
    ],
)
def test_a_well_known_name_is_a_scheme_with_options(
    name: str, scheme: str, options: dict[str, Any]
) -> None:
    step = discover().find(name).step({})
    assert step.scheme.name == scheme
    assert {option: getattr(step.options, option) for option in options} == options


def test_names_of_one_scheme_are_no_names_of_another() -> None:
    schemes = discover().schemes
    names = [name.lower() for name in schemes]
    names += [alias.lower() for scheme in schemes.values() for alias in scheme.aliases]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["fp6", "MXFP6", "w4a4", "int3", "nf4"])
def test_for_another_format_none_is_suggested(name: str) -> None:
    with pytest.raises(RecipeError, match="is not installed") as error:
        discover().find(name)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("nvpf4", "nvfp4"), ("fp8-blok", "fp8-block"), ("w4a61", "w4a16"), ("sprase", "sparse")],
)
def test_for_a_misspelled_name_the_nearest_is_suggested(name: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean {nearest!r}"):
        discover().find(name)
