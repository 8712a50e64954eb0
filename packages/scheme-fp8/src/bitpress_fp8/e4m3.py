"""What both FP8 schemes share: E4M3 codes with scales that multiply, stored as `weight` and
`weight_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import attrs
from attrs import frozen

import bitpress
from bitpress import CodeForm, Layer, StoredLayer, hookimpl, numerics, option

if TYPE_CHECKING:
    from torch import Tensor

# What compressed-tensors calls FP8 weights with activations.
FORMAT = "float-quantized"

ALGORITHM = "plain rounding, or errors fed forward on calibration data"


SomeOptions = TypeVar("SomeOptions", bound="AlgorithmOptions")


@frozen
class AlgorithmOptions(bitpress.ReferenceOptions):
    """Options of both schemes."""

    algorithm: Literal["rtn", "gptq"] = option("rtn", ALGORITHM)

    @property
    def bits(self) -> float:
        """Bits per code."""
        return 8

    @property
    def calibrated(self) -> bool:
        """Plain rounding needs no data."""
        return self.algorithm == "gptq"


def keep_codes(form: CodeForm, options: SomeOptions) -> SomeOptions | None:
    """E4M3 codes, rounded to nearest on their own scales, which leaves them as they are."""
    is_e4m3 = (form.numbers, form.bits) == ("float", 8)
    return attrs.evolve(options, algorithm="rtn") if is_e4m3 else None


def source_scale(layer: Layer, group_size: int) -> Tensor | None:
    """The scales (out, groups) of a source's codes; None where it has none for such groups, or
    such as are not stored.
    """
    import torch

    source = layer.quantized
    if source is None or source.codes.dtype != torch.float8_e4m3fn:
        return None
    rows, width = layer.weight.shape
    scale = source.scale.expand(rows, -1)
    is_stored = bool(((scale > 0) & scale.isfinite()).all())
    if source.zero_point is not None or source.group_index is not None or not is_stored:
        return None
    return scale if scale.shape[1] * group_size == width else None


def encode(
    layer: Layer,
    scale: Tensor,
    expanded_scale: Tensor,
    input_qparams: Mapping[str, Tensor] | None = None,
) -> Layer:
    """The layer with E4M3 codes.

    Args:
        layer: its weight (out, in) is rounded to nearest.
        scale: as it will be stored.
        expanded_scale: the same numbers, broadcastable to (out, in).
        input_qparams: what is stored beside the scale.
    """
    # Zeros stay zero, so `mask` holds by itself.
    codes = numerics.encode_e4m3(layer.weight, expanded_scale)  # (out, in)
    return attrs.evolve(
        layer,
        weight=lambda: numerics.decode_e4m3(codes) * expanded_scale,
        codes=codes,
        qparams={"scale": scale, **(input_qparams or {})},
    )


def store(layer: Layer, weights: Mapping[str, Any], activations: Mapping[str, Any]) -> StoredLayer:
    """Codes and scales as compressed-tensors names them; a scale without axes gets shape (1,).

    Args:
        layer: its codes (out, in), its "scale", and "input_scale" where it is static.
        weights: what the config says of weights, beside what all E4M3 schemes say.
        activations: the same of activations.
    """
    assert layer.codes is not None
    tensors = {"weight": layer.codes, "weight_scale": layer.qparams["scale"]}
    if "input_scale" in layer.qparams:
        tensors["input_scale"] = layer.qparams["input_scale"]
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    config = {
        "format": FORMAT,
        "weights": {**common, **weights},
        "input_activations": {**common, **activations},
    }
    tensors = {name: t if t.ndim else t.reshape(1) for name, t in tensors.items()}
    return StoredLayer(tensors, config)


@hookimpl
def dequantize(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Codes times their scale: (out, in) float32."""
    return numerics.decode_e4m3(tensors["weight"]) * _expanded_scale(tensors, config)


@hookimpl
def error_bound(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: AlgorithmOptions
) -> Tensor | None:
    """Half a step of E4M3 around each code, times its scale: (out, in) float32. GPTQ moves weights
    on purpose.
    """
    if options.algorithm == "gptq":
        return None
    # 2^-17 of it is for the float32 roundings of w / scale, code * scale and their difference, each
    # at most 2^-19 of it.
    scale = tensors["weight_scale"] * (1 + 2.0**-17)
    expanded_scale = _expanded_scale({**tensors, "weight_scale": scale}, config)
    return numerics.e4m3_bound(tensors["weight"]).mul_(expanded_scale)


def _expanded_scale(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Every weight's scale, broadcastable to (out, in)."""
    scale, block = tensors["weight_scale"], config["weights"].get("block_structure")
    if block is None:
        return scale  # (out, 1) or (1,)
    out, width = tensors["weight"].shape
    return numerics.expand_blocks(scale, (block[0], block[1]), (out, width))
