"""Zeros left out of what any scheme stores: the bits that are left are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitpress.conformance.commands import command, refusal
from bitpress.conformance.models import tensors_of, write_model
from bitpress.numerics import unpack_words

LAYER = "model.layers.1.mlp.down_proj"

# Schemes, the settings of what follows the zeros, and bits per weight: of the kept numbers, of the
# mask, and of scales.
CASES = {
    "2:4": ((), 8 + 1),
    "6:8": ((), 12 + 1),
    "2:4+fp8": ((), 4 + 1),
    "6:8+fp8": ((), 6 + 1),
    "sparse+fp8": ((), 4 + 1),
    "2:4+int8": (("int8.algorithm=rtn",), 4 + 1),
    "4:8+w4a16": (("w4a16.algorithm=rtn", "w4a16.group_size=32"), 2 + 1 + 16 / 32),
    "sparse+w4a16": (("w4a16.algorithm=rtn", "w4a16.group_size=32"), 2 + 1 + 16 / 32),
    "2:4+w8a16": (("w8a16.algorithm=rtn", "w8a16.group_size=32"), 4 + 1 + 16 / 32),
}


def compress(source: Path, out: Path, scheme: str, *settings: str) -> Path:
    name = "sparse" if scheme.startswith("sparse") else "sparse-2of4"
    options = [f"{name}.algorithm=magnitude", *settings]
    arguments = [argument for option in options for argument in ("--set", option)]
    done = command("compress", source, out, "--scheme", scheme, *arguments)
    assert done.returncode == 0, done.stderr
    return out


def unpack(tensors: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """The numbers or codes of the layer, bit by bit."""
    values, rows = tensors[f"{LAYER}.compressed"], []
    mask = tensors[f"{LAYER}.bitmask"].tolist()
    values = values.reshape(len(mask), -1)
    num_kept = sum(bin(byte).count("1") for byte in mask[0])
    if values.dtype == torch.int32:
        bits = 32 * values.shape[1] // num_kept
        values = unpack_words(values, bits, num_kept)
    for row, kept in zip(mask, values.float().tolist(), strict=True):
        numbers = iter(kept)
        is_kept = [row[column // 8] >> column % 8 & 1 for column in range(width)]
        rows.append([next(numbers) if bit else 0.0 for bit in is_kept])
    return torch.tensor(rows)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize("scheme", CASES)
def test_a_bitmask_holds_the_numbers_of_the_plain_layout(
    tmp_path: Path, source: Path, scheme: str
) -> None:
    settings, bits = CASES[scheme]
    first = "sparse" if scheme.startswith("sparse") else "sparse-2of4"
    dense = compress(source, tmp_path / "dense", scheme, *settings)
    compact = compress(source, tmp_path / "o", scheme, *settings, f"{first}.layout=bitmask")
    expected, tensors = tensors_of(dense), tensors_of(compact)
    width = tensors_of(source)[f"{LAYER}.weight"].shape[1]
    if f"{LAYER}.weight" in expected:
        numbers = expected[f"{LAYER}.weight"].float()
    else:
        packed = expected[f"{LAYER}.weight_packed"]
        numbers = unpack_words(packed, 32 * packed.shape[1] // width, width).float()
    assert torch.equal(unpack(tensors, width), numbers)

    # what stands beside the numbers is the same
    for name in expected.keys() & tensors.keys():
        assert torch.equal(expected[name].view(torch.uint8), tensors[name].view(torch.uint8)), name
    of_layer = [t for name, t in tensors.items() if name.startswith(LAYER)]
    offsets = 64 / width
    num_bits = 8 * sum(t.nbytes for t in of_layer) / numbers.numel()
    assert bits <= num_bits <= bits + offsets + 32 / width + 0.05

    assert command("verify", compact, "--against", source).returncode == 0
    for folder in (dense, compact):
        assert command("decompress", folder, folder / "plain").returncode == 0
    weights, again = tensors_of(dense / "plain"), tensors_of(compact / "plain")
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize(
    ("scheme", "settings", "of_zeros"),
    [
        ("2:4+fp8", (), {"format": "dense", "sparsity_structure": "2:4"}),
        ("6:8+int8", ("int8.algorithm=rtn",), {"format": "dense", "sparsity_structure": "6:8"}),
        # no engine makes anything of zeros anywhere
        ("sparse+fp8", (), None),
        (
            "6:8+fp8",
            ("sparse-2of4.layout=bitmask",),
            {
                "format": "sparse-bitmask",
                "sparsity_structure": "6:8",
                "targets": ["Linear"],
                "ignore": ["lm_head"],
            },
        ),
    ],
)
def test_the_config_says_where_zeros_are(
    tmp_path: Path,
    source: Path,
    scheme: str,
    settings: tuple[str, ...],
    of_zeros: dict[str, object] | None,
) -> None:
    out = compress(source, tmp_path / "o", scheme, *settings)
    table = json.loads((out / "config.json").read_text())["quantization_config"]
    assert table.get("sparsity_config") == of_zeros
    assert len(table["config_groups"]) == 1


@pytest.mark.parametrize(
    ("scheme", "settings", "words"),
    [
        ("2:4+nvfp4", ("nvfp4.algorithm=rtn",), "does not take nvfp4-pack-quantized"),
        ("2:4+w4a16", ("w4a16.symmetric=false",), "does not take zero points"),
    ],
)
def test_numbers_that_have_no_zero_are_refused(
    source: Path, scheme: str, settings: tuple[str, ...], words: str
) -> None:
    arguments = [argument for option in settings for argument in ("--set", option)]
    line = refusal("plan", source, "--scheme", scheme, "--set", "layout=bitmask", *arguments)
    assert words in line
