"""Weight-only integers in compressed-tensors' `pack-quantized` layout, for any number of bits that divides a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import frozen

import bitpress
from bitpress import Layer, Record, ShapeError, Stat, numerics, option

if TYPE_CHECKING:
    from torch import Tensor

SYMMETRIC = tuple(0.25 + 0.025 * i for i in range(35))  # of scales tried, in units of amax / ((2^bits - 1) / 2)
ASYMMETRIC = tuple(0.6 + 0.025 * i for i in range(19))  # in units of (max - min) / (2^bits - 1)
GROUPS = (128, 64, 32)


@frozen
class Options(bitpress.Options):
    """What both schemes share."""

    algorithm: Literal["gptq", "rtn"] = option("gptq", "errors fed forward on calibration data, or rounding that needs none")
    group_size: Literal[128, 64, 32, "channel", "auto"] = option(128, "columns that share a scale; auto: the largest that fits")
    symmetric: bool = option(True, "false: a zero point per group")

    @property
    def calibrated(self) -> bool:
        """Rounding to nearest needs no data."""
        return self.algorithm == "gptq"

    @property
    def row_block(self) -> int:
        """Rows whose zero points share a word."""
        return 1 if self.symmetric else 32 // int(self.bits or 4)


def observe(inputs: Tensor | None, reference: Tensor | None, options: Options) -> Mapping[str, Stat] | None:
    """Second moments of the inputs, and how far they have drifted."""
    return numerics.moments(inputs, reference) if inputs is not None and options.calibrated else None


def quantize(layer: Layer, stats: Mapping[str, Stat], options: Options) -> Layer:
    """Codes with scale and, where they are asymmetric, zero_point (out, groups), the scale in the model's own dtype."""
    bits, group = int(options.bits or 4), group_of(layer.weight.shape[1], options.group_size)

    def fit(weight: Tensor, importance: Tensor | None) -> numerics.IntegerGrid:
        if options.symmetric:
            return numerics.fit_symmetric(weight, importance, bits, group, SYMMETRIC, layer.dtype)
        return numerics.fit_asymmetric(weight, importance, bits, group, ASYMMETRIC, layer.dtype)

    weight, grid = numerics.feedback(layer.weight, stats, fit, layer.keep)
    assert isinstance(grid, numerics.IntegerGrid)
    parts = {"scale": grid.scale.to(layer.dtype)}
    if grid.zero is not None:
        parts["zero_point"] = grid.zero.char()
    return attrs.evolve(layer, weight=weight, codes=grid.codes(weight), parts=parts)


def pack(layer: Layer, options: Options) -> Layer:
    """Codes along the columns in 32-bit words: (out, words); zero points along the rows: (out / per word, groups)."""
    assert layer.codes is not None
    bits, parts = int(options.bits or 4), dict(layer.parts)
    if "zero_point" in parts:
        parts["zero_point"] = numerics.pack_words(parts["zero_point"].T.contiguous(), bits).T.contiguous()
    return attrs.evolve(layer, codes=numerics.pack_words(layer.codes, bits), parts=parts)


def serialize(layer: Layer, options: Options) -> Record:
    """`weight_packed` I32 (out, in bits / 32), `weight_scale`, `weight_shape` I64 (2,), and `weight_zero_point` I32."""
    import torch

    assert layer.codes is not None
    out, width = layer.weight.shape
    tensors = {
        "weight_packed": layer.codes,
        "weight_scale": layer.parts["scale"],
        "weight_shape": torch.tensor([out, width], dtype=torch.int64),
    }
    weights: dict[str, Any] = {
        "num_bits": int(options.bits or 4),
        "type": "int",
        "symmetric": options.symmetric,
        "dynamic": False,
    }
    group = group_of(width, options.group_size)
    weights |= {"strategy": "channel"} if group == width else {"strategy": "group", "group_size": group}
    if "zero_point" in layer.parts:
        tensors["weight_zero_point"] = layer.parts["zero_point"]
        weights["zp_dtype"] = "torch.int8"
    return Record(tensors, {"format": "pack-quantized", "weights": weights})


def restore(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """(codes - zero points) times scales."""
    bits, scale = config["weights"]["num_bits"], tensors["weight_scale"]
    width = int(tensors["weight_shape"][1])
    codes = numerics.unpack_words(tensors["weight_packed"], bits, width)
    packed = tensors.get("weight_zero_point")
    zero = None if packed is None else numerics.unpack_words(packed.T.contiguous(), bits, len(codes)).T
    return numerics.decode_integers(codes, scale, zero)


def group_of(width: int, wanted: int | str) -> int:
    """Columns that share a scale; raises ShapeError where the width is no multiple of the size wanted."""
    if wanted == "channel":
        return width
    if wanted == "auto":
        return next((size for size in GROUPS if width % size == 0), width)
    size = int(wanted)
    if width % size:
        fitting = [other for other in GROUPS if width % other == 0]
        advice = f"group_size={fitting[0]}" if fitting else "group_size=channel"
        raise ShapeError(f"width {width} is not a multiple of group_size {size}; try {advice}, or auto; 128 fits a width of 1024")
    return size
