"""compressed-tensors, whoever wrote it: packed integers, bytes of integers, FP8, NVFP4, MXFP4 and
MXFP8.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from torch import Tensor

from bitpress import (
    CheckpointError,
    CodeForm,
    QuantizedSource,
    QuantizedTensor,
    QuantizedWeight,
    StoredPart,
    hookimpl,
)
from bitpress.checkpoint.engine_facts import MAX_NAME_LENGTH
from bitpress.checkpoint.model_config import METHOD
from bitpress.checkpoint.safetensors import TensorSpec
from bitpress.numerics import unpack_words
from bitpress.planning.config_rules import explain_expression
from bitpress_sources.layouts import (
    FP8,
    MX_GROUP,
    OF_CACHES,
    Tensors,
    dtype_of,
    fp4_weight,
    fp8_weight,
    modules_with,
    quantization_table,
    remark_caches,
)

NVFP4_GROUP = 16

WORD_BITS = 32

OF_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale")

# Beside a weight, whether it is made of them or not.
OF_WEIGHTS = ("weight_shape", "weight_zero_point", "weight_g_idx", *OF_ACTIVATIONS)


@frozen
class _Arguments:
    """The `weights` of one of a config's groups, as far as it is needed to read them.

    Attributes:
        targets: names of layers, expressions after `re:`, or classes.
        group_size: columns that share a scale; None where a row does, or more.
        block: rows and columns that share one.
    """

    targets: tuple[str, ...]
    bits: int
    group_size: int | None
    block: tuple[int, int] | None


@hookimpl
def find_quantized_weights(
    folder: Path, config: Mapping[str, Any], tensors: Tensors
) -> QuantizedSource | None:
    """Layers with a scale beside their weight, by `quant_method`."""
    table = quantization_table(config)
    if table.get("quant_method") != METHOD:
        return None
    _require_plain(folder, table)
    groups = _read_groups(table)
    weights = {
        f"{module}.weight": _weight(folder, tensors, module, _find_arguments(module, groups))
        for module in modules_with(tensors, "weight_scale")
    }
    left_out = {
        name
        for name in tensors
        for module, _, leaf in [name.rpartition(".")]
        if leaf in OF_CACHES or (leaf in OF_WEIGHTS and f"{module}.weight" in weights)
    }
    return QuantizedSource(METHOD, weights, left_out, remarks=remark_caches(tensors))


def _require_plain(folder: Path, table: Mapping[str, Any]) -> None:
    """Raise CheckpointError where weights do not stand for a plain model's."""
    if table.get("transform_config"):
        raise CheckpointError(
            f"{folder}: its weights are rotated, and its transform_config lets an engine turn the "
            "activations: start from the original"
        )
    sparsity = table.get("sparsity_config")
    layout = sparsity.get("format") if isinstance(sparsity, dict) else None
    if layout not in (None, "dense"):
        raise CheckpointError(
            f"{folder}: its zeros are left out ({layout}), which is not read: start from the "
            "original, or from what `bitpress decompress` makes of it"
        )


def _read_groups(table: Mapping[str, Any]) -> list[_Arguments]:
    groups = table.get("config_groups")
    found = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        targets = tuple(map(str, group.get("targets") or ()))
        bits, size = weights.get("num_bits"), weights.get("group_size")
        block = weights.get("block_structure")
        found.append(
            _Arguments(
                targets,
                bits if type(bits) is int else 0,
                size if type(size) is int and size > 0 else None,
                (block[0], block[1]) if isinstance(block, list) and len(block) == 2 else None,
            )
        )
    return found


def _find_arguments(module: str, groups: Sequence[_Arguments]) -> _Arguments | None:
    """The group of a layer: that which names it, one whose expression fits, or one of a class; None
    where there is none and groups differ.
    """
    if all(
        attrs.evolve(group, targets=()) == attrs.evolve(groups[0], targets=()) for group in groups
    ):
        return groups[0] if groups else None

    def rank(target: str) -> int | None:
        if target.startswith("re:"):
            return 1 if _fits(target.removeprefix("re:"), module) else None
        if target == module:
            return 0
        # a class has no dots, and classes of linear layers are all that there are
        return 2 if "." not in target else None

    ranked = [
        (order, number)
        for number, group in enumerate(groups)
        for target in group.targets
        if (order := rank(target)) is not None
    ]
    return groups[min(ranked)[1]] if ranked else None


@functools.lru_cache(maxsize=1 << 16)
def _fits(expression: str, module: str) -> bool:
    if reason := explain_expression(expression):
        raise CheckpointError(
            f"config.json: its config_groups target 're:{expression:.200}', {reason}: name the "
            "layers instead"
        )
    return len(module) <= MAX_NAME_LENGTH and re.match(expression, module) is not None


def _weight(
    folder: Path, tensors: Tensors, module: str, arguments: _Arguments | None
) -> QuantizedWeight:
    name, packed_name = f"{module}.weight", f"{module}.weight_packed"
    scale_name, global_name = f"{module}.weight_scale", f"{module}.weight_global_scale"
    packed, weight = tensors.get(packed_name), tensors.get(name)
    if arguments is None:
        raise CheckpointError(
            f"{folder}: tensor {scale_name} is there, and no group of config.json is for {module}"
        )
    if packed is not None and packed.dtype == "U8":
        if global_name in tensors:
            return _invert(fp4_weight(tensors, packed_name, scale_name, NVFP4_GROUP, global_name))
        return fp4_weight(tensors, packed_name, scale_name, MX_GROUP)
    if packed is not None and packed.dtype == "I32":
        return _packed_integers(tensors, module, arguments)
    if weight is not None and weight.dtype == FP8:
        tiles = [arguments.block] if arguments.block else []
        if arguments.group_size:
            tiles.append((1, arguments.group_size))
        return fp8_weight(tensors, name, scale_name, tiles)
    if weight is not None and weight.dtype == "I8":
        return _byte_integers(tensors, module)
    raise CheckpointError(
        f"{folder}: layer {module} has {scale_name}, and its weight is {packed or weight}: this is "
        "no format that is read; start from the original"
    )


def _invert(weight: QuantizedWeight) -> QuantizedWeight:
    """The same, where the global scale divides."""

    def decode(parts: Mapping[str, Tensor]) -> QuantizedTensor | Tensor:
        # the quotient, and not a product with a rounded reciprocal
        plain = weight.decode({**parts, "global_scale": parts["global_scale"].new_ones(())})
        assert isinstance(plain, QuantizedTensor)
        divisor = parts["global_scale"].float().reshape(())
        return QuantizedTensor(plain.codes, plain.scale / divisor)

    return QuantizedWeight(weight.shape, weight.parts, decode, weight.row_block)


def _packed_integers(tensors: Tensors, module: str, arguments: _Arguments) -> QuantizedWeight:
    """Codes of 1 to 8 bits in words, zero points packed along the rows."""
    name, zero_name = f"{module}.weight_packed", f"{module}.weight_zero_point"
    packed, scale = tensors[name], tensors[f"{module}.weight_scale"]
    bits, num_rows = arguments.bits, packed.shape[0]
    num_groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    grouped = arguments.group_size if num_groups > 1 else None
    num_columns = grouped * num_groups if grouped else packed.shape[-1] * WORD_BITS // max(bits, 1)
    words = -(-num_columns * bits // WORD_BITS)
    if bits not in range(1, 9) or packed.shape != (num_rows, words):
        raise CheckpointError(
            f"tensor {name} is {packed}, which holds no {num_columns} codes of {bits} bits in a row"
        )
    zero = tensors.get(zero_name)
    row_block = 1 if zero is None else WORD_BITS
    parts = {
        "codes": StoredPart(name, row_block),
        "scale": _of_rows(f"{module}.weight_scale", scale, row_block),
    }
    if zero is not None:
        parts["zero_point"] = StoredPart(zero_name, bits)
        if zero.shape != (-(-num_rows * bits // WORD_BITS), num_groups):
            raise CheckpointError(f"tensor {zero_name} is {zero}, which fits {name} in no way")
    if f"{module}.weight_g_idx" in tensors:
        parts["group_index"] = StoredPart(f"{module}.weight_g_idx")

    def decode(stored: Mapping[str, Tensor]) -> QuantizedTensor:
        codes = unpack_words(stored["codes"], bits, num_columns)
        scales, zeros = stored["scale"].float().reshape(-1, num_groups), stored.get("zero_point")
        if zeros is not None:
            zeros = unpack_words(zeros.T.contiguous(), bits, len(codes)).T
        return QuantizedTensor(codes, scales, zeros, stored.get("group_index"))

    form = _integer_form(parts, scale, bits, num_columns)
    return QuantizedWeight((num_rows, num_columns), parts, decode, row_block, form)


def _byte_integers(tensors: Tensors, module: str) -> QuantizedWeight:
    """A code in each byte, and a zero point in each byte."""
    name = f"{module}.weight"
    weight, scale = tensors[name], tensors[f"{module}.weight_scale"]
    num_groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    if len(weight.shape) != 2 or weight.shape[1] % num_groups:
        raise CheckpointError(
            f"tensors {name} {weight} and weight_scale {scale} do not fit one another"
        )
    parts = {"codes": StoredPart(name, 1), "scale": _of_rows(f"{module}.weight_scale", scale)}
    zero_name = f"{module}.weight_zero_point"
    if zero := tensors.get(zero_name):
        parts["zero_point"] = _of_rows(zero_name, zero)
    if f"{module}.weight_g_idx" in tensors:
        parts["group_index"] = StoredPart(f"{module}.weight_g_idx")

    def decode(stored: Mapping[str, Tensor]) -> QuantizedTensor:
        zeros = stored.get("zero_point")
        return QuantizedTensor(
            stored["codes"],
            stored["scale"].float().reshape(-1, num_groups),
            None if zeros is None else zeros.reshape(-1, num_groups),
            stored.get("group_index"),
        )

    form = _integer_form(parts, scale, 8, weight.shape[1])
    return QuantizedWeight((weight.shape[0], weight.shape[1]), parts, decode, form=form)


def _integer_form(
    parts: Mapping[str, StoredPart], scale: TensorSpec, bits: int, num_columns: int
) -> CodeForm | None:
    """That of codes in runs of columns whose rows have scales of their own; otherwise None."""
    if "group_index" in parts or parts["scale"].block_size is None:
        return None
    num_groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    group = (1, num_columns // num_groups)
    return CodeForm("integer", bits, group, dtype_of(scale), "zero_point" in parts)


def _of_rows(name: str, spec: TensorSpec, row_block: int = 1) -> StoredPart:
    """A parameter of each row, or one of all."""
    is_one = spec.shape in ((), (1,), (1, 1))
    return StoredPart(name, None if is_one else row_block)
