"""What `w4a16` and `w8a16` share: their hooks, which ask the options for the number of bits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import frozen

import bitpress
from bitpress import (
    CodeForm,
    Finding,
    Hardware,
    Layer,
    ShapeError,
    Statistic,
    StoredLayer,
    hookimpl,
    numerics,
    option,
)
from bitpress_w4a16 import awq, fp8_inputs
from bitpress_w4a16.source_grid import source_grid

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# From a weight and what an error costs in each column to the grid for it.
Fit = Callable[["Tensor", "Tensor | None"], "numerics.IntegerGrid"]

ALGORITHM = (
    "gptq: errors fed forward; awq: salient channels scaled up; rtn: plain rounding, no data"
)
# Group sizes that a user may set, and that "auto" tries in this order.
GROUP_SIZES = (128, 64, 32)

# vLLM's CPU kernel for 4 bits takes rows and columns in multiples of it.
CPU_MULTIPLE = 32

# Half the range of 16-bit codes, -32768 to 32767: the scale of activations is amax / 32767.5.
INT16_HALF_RANGE = 32767.5

# Scales that are tried, by bits, in units of the one that reaches the largest weight. With few bits
# a clipped weight may cost less than a coarse step. With 8 bits and a zero point, where both ends
# are reached, it never does. Of equals the first is taken, which clips least.
SYMMETRIC_RATIOS = {
    4: tuple(1.08 - 0.02 * i for i in range(32)),
    8: tuple(1.02 - 0.02 * i for i in range(24)),
}
ASYMMETRIC_RATIOS = {4: tuple(1.05 - 0.025 * i for i in range(21)), 8: (1.0,)}


@frozen
class WeightOnlyOptions(bitpress.ReferenceOptions):
    """Options of both schemes."""

    algorithm: Literal["gptq", "awq", "rtn"] = option("gptq", ALGORITHM)
    group_size: Literal[128, 64, 32, "channel", "auto"] = option(
        128, "columns that share a scale; auto: what fits each layer"
    )
    symmetric: bool = option(True, "false: groups have a zero point")

    @property
    def bits(self) -> int:
        """Bits per code."""
        raise NotImplementedError

    @property
    def input_config(self) -> Mapping[str, Any] | None:
        """What the config says of activations; None where they are left as they are."""
        return None

    @property
    def static_inputs(self) -> bool:
        """Whether a scale of activations is stored."""
        return self.input_config is not None and not self.input_config["dynamic"]

    @property
    def packed(self) -> bool:
        """Whether codes lie in 32-bit words, or each in a byte."""
        return True

    @property
    def fp8_inputs(self) -> bool:
        """Whether scales are multiplied with FP8 activations."""
        return self.input_config is not None and self.input_config["type"] == "float"

    @property
    def calibrated(self) -> bool:
        """All but plain rounding of weights looks at inputs."""
        return self.algorithm != "rtn" or self.static_inputs

    @property
    def rescales(self) -> bool:
        """AWQ scales channels."""
        return self.algorithm == "awq"

    @property
    def row_block(self) -> int:
        """Zero points of consecutive rows lie in one 32-bit word."""
        return 1 if self.symmetric else 32 // self.bits

    def resolve_group_size(self, width: int) -> int:
        """Columns that share a scale in a layer of that width.

        Raises:
            ShapeError: the width is not a multiple of `group_size`.
        """
        if self.group_size == "channel":
            return width
        fitting = [size for size in GROUP_SIZES if width % size == 0]
        if self.group_size == "auto":
            return fitting[0] if fitting else width
        if self.group_size not in fitting:
            choices = ", ".join(f"group_size={size}" for size in (*fitting, "channel", "auto"))
            raise ShapeError(
                f"width {width} is not a multiple of group_size {self.group_size} (as "
                f"{max(width // 128, 1) * 128} is); what fits: {choices}"
            )
        return self.group_size


# As many arguments as the hook has.
@hookimpl
def observe(  # noqa: PLR0913, PLR0917
    inputs: Tensor | None,
    reference: Tensor | None,
    residual: Tensor | None,
    output_gradient: Tensor | None,
    weight: Tensor,
    options: WeightOnlyOptions,
) -> Mapping[str, Statistic] | None:
    """The Hessian of inputs for GPTQ and AWQ, and of outputs for GPTQ; for static activations, the
    largest input.
    """
    if output_gradient is not None:
        return numerics.output_statistics(output_gradient) if options.algorithm == "gptq" else None
    if inputs is None:
        return None
    stats: dict[str, Statistic] = {}
    if options.algorithm == "gptq":
        stats |= numerics.gptq_statistics(inputs, weight, reference, residual)
    elif options.algorithm == "awq":
        stats |= numerics.gptq_statistics(inputs, weight)
    if options.static_inputs:
        stats |= numerics.observe_range(inputs, histogram=False)
    return stats


@hookimpl
def rescale(
    layer: Layer, stats: Mapping[str, Statistic], options: WeightOnlyOptions
) -> Tensor | None:
    """AWQ's factors."""
    group_size = options.resolve_group_size(layer.weight.shape[1])
    return awq.factors(layer.weight, stats, options.bits, group_size, options.symmetric)


@hookimpl
def keep_codes(
    form: CodeForm, shape: tuple[int, int], dtype: torch.dtype, options: WeightOnlyOptions
) -> WeightOnlyOptions | None:
    """Integers of the same bits and groups, rounded to nearest, which leaves them as they are."""
    group = (1, options.resolve_group_size(shape[1]))
    if (form.numbers, form.bits, form.group) != ("integer", options.bits, group):
        return None
    # scales that meet FP8 activations are rounded
    if (form.has_zero_points and options.symmetric) or options.fp8_inputs:
        return None
    return attrs.evolve(options, algorithm="rtn") if _holds(dtype, form.scale_dtype) else None


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether all numbers of another dtype are numbers of one."""
    import torch

    is_half = other in (torch.float16, torch.bfloat16)
    return other == dtype or (dtype == torch.float32 and is_half)


@hookimpl
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: WeightOnlyOptions) -> Layer:
    """Codes with scale (out, groups) in the model's dtype and, if asymmetric, zero points (out,
    groups) int8.
    """
    import torch

    width = layer.weight.shape[1]
    group_size = options.resolve_group_size(width)
    if options.group_size == "auto" and group_size != GROUP_SIZES[0]:
        chosen = "channel" if group_size == width else group_size
        warnings.warn(f"group_size=auto: {chosen}, as {width} columns need it", stacklevel=2)

    fit_grid = numerics.fit_symmetric if options.symmetric else numerics.fit_asymmetric
    ratios = (SYMMETRIC_RATIOS if options.symmetric else ASYMMETRIC_RATIOS)[options.bits]

    # on the grid of the source, rounding changes nothing
    known_grid = source_grid(layer, options.bits, group_size, symmetric=options.symmetric)

    def fit(weight: Tensor, importance: Tensor | None) -> numerics.IntegerGrid:
        return known_grid or fit_grid(
            weight, importance, options.bits, group_size, ratios, dtype=layer.dtype
        )

    def round_with(fit: Fit) -> tuple[Tensor, numerics.IntegerGrid]:
        if options.algorithm == "gptq":
            return numerics.gptq_quantize(layer, stats, fit)
        return layer.weight, fit(layer.weight, awq.importance(stats))

    weight, grid = round_with(fit)
    if options.fp8_inputs:
        scale = fp8_inputs.storable_scale(grid.scale, layer.dtype)
        # without a dtype of scales it keeps them as they are
        final_grid = numerics.IntegerGrid(scale, None, options.bits, group_size)
        weight, grid = round_with(lambda weight, importance: final_grid)
    # 0 is on every grid, so `mask` holds by itself.
    codes = grid.codes(weight)  # (out, in)
    qparams = {"scale": grid.scale.to(layer.dtype).contiguous()}
    if grid.zero is not None:
        qparams["zero_point"] = grid.zero.to(torch.int8).contiguous()
    if options.static_inputs:
        amax = numerics.input_absmax(stats)
        if amax is None:
            amax = torch.tensor(INT16_HALF_RANGE)
        scale = amax / numerics.scalar_like(amax, INT16_HALF_RANGE)
        qparams["input_scale"] = scale.masked_fill(amax == 0, 1.0)
    return attrs.evolve(
        layer,
        weight=lambda: numerics.decode_integers(codes, grid.scale, grid.zero),
        codes=codes,
        qparams=qparams,
    )


@hookimpl
def pack(layer: Layer, options: WeightOnlyOptions) -> Layer:
    """Codes in words along the row, (out, words) int32, or as they are; zero points in words along
    the column: (out / row_block, groups).
    """
    assert layer.codes is not None
    qparams = dict(layer.qparams)
    if "zero_point" in qparams:
        words = numerics.pack_words(qparams["zero_point"].T, options.bits)
        qparams["zero_point"] = words.T.contiguous()
    codes = numerics.pack_words(layer.codes, options.bits) if options.packed else layer.codes
    return attrs.evolve(layer, codes=codes, qparams=qparams)


@hookimpl
def serialize(layer: Layer, options: WeightOnlyOptions) -> StoredLayer:
    """`weight_packed` and `weight_shape` I64 (2,), or `weight` I8 (out, in); `weight_scale`; as
    options ask, `weight_zero_point`, `input_scale` F32 (1,).
    """
    import torch

    assert layer.codes is not None
    tensors = {"weight_scale": layer.qparams["scale"]}
    if options.packed:
        tensors["weight_packed"] = layer.codes
        tensors["weight_shape"] = torch.tensor(layer.weight.shape)
    else:
        tensors["weight"] = layer.codes
    weights: dict[str, Any] = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": options.symmetric,
        "dynamic": False,
    }
    width = layer.weight.shape[1]
    group_size = options.resolve_group_size(width)
    # One group as wide as the layer is a channel, unless the user asked for groups of that size.
    if group_size == width != options.group_size:
        weights["strategy"] = "channel"
    else:
        weights |= {"strategy": "group", "group_size": group_size}
    if not options.symmetric:
        tensors["weight_zero_point"] = layer.qparams["zero_point"]
        weights["zp_dtype"] = "torch.int8"
    if options.static_inputs:
        tensors["input_scale"] = layer.qparams["input_scale"].reshape(1)
    config = {
        "format": "pack-quantized" if options.packed else "int-quantized",
        "weights": weights,
        "input_activations": options.input_config,
    }
    return StoredLayer(tensors, config)


@hookimpl
def dequantize(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """(code - zero point) · scale, for as many rows as there are rows of packed codes."""
    codes, zero_point = _unpack(tensors, config["weights"]["num_bits"])
    return numerics.decode_integers(codes, tensors["weight_scale"], zero_point)


@hookimpl
def error_bound(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], options: WeightOnlyOptions
) -> Tensor | None:
    """Half a step, more where a searched scale clips; GPTQ moves weights on purpose."""
    if options.algorithm == "gptq":
        return None
    bits, is_symmetric = config["weights"]["num_bits"], config["weights"]["symmetric"]
    ratios = (SYMMETRIC_RATIOS if is_symmetric else ASYMMETRIC_RATIOS)[bits]
    codes, zero_point = _unpack(tensors, bits)
    least = min(ratios) * (fp8_inputs.LEAST_ROUNDED if options.fp8_inputs else 1)
    return numerics.integer_bound(codes, tensors["weight_scale"], zero_point, bits, least)


def _unpack(tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor | None]:
    """Codes (out, in), and zero points (out, groups) where there are some."""
    if "weight" in tensors:
        return tensors["weight"], None
    packed, zero_point = tensors["weight_packed"], tensors.get("weight_zero_point")
    codes = numerics.unpack_words(packed, bits, int(tensors["weight_shape"][1]))
    if zero_point is not None:
        zero_point = numerics.unpack_words(zero_point.T, bits, len(packed)).T
    return codes, zero_point


@hookimpl
def quantize_activations(
    inputs: Tensor, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Tensor | None:
    """The numbers (tokens, in) that codes of inputs stand for, as compressed-tensors computes them;
    None where activations are not quantized.

    16-bit codes have the stored scale. The scale of each token is amax / 448 of it for E4M3, and
    (max - min) / 255 for 8-bit integers.
    """
    args = config["input_activations"]
    if args is None:
        return None
    if args["type"] == "float":
        return numerics.round_rows_e4m3(inputs)
    if args["dynamic"]:
        return numerics.round_tokens_int8(inputs, symmetric=args["symmetric"])
    scale = tensors["input_scale"].to(inputs.device).float()
    return (inputs / scale).round_().clamp_(-(1 << 15), (1 << 15) - 1).mul_(scale)


@hookimpl
def validate_shape(
    shape: tuple[int, int], cut: str | None, hardware: Hardware, options: WeightOnlyOptions
) -> Sequence[Finding]:
    """Ranks hold whole groups and whole words of zero points; vLLM's CPU kernel takes multiples
    of 32.
    """
    rows, width = shape
    size = options.group_size
    if cut == "columns" and isinstance(size, int) and width % size:
        return [
            Finding(
                "unsupported",
                f"vLLM refuses parts of {width} columns: a rank must hold whole groups of {size}",
            )
        ]
    if cut == "rows" and rows % options.row_block:
        return [
            Finding(
                "unsupported",
                f"vLLM refuses parts of {rows} rows: zero points of {options.row_block} rows share "
                "a word",
            )
        ]
    if options.fp8_inputs and rows % fp8_inputs.GROUP_SIZE:
        return [
            Finding(
                "degraded",
                f"vLLM's kernel takes multiples of {fp8_inputs.GROUP_SIZE} rows, of all that it "
                f"fuses together; these are {rows}",
            )
        ]
    is_ragged = rows % CPU_MULTIPLE or width % CPU_MULTIPLE
    if hardware.vendor == "cpu" and options.bits == 4 and options.packed and is_ragged:
        return [
            Finding(
                "unsupported",
                f"vLLM's CPU kernel takes multiples of {CPU_MULTIPLE}, not {rows} x {width}",
            )
        ]
    return []
