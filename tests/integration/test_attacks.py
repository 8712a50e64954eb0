"""Damages of an output, and who finds them: each is tried on an output of every scheme, with the
digests left as they were, made again, and with the recorded errors taken away too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from fixtures.learner_scheme import runnable_model
from fixtures.signed_manifest import Tensors, change_tensors, forge
from safetensors.torch import load_file

from bitpress import compress, verify
from bitpress.conformance.models import LLAMA, llama_tensors
from bitpress.output.layer_proof import max_error

Bound = Literal["rounding", "clipped", "error"]

# Compositions, and what bounds their weights: half a step of rounding each; the same, but for
# codes at the ends of the range, which stand for clipped weights too; or the layer's error alone.
SCHEMES: dict[str, tuple[str, Bound]] = {
    "fp8": ("fp8", "rounding"),
    "fp8 per tensor": ("fp8 weights=tensor", "rounding"),
    "fp8-block": ("fp8-block", "rounding"),
    "int8": ("int8", "error"),
    "int8 rounded": ("int8 algorithm=rtn", "clipped"),
    "w4a16": ("w4a16", "error"),
    "w4a16 by awq": ("w4a16 algorithm=awq", "clipped"),
    "w4a16 rounded": ("w4a16 algorithm=rtn group_size=32", "clipped"),
    "w4a16 rounded, zero points": ("w4a16 algorithm=rtn symmetric=false", "clipped"),
    "w8a16": ("w8a16", "clipped"),
    "nvfp4": ("nvfp4", "error"),
    "nvfp4 rounded": ("nvfp4 algorithm=rtn", "clipped"),
    "mxfp4": ("mxfp4", "error"),
    "mxfp4 rounded": ("mxfp4 algorithm=rtn", "clipped"),
    "mxfp8": ("mxfp8", "rounding"),
    "sparse": ("sparse", "rounding"),
    "sparse with data": ("sparse algorithm=sparsegpt", "error"),
    "2:4": ("sparse-2of4", "error"),
    "2:4 by magnitude": ("sparse-2of4 algorithm=magnitude", "rounding"),
    "2:4, fp8": ("sparse-2of4+fp8", "error"),
    "2:4 by magnitude, fp8": ("sparse-2of4+fp8 sparse-2of4.algorithm=magnitude", "rounding"),
    "2:4, int8": ("sparse-2of4+int8", "error"),
    "2:4, w4a16": ("sparse-2of4+w4a16", "error"),
    "half, w4a16 rounded": ("sparse+w4a16 w4a16.algorithm=rtn", "clipped"),
}
LAYERS = [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runnable_model(tmp_path_factory.mktemp("source") / "model", config=LLAMA)


@pytest.fixture(scope="module", params=SCHEMES)
def output(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Bound]:
    """An output of a scheme, and what bounds its weights."""
    text, bound = SCHEMES[request.param]
    scheme, *settings = text.split()
    out = tmp_path_factory.mktemp("out") / "out"
    options = {"samples": 8, "sequence_length": 64, "calibration": model.parent / "text.txt"}
    compress(model, out, scheme=scheme, settings=settings, **options)
    return out, bound


def stored(tensors: Tensors, layer: str) -> Tensors:
    """What is stored of a layer's weight, the codes first."""
    names = [n for n in tensors if n.startswith(layer + ".") and not n.endswith("shape")]
    names.sort(key=lambda name: -tensors[name].nbytes)
    return {name: tensors[name] for name in names if ".input_" not in name}


def change_codes(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """A damage to the bytes of a layer's codes."""

    def damage(tensors: Tensors) -> None:
        name = next(iter(stored(tensors, LAYERS[0])))
        before = tensors[name]
        numbers = before.reshape(-1).view(torch.uint8).clone()
        tensors[name] = change(numbers).view(before.dtype).view(before.shape)

    return damage


def swap_layers(tensors: Tensors) -> None:
    for suffix in [name.removeprefix(LAYERS[0]) for name in stored(tensors, LAYERS[0])]:
        first, second = LAYERS[0] + suffix, LAYERS[1] + suffix
        tensors[first], tensors[second] = tensors[second], tensors[first]


def flip_a_code(numbers: torch.Tensor) -> torch.Tensor:
    """One bit of one code: the second highest of the one in the middle."""
    numbers[len(numbers) // 2] ^= 64
    return numbers


def flip_a_scale(tensors: Tensors) -> None:
    """The lowest bit of an exponent: the scale is doubled or halved."""
    for name, tensor in stored(tensors, LAYERS[0]).items():
        if "scale" in name:
            numbers = tensor.reshape(-1).view(torch.uint8)
            # E4M3 has its exponent's lowest bit at 3, the others in the highest byte but one
            byte, bit = (0, 8) if tensor.element_size() == 1 else (tensor.element_size() - 2, 128)
            numbers[byte] ^= bit
            return


DAMAGES: dict[str, Callable[[Tensors], None]] = {
    "two layers are swapped": swap_layers,
    "all codes are zero": change_codes(torch.zeros_like),
    "the codes are reversed": change_codes(lambda numbers: numbers.flip(0)),
    "a bit of a code is flipped": change_codes(flip_a_code),
    "a bit of a scale is flipped": flip_a_scale,
}


def forget_errors(manifest: dict[str, Any]) -> None:
    for layer in manifest["layers"].values():
        layer |= {"error": None, "rounding_error": None}


def damaged(output: Path, folder: Path, damage: str) -> Path | None:
    """A copy of an output with a damage, and with headers that agree with it; None where there is
    nothing of its kind to damage.
    """
    out = folder / "out"
    shutil.copytree(output, out)
    files = {file: load_file(file) for file in sorted(out.glob("model*.safetensors"))}
    tensors = {name: tensor for held in files.values() for name, tensor in held.items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    DAMAGES[damage](tensors)
    if all(is_same(tensor, before[name]) for name, tensor in tensors.items()):
        return None
    for file, held in files.items():
        change_tensors(file, lambda now, names=tuple(held): now.update(cut(tensors, names)))
    return out


def cut(tensors: Tensors, names: Iterable[str]) -> Tensors:
    return {name: tensors[name] for name in names}


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_found_by_the_digests(
    output: tuple[Path, Bound], tmp_path: Path, damage: str
) -> None:
    if out := damaged(output[0], tmp_path, damage):
        assert verify(out).faults


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_whose_digests_were_made_again_is_found_by_its_error(
    output: tuple[Path, Bound], model: Path, tmp_path: Path, damage: str
) -> None:
    if out := damaged(output[0], tmp_path, damage):
        forge(out)
        assert verify(out, against=model).faults


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_with_a_forged_manifest_is_found_by_a_bound(
    output: tuple[Path, Bound], model: Path, tmp_path: Path, damage: str
) -> None:
    original, bound = output
    unbounded = {
        "error": ["a bit of a code is flipped", "a bit of a scale is flipped"],
        "clipped": ["a bit of a code is flipped"],
        "rounding": [],
    }
    if damage in unbounded[bound]:
        pytest.skip("no bound of a weight is so narrow: only a signature proves a manifest")
    if out := damaged(original, tmp_path, damage):
        forge(out, forget_errors)
        assert verify(out, against=model).faults


def test_what_is_sound_is_passed(output: tuple[Path, Bound], model: Path, tmp_path: Path) -> None:
    assert not verify(output[0], against=model).faults
    out = tmp_path / "out"
    shutil.copytree(output[0], out)
    forge(out, forget_errors)
    assert not verify(out, against=model).faults


@pytest.mark.parametrize("scheme", ["w4a16", "int8", "sparse-2of4", "nvfp4"])
def test_no_layer_moves_further_than_it_may_to_make_up_for_errors(
    tmp_path: Path, scheme: str
) -> None:
    tensors = {
        name: 20 * tensor if ".mlp." in name else tensor
        for name, tensor in llama_tensors(config=LLAMA).items()
    }
    model = runnable_model(tmp_path / "model", tensors, LLAMA)
    manifest = compress(
        model,
        tmp_path / "out",
        scheme=scheme,
        samples=64,
        sequence_length=64,
        calibration=model.parent / "text.txt",
    )
    for name, layer in manifest.layers.items():
        assert layer.error is not None
        assert layer.error <= max_error(layer.rounding_error), name
    assert any("would move by more than 70% of their norm" in text for text in manifest.warnings)
