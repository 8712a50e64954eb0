"""Every format decodes to what an independent reading of it says, number by number."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from attrs import frozen
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bitpress import CheckpointError
from bitpress.checkpoint.reader import Reader, open_checkpoint
from bitpress.checkpoint.source import resolve_source
from bitpress.conformance.models import LLAMA, llama_tensors, tensors_of, write_model

LAYER = "model.layers.1.mlp.down_proj"
ROWS, COLUMNS = 96, 256

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@frozen
class Case:
    """A layer in some format.

    Attributes:
        table: the `quantization_config`.
        stored: of the layer, by what follows its name and a dot.
        expected: (out, in) what it stands for.
        config: other keys of `config.json`.
    """

    table: Mapping[str, Any]
    stored: Mapping[str, Tensor]
    expected: Tensor
    config: Mapping[str, Any] = {}


def random(*shape: int, low: int = 0, high: int = 2) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(dtype)


def bit_string(numbers: list[int], bits: int) -> Tensor:
    """Numbers one after another, the first in the lowest bits, cut into 32-bit words."""
    whole = sum(number << (bits * i) for i, number in enumerate(numbers))
    words = [whole >> (32 * i) & 0xFFFFFFFF for i in range(-(-len(numbers) * bits // 32))]
    return torch.tensor([w - (1 << 32) if w >> 31 else w for w in words], dtype=torch.int32)


def gptq(bits: int, layout: str, *, ordered: bool, group: int = 32, lowest_zero: int = 1) -> Case:
    codes = random(ROWS, COLUMNS, high=1 << bits)
    zeros = random(COLUMNS // group, ROWS, low=lowest_zero, high=1 << bits)
    scale = scales(COLUMNS // group, ROWS)
    index = torch.arange(COLUMNS) // group
    if not ordered:
        index = index[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))]
    lacks = 1 if layout == "gptq" else 0
    expected = torch.empty(ROWS, COLUMNS)
    for k in range(COLUMNS):
        g = int(index[k])
        expected[:, k] = (codes[:, k] - zeros[g]).float() * scale[g].float()
    stored = {
        "qweight": torch.stack([bit_string(row.tolist(), bits) for row in codes], 1),
        "qzeros": torch.stack([bit_string((row - lacks).tolist(), bits) for row in zeros]),
        "scales": scale,
        "g_idx": index.int(),
    }
    table = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": not ordered}
    return Case(table | {"checkpoint_format": layout}, stored, expected.half())


def gptq_with_zero_points_of_zero(bits: int) -> Case:
    """As GPTQModel writes it: 1 is taken from all zero points of a word at once, and one that is 0
    borrows from the next.
    """
    case = gptq(bits, "gptq_v2", ordered=True, lowest_zero=0)
    words = case.stored["qzeros"].long() - sum(1 << shift for shift in range(0, 32, bits))
    # 32 bits of it, signed
    words = (words + (1 << 31)) % (1 << 32) - (1 << 31)
    stored = {**case.stored, "qzeros": words.int()}
    return attrs.evolve(case, table={**case.table, "checkpoint_format": "gptq"}, stored=stored)


def awq(group: int = 64) -> Case:
    codes, zeros = random(COLUMNS, ROWS, high=16), random(COLUMNS // group, ROWS, high=16)
    scale = scales(COLUMNS // group, ROWS)
    expected = torch.empty(ROWS, COLUMNS)
    for k in range(COLUMNS):
        g = k // group
        expected[:, k] = (codes[k] - zeros[g]).float() * scale[g].float()

    def pack(numbers: Tensor) -> Tensor:
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        words = [
            bit_string([int(row[first + place]) for place in order], 4)
            for row in numbers
            for first in range(0, ROWS, 8)
        ]
        return torch.cat(words).reshape(len(numbers), -1)

    stored = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scale}
    table = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return Case(table | {"zero_point": True}, stored, expected.half())


def by_auto_round(case: Case, packing: str) -> Case:
    """The same as AutoRound 0.16 describes it."""
    table = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "sym": False}
    stored = {leaf: tensor for leaf, tensor in case.stored.items() if leaf != "g_idx"}
    return attrs.evolve(case, table=table, stored=stored)


def fp4_codes(rows: int = ROWS, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """Bytes with two numbers each, and the numbers."""
    codes = random(rows, columns, high=16)
    numbers = torch.tensor([*E2M1, *(-x for x in E2M1)])[codes]
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), numbers


def modelopt_nvfp4() -> Case:
    packed, numbers = fp4_codes()
    scale = (scales(ROWS, COLUMNS // 16, dtype=torch.float32) * 900).to(torch.float8_e4m3fn)
    factor = torch.tensor(0.0123)
    expected = torch.empty(ROWS, COLUMNS)
    for k in range(COLUMNS):
        expected[:, k] = numbers[:, k] * (scale[:, k // 16].float() * factor)
    stored = {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": factor,
        "input_scale": torch.tensor(0.5),
    }
    return Case({"quant_method": "modelopt", "quant_algo": "NVFP4"}, stored, expected)


def modelopt_fp8(*shape: int) -> Case:
    weight = (torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))).to(
        torch.float8_e4m3fn
    )
    scale = scales(*shape, dtype=torch.float32)
    rows = scale.reshape(-1)[torch.arange(ROWS) % max(scale.numel(), 1)]
    expected = torch.stack([weight[i].float() * rows[i] for i in range(ROWS)])
    table = {"quant_method": "modelopt", "quant_algo": "FP8"}
    stored = {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return Case(table, stored, expected)


def deepseek_fp4() -> Case:
    packed, numbers = fp4_codes()
    exponents = random(ROWS, COLUMNS // 32, low=118, high=130).to(torch.uint8)
    expected = torch.empty(ROWS, COLUMNS)
    for k in range(COLUMNS):
        expected[:, k] = numbers[:, k] * 2.0 ** (exponents[:, k // 32].float() - 127)
    stored = {"weight": packed.view(torch.int8), "scale": exponents.view(torch.float8_e8m0fnu)}
    table = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    return Case(table, stored, expected, {"expert_dtype": "fp4"})


def deepseek_fp8() -> Case:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)).to(
        torch.float8_e4m3fn
    )
    exponents = random(1, 2, low=118, high=130).to(torch.uint8)
    expected = torch.empty(ROWS, COLUMNS)
    for k in range(COLUMNS):
        expected[:, k] = weight[:, k].float() * 2.0 ** (float(exponents[0, k // 128]) - 127)
    stored = {"weight": weight, "scale": exponents.view(torch.float8_e8m0fnu)}
    table = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    return Case(table, stored, expected)


def packed_by_compressed_tensors(layout: str, **arguments: Any) -> Case:
    """What compressed-tensors stores of a weight, and what it decodes that to."""
    args = QuantizationArgs(**arguments)
    size = args.group_size if args.group_size and args.group_size > 0 else COLUMNS
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)).bfloat16()
    state: dict[str, Tensor] = {"weight": weight}
    groups = weight.float().reshape(ROWS, -1, size)
    if args.type == "int":
        low, high = -(1 << args.num_bits - 1), (1 << args.num_bits - 1) - 1
        scale = (groups.amax(2) - groups.amin(2)) / (high - low)
        state["weight_scale"] = scale.bfloat16()
        zero = torch.zeros_like(scale, dtype=torch.int8)
        if not args.symmetric:
            zero = (low - groups.amin(2) / scale).round().clamp(low, high).to(torch.int8)
        state["weight_zero_point"] = zero
    elif args.num_bits == 4 and size == 16:
        state["weight_global_scale"] = torch.tensor([340.0])
        amax = groups.abs().amax(2) / 6 * 340
        state["weight_scale"] = amax.to(torch.float8_e4m3fn).float()
    else:
        state["weight_scale"] = (groups.abs().amax(2) / (6 if args.num_bits == 4 else 448)).log2()
        state["weight_scale"] = state["weight_scale"].ceil().exp2().bfloat16()
    compressor = BaseCompressor.load_from_registry(layout)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=layout)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    weights = {k: v for k, v in args.model_dump(mode="json").items() if v is not None}
    table = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return Case(table, {k: v.contiguous() for k, v in stored.items()}, expected)


GROUPED = {"strategy": "group", "group_size": 32}
INT4 = {"num_bits": 4, "type": "int"}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
BYTE_SCALES = {"scale_dtype": torch.uint8}
FP8_SCALES = {"scale_dtype": torch.float8_e4m3fn}

CASES: Mapping[str, Callable[[], Case]] = {
    "gptq": lambda: gptq(4, "gptq", ordered=True),
    "gptq with columns in another order": lambda: gptq(4, "gptq", ordered=False),
    "gptq_v2, 8 bits": lambda: gptq(8, "gptq_v2", ordered=True),
    "gptq, zero points of 0": lambda: gptq_with_zero_points_of_zero(4),
    "gptq, 2 bits, zero points of 0": lambda: gptq_with_zero_points_of_zero(2),
    "gptq, 8 bits, zero points of 0": lambda: gptq_with_zero_points_of_zero(8),
    "gptq, 3 bits": lambda: gptq(3, "gptq", ordered=True),
    "gptq, 2 bits": lambda: gptq(2, "gptq_v2", ordered=True, group=64),
    "auto-round in the layout of gptq": lambda: by_auto_round(
        gptq(4, "gptq", ordered=True), "auto_round:auto_gptq"
    ),
    "auto-round in its own": lambda: by_auto_round(gptq(4, "gptq_v2", ordered=True), "auto_round"),
    "auto-round in the layout of awq": lambda: by_auto_round(awq(), "auto_round:auto_awq"),
    "awq": awq,
    "modelopt nvfp4": modelopt_nvfp4,
    "modelopt fp8": modelopt_fp8,
    "modelopt fp8 by channel": lambda: modelopt_fp8(ROWS),
    "deepseek v4, experts": deepseek_fp4,
    "deepseek v4, layers": deepseek_fp8,
    "pack-quantized": lambda: packed_by_compressed_tensors(
        "pack-quantized", **INT4, **GROUPED, symmetric=True
    ),
    "pack-quantized with zero points": lambda: packed_by_compressed_tensors(
        "pack-quantized", **INT4, **GROUPED, symmetric=False
    ),
    "pack-quantized by channel, 8 bits": lambda: packed_by_compressed_tensors(
        "pack-quantized", num_bits=8, type="int", strategy="channel", symmetric=True
    ),
    "pack-quantized, 3 bits": lambda: packed_by_compressed_tensors(
        "pack-quantized", num_bits=3, type="int", **GROUPED, symmetric=False
    ),
    "int-quantized": lambda: packed_by_compressed_tensors(
        "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=True
    ),
    "int-quantized in groups": lambda: packed_by_compressed_tensors(
        "int-quantized", **INT4, **GROUPED, symmetric=True
    ),
    "float-quantized": lambda: packed_by_compressed_tensors(
        "float-quantized", num_bits=8, type="float", strategy="channel", symmetric=True
    ),
    "nvfp4-pack-quantized": lambda: packed_by_compressed_tensors(
        "nvfp4-pack-quantized", **FP4, strategy="tensor_group", group_size=16, **FP8_SCALES
    ),
    "mxfp4-pack-quantized": lambda: packed_by_compressed_tensors(
        "mxfp4-pack-quantized", **FP4, **GROUPED, **BYTE_SCALES
    ),
    "mxfp8-quantized": lambda: packed_by_compressed_tensors(
        "mxfp8-quantized", num_bits=8, type="float", symmetric=True, **GROUPED, **BYTE_SCALES
    ),
}


def write(folder: Path, case: Case) -> Path:
    """A model in which one layer is stored so."""
    config = {**LLAMA, **case.config, "quantization_config": dict(case.table)}
    config["torch_dtype"] = str(case.expected.dtype).removeprefix("torch.")
    tensors = {k: v for k, v in llama_tensors().items() if k != f"{LAYER}.weight"}
    stored = {f"{LAYER}.{leaf}": tensor for leaf, tensor in case.stored.items()}
    return write_model(folder, {**tensors, **stored}, config)


@pytest.mark.parametrize("name", CASES)
def test_weights_are_decoded_bit_for_bit(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    source = resolve_source(open_checkpoint(write(tmp_path / "m", case)))
    entry = source.entries[f"{LAYER}.weight"]
    assert entry.shape == (ROWS, COLUMNS)
    assert source.method is not None
    with Reader() as reader:
        dtype = case.expected.dtype
        assert torch.equal(reader.whole(entry).to(dtype), case.expected)
        for first, last in ((0, 1), (5, 40), (31, 33), (95, 96)):
            rows = reader.rows(entry, first, last).to(dtype)
            assert torch.equal(rows, case.expected[first:last]), (first, last)


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_format_is_left(tmp_path: Path, name: str) -> None:
    source = resolve_source(open_checkpoint(write(tmp_path / "m", CASES[name]())))
    assert source.entries.keys() == llama_tensors().keys()
    assert "quantization_config" not in source.config


def test_experts_of_gpt_oss_are_decoded_as_transformers_decodes_them(tmp_path: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    shapes = {"gate_up_proj": (2 * 32, 64), "down_proj": (64, 32)}
    tensors, expected = {}, {}
    for leaf, (rows, columns) in shapes.items():
        blocks = random(4, rows, columns // 32, 16, high=256).to(torch.uint8)
        scale = random(4, rows, columns // 32, low=118, high=130).to(torch.uint8)
        tensors |= {f"{experts}.{leaf}_blocks": blocks, f"{experts}.{leaf}_scales": scale}
        expected[leaf] = convert_moe_packed_tensors(blocks, scale)
    config = {**LLAMA, "quantization_config": {"quant_method": "mxfp4"}}
    model = write_model(tmp_path / "m", {**llama_tensors(), **tensors}, config)
    source = resolve_source(open_checkpoint(model))
    with Reader() as reader:
        for leaf, weight in expected.items():
            entry = source.entries[f"{experts}.{leaf}"]
            assert torch.equal(reader.whole(entry).bfloat16(), weight)
            assert torch.equal(reader.rows(entry, 1, 3).bfloat16(), weight[1:3])
            chunks = [chunk.clone() for chunk in reader.chunks(entry, 1000)]
            stored = torch.cat(chunks).view(torch.bfloat16).reshape(weight.shape)
            assert torch.equal(stored, weight)
    assert not [name for name in source.entries if name.endswith(("_blocks", "_scales"))]


WRONG: Mapping[str, tuple[str, Callable[[dict[str, Tensor], dict[str, Any]], object], str]] = {
    "gptq without scales": ("gptq", lambda t, c: t.pop(f"{LAYER}.scales"), "scales is missing"),
    "gptq of 16 bits": ("gptq", lambda t, c: c.update(bits=16), "GPTQ of 16 bits"),
    "gptq of another format": (
        "gptq",
        lambda t, c: c.update(checkpoint_format="marlin"),
        "'marlin'",
    ),
    "gptq with other zero points": (
        "gptq",
        lambda t, c: t.update({f"{LAYER}.qzeros": torch.zeros(1, 1, dtype=torch.int32)}),
        "do not fit one another",
    ),
    "awq of another version": ("awq", lambda t, c: c.update(version="gemv"), "'gemv'"),
    "awq with other scales": (
        "awq",
        lambda t, c: t.update({f"{LAYER}.scales": torch.zeros(3, 3)}),
        "do not fit one another",
    ),
    "modelopt with factors for inputs": (
        "modelopt nvfp4",
        lambda t, c: t.update({f"{LAYER}.pre_quant_scale": torch.ones(COLUMNS)}),
        "pre_quant_scale",
    ),
    "modelopt in another dtype": (
        "modelopt nvfp4",
        lambda t, c: t.update({f"{LAYER}.weight": torch.zeros(4, 4, dtype=torch.int32)}),
        "I32",
    ),
    "compressed-tensors, rotated": (
        "pack-quantized",
        lambda t, c: c.update(transform_config={"config_groups": {"R1": {}}}),
        "rotated",
    ),
    "compressed-tensors without its zeros": (
        "float-quantized",
        lambda t, c: c.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparse-24-bitmask",
    ),
    "compressed-tensors with scales that fit nothing": (
        "float-quantized",
        lambda t, c: t.update({f"{LAYER}.weight_scale": torch.ones(3, 5)}),
        "in no way",
    ),
    "compressed-tensors with too few words": (
        "pack-quantized",
        lambda t, c: t.update({f"{LAYER}.weight_packed": torch.zeros(ROWS, 3, dtype=torch.int32)}),
        "codes of 4 bits",
    ),
    "deepseek v4 in another dtype": (
        "deepseek v4, experts",
        lambda t, c: t.update({f"{LAYER}.weight": torch.zeros(4, 4)}),
        "F32",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_its_format_is_refused_by_name(tmp_path: Path, name: str) -> None:
    form, harm, words = WRONG[name]
    case = CASES[form]()
    table, stored = dict(case.table), {f"{LAYER}.{k}": v for k, v in case.stored.items()}
    harm(stored, table)
    plain = {k: v for k, v in llama_tensors().items() if k != f"{LAYER}.weight"}
    config = {**LLAMA, "quantization_config": table}
    model = write_model(tmp_path / "m", {**plain, **stored}, config)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        resolve_source(open_checkpoint(model))


def test_groups_of_a_config_are_told_apart_by_their_targets(tmp_path: Path) -> None:
    case = CASES["pack-quantized"]()
    weights = case.table["config_groups"]["group_0"]["weights"]
    other = {**weights, "num_bits": 8}
    for targets in ([LAYER], ["re:.*down_proj$"]):
        groups = {
            "group_0": {"targets": ["Linear"], "weights": other},
            "group_1": {"targets": targets, "weights": weights},
        }
        mixed = attrs.evolve(case, table={**case.table, "config_groups": groups})
        model = write(tmp_path / targets[0].replace("*", ""), mixed)
        source = resolve_source(open_checkpoint(model))
        with Reader() as reader:
            weight = reader.whole(source.entries[f"{LAYER}.weight"])
            assert torch.equal(weight.to(case.expected.dtype), case.expected)


@pytest.mark.parametrize("expression", ["(a+)+$", ".*.*.*.*.*.*.*x", "("])
def test_expressions_that_may_take_forever_are_refused(tmp_path: Path, expression: str) -> None:
    case = CASES["pack-quantized"]()
    weights = case.table["config_groups"]["group_0"]["weights"]
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {**weights, "num_bits": 8}},
        "group_1": {"targets": [f"re:{expression}"], "weights": weights},
    }
    model = write(tmp_path / "m", attrs.evolve(case, table={**case.table, "config_groups": groups}))
    with pytest.raises(CheckpointError, match="name the layers instead"):
        resolve_source(open_checkpoint(model))


def test_a_description_beside_the_config_is_enough_for_modelopt(tmp_path: Path) -> None:
    case = CASES["modelopt nvfp4"]()
    model = write(tmp_path / "m", case)
    (model / "config.json").write_text(json.dumps(LLAMA))
    described = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (model / "hf_quant_config.json").write_text(json.dumps(described))
    source = resolve_source(open_checkpoint(model, copy=["hf_quant_config.json"]))
    assert source.entries.keys() == llama_tensors().keys()
    assert "hf_quant_config.json" not in source.side_files


def test_scales_of_caches_are_left_out_with_a_word(tmp_path: Path) -> None:
    attention = "model.layers.0.self_attn"
    for name, scales_of in {
        "pack-quantized": (f"{attention}.k_scale", f"{attention}.v_scale"),
        "modelopt fp8": (f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"),
    }.items():
        case = CASES[name]()
        model = write(tmp_path / name, case)
        tensors = tensors_of(model) | dict.fromkeys(scales_of, torch.ones(1))
        config = json.loads((model / "config.json").read_text())
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        with_scales = write_model(tmp_path / f"{name} with scales", tensors, config)
        source = resolve_source(open_checkpoint(with_scales))
        assert source.entries.keys() == llama_tensors().keys()
        (remark,) = source.remarks
        assert remark.startswith("2 scales of the source's cache are left out")
