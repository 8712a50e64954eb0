"""What `mxfp4` and `mxfp8` share: their hooks, which ask the options for the number of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import frozen

import bitpress
from bitpress import (
    CodeForm,
    Finding,
    Layer,
    ShapeError,
    Statistic,
    StoredLayer,
    hookimpl,
    numerics,
    option,
)
from bitpress_mx import elements

if TYPE_CHECKING:
    from torch import Tensor

ALGORITHM = "errors fed forward on calibration data, or plain rounding"


@frozen
class MicroscalingOptions(bitpress.ReferenceOptions):
    """Options of both schemes."""

    algorithm: Literal["gptq", "rtn"] = option("gptq", ALGORITHM)
    activations: Literal["quantized", "float"] = option(
        "quantized", "quantized: rounded alike while serving; float: weights only"
    )

    @property
    def bits(self) -> int:
        """Bits per code."""
        raise NotImplementedError

    @property
    def calibrated(self) -> bool:
        """Plain rounding needs no data."""
        return self.algorithm == "gptq"


# As many arguments as the hook has.
@hookimpl
def observe(  # noqa: PLR0913, PLR0917
    inputs: Tensor | None,
    reference: Tensor | None,
    residual: Tensor | None,
    output_gradient: Tensor | None,
    weight: Tensor,
    options: MicroscalingOptions,
) -> Mapping[str, Statistic] | None:
    """What GPTQ needs of inputs before they are rounded, and of the gradients of outputs.

    Weights that are fitted to rounded inputs are smaller where rounding loses much: each layer
    would then lose a part of its output, which adds up where a few inputs are huge.
    """
    if options.algorithm == "rtn":
        return None
    if output_gradient is not None:
        return numerics.output_statistics(output_gradient)
    if inputs is None:
        return None
    return numerics.gptq_statistics(inputs, weight, reference, residual)


@hookimpl
def keep_codes(form: CodeForm, options: MicroscalingOptions) -> MicroscalingOptions | None:
    """The same numbers in the same groups, of which plain rounding finds such scales again as hold
    them.
    """
    import torch

    group = (1, elements.GROUP_SIZE)
    is_same = (form.numbers, form.bits, form.group) == ("float", options.bits, group)
    if not is_same or form.scale_dtype != torch.float8_e8m0fnu:
        return None
    return attrs.evolve(options, algorithm="rtn")


@hookimpl
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: MicroscalingOptions) -> Layer:
    """Codes (out, in) with scale (out, in / 32), E8M0 numbers as float32."""
    width = layer.weight.shape[1]
    if width % elements.GROUP_SIZE:
        fitting = max(width // elements.GROUP_SIZE, 1) * elements.GROUP_SIZE
        raise ShapeError(
            f"width {width} is not a multiple of {elements.GROUP_SIZE}, the group of MX formats "
            f"(as {fitting} is)"
        )

    def fit(weight: Tensor, importance: Tensor | None) -> numerics.FloatGrid:
        return elements.fit(weight, importance, options.bits)

    if options.algorithm == "gptq":
        weight, grid = numerics.gptq_quantize(layer, stats, fit)
    else:
        weight, grid = layer.weight, fit(layer.weight, None)
    # Zeros stay zero, so `mask` holds by itself.
    codes = elements.encode(grid.units(weight), options.bits)  # (out, in)
    return attrs.evolve(
        layer,
        weight=lambda: numerics.scale_groups(elements.decode(codes, options.bits), grid.scale),
        codes=codes,
        qparams={"scale": grid.scale},
    )


@hookimpl
def pack(layer: Layer, options: MicroscalingOptions) -> Layer:
    """Scales as bytes; of 4-bit codes two in a byte along the row, the first in its low half:
    (out, in / 2) uint8.
    """
    assert layer.codes is not None
    codes = numerics.pack_bytes(layer.codes, 4) if options.bits == 4 else layer.codes
    scale = numerics.encode_e8m0(layer.qparams["scale"]).contiguous()
    return attrs.evolve(layer, codes=codes, qparams={"scale": scale})


@hookimpl
def serialize(layer: Layer, options: MicroscalingOptions) -> StoredLayer:
    """`weight_packed` U8 (out, in / 2) or `weight` F8_E4M3 (out, in), and `weight_scale` U8."""
    assert layer.codes is not None
    common = {
        "num_bits": options.bits,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": elements.GROUP_SIZE,
        "scale_dtype": "torch.uint8",
    }
    inputs = {**common, "dynamic": True} if options.activations == "quantized" else None
    config = {
        "format": "mxfp4-pack-quantized" if options.bits == 4 else "mxfp8-quantized",
        "weights": {**common, "dynamic": False},
        "input_activations": inputs,
    }
    name = "weight_packed" if options.bits == 4 else "weight"
    return StoredLayer({name: layer.codes, "weight_scale": layer.qparams["scale"]}, config)


@hookimpl
def dequantize(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """Codes times scales."""
    codes, bits = _codes(tensors), config["weights"]["num_bits"]
    scale = numerics.decode_e8m0(tensors["weight_scale"])
    return numerics.scale_groups(elements.decode(codes, bits), scale)


@hookimpl
def error_bound(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: MicroscalingOptions
) -> Tensor | None:
    """Half a step around each code, more where a searched scale clips; GPTQ moves weights on
    purpose.
    """
    if options.algorithm == "gptq":
        return None
    scale = numerics.decode_e8m0(tensors["weight_scale"])
    return elements.bound(_codes(tensors), scale, config["weights"]["num_bits"])


def _codes(tensors: Mapping[str, Tensor]) -> Tensor:
    """(out, in)."""
    if "weight" in tensors:
        return tensors["weight"]
    return numerics.unpack_bytes(tensors["weight_packed"], 4)


@hookimpl
def quantize_activations(inputs: Tensor, config: Mapping[str, Any]) -> Tensor | None:
    """The numbers (tokens, in) of the same format; None where activations are not quantized."""
    if config["input_activations"] is None:
        return None
    return elements.round_inputs(inputs, config["input_activations"]["num_bits"])


@hookimpl
def validate_shape(shape: tuple[int, int], cut: str | None) -> Sequence[Finding]:
    """Ranks hold whole groups."""
    width = shape[1]
    if cut != "columns" or width % elements.GROUP_SIZE == 0:
        return []
    return [
        Finding(
            "unsupported",
            f"vLLM cannot cut it into parts of {width} columns: a rank must hold whole groups of "
            f"{elements.GROUP_SIZE}",
        )
    ]
