"""FP8 (E4M3) weights in 128 x 128 tiles, FP8 activations quantized at run time per group of 128."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from bitpress import (
    CodeForm,
    Finding,
    Hardware,
    Layer,
    MeasuredLoss,
    ShapeError,
    Statistic,
    StoredLayer,
    hookimpl,
    numerics,
    option,
)
from bitpress_fp8 import e4m3
from bitpress_fp8.activations import quantize_activations
from bitpress_fp8.e4m3 import dequantize, error_bound
from bitpress_fp8.hardware import gpu_findings

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "EFFORTS",
    "MEASURED_LOSSES",
    "Options",
    "dequantize",
    "error_bound",
    "keep_codes",
    "observe",
    "quantize",
    "quantize_activations",
    "serialize",
    "validate_hardware",
    "validate_shape",
]

# As for `fp8`.
EFFORTS: Mapping[str, Mapping[str, str]] = {"high": {"algorithm": "gptq"}}

# On 60,000 tokens of a held-out text, benchmarks/README.md.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (MeasuredLoss("tiny-llama (11M)", 0.00217),)

# Rows and columns of a tile: the engines' kernels read no other.
BLOCK = (128, 128)


def _check_block(
    instance: Options, attribute: attrs.Attribute[Any], value: tuple[int, int]
) -> None:
    if value != BLOCK:
        raise ValueError(
            f"block {list(value)} cannot be served: the engines' kernels read tiles of "
            f"{list(BLOCK)} only"
        )


@frozen
class Options(e4m3.AlgorithmOptions):
    """Options of `fp8-block`."""

    block: tuple[int, int] = option(
        BLOCK, "rows and columns that share a scale", validator=_check_block
    )

    @property
    def row_block(self) -> int:
        """A tile's rows share a scale."""
        return self.block[0]


# As many arguments as the hook has.
@hookimpl
def observe(  # noqa: PLR0913, PLR0917
    inputs: Tensor | None,
    reference: Tensor | None,
    residual: Tensor | None,
    output_gradient: Tensor | None,
    weight: Tensor,
    options: Options,
) -> Mapping[str, Statistic] | None:
    """What GPTQ needs of inputs and of the gradients of outputs."""
    if output_gradient is not None:
        return numerics.output_statistics(output_gradient) if options.algorithm == "gptq" else None
    if inputs is None or options.algorithm == "rtn":
        return None
    return numerics.gptq_statistics(inputs, weight, reference, residual)


@hookimpl
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: Options) -> Layer:
    """Round with scale amax / 448 of each tile, (ceil(out / 128), in / 128): to nearest, or where a
    step has observed inputs for it by GPTQ.
    """
    out, width = layer.weight.shape
    # vLLM 0.32 pads a ragged last group of inputs; transformers 5.17 raises at the first forward.
    if width % options.block[1]:
        raise ShapeError(
            f"width {width} is not a multiple of {options.block[1]}, into which transformers cuts "
            "the activations; scheme fp8 takes any width"
        )
    if "hessian" in stats:
        weight, grid = numerics.gptq_quantize(layer, stats, lambda weight, _: _fit(weight, options))
        layer = attrs.evolve(layer, weight=weight)
    else:
        grid = _fit(layer.weight, options, _find_source_scale(layer, options))
    scale = grid.scale[:: options.block[0]].contiguous()
    return e4m3.encode(layer, scale, numerics.expand_blocks(scale, options.block, (out, width)))


@hookimpl
def keep_codes(form: CodeForm, options: Options) -> Options | None:
    """E4M3 in the same tiles."""
    return e4m3.keep_codes(form, options) if form.group == options.block else None


def _find_source_scale(layer: Layer, options: Options) -> Tensor | None:
    """The scales of the source's tiles, if it has such."""
    import torch

    by_row = e4m3.source_scale(layer, options.block[1])  # (out, in / 128)
    if by_row is None:
        return None
    scale = by_row[:: options.block[0]]
    expanded = scale.repeat_interleave(options.block[0], 0)[: len(by_row)]
    return scale if torch.equal(expanded, by_row) else None


def _fit(weight: Tensor, options: Options, scale: Tensor | None = None) -> numerics.FloatGrid:
    """The grid of a weight (out, in) whose tiles have scales amax / 448, or those of the source."""
    if scale is None:
        scale = numerics.e4m3_scale(numerics.block_absmax(weight, options.block))
    by_row = scale.repeat_interleave(options.block[0], 0)[: len(weight)]  # (out, in / 128)
    return numerics.FloatGrid(numerics.E4M3, by_row, options.block[1])


@hookimpl
def serialize(layer: Layer, options: Options) -> StoredLayer:
    """`weight` F8_E4M3 (out, in) and `weight_scale` F32 (ceil(out / 128), in / 128)."""
    weights = {"strategy": "block", "block_structure": list(options.block), "dynamic": False}
    return e4m3.store(
        layer, weights, {"strategy": "group", "group_size": options.block[1], "dynamic": True}
    )


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Native from capability 8.9, tuned from 9.0; weight-only below; on CPUs only with AMX."""
    if hardware.vendor != "cpu":
        return gpu_findings(hardware, "FP8 block")
    if hardware.amx:
        return [
            Finding(
                "supported",
                "vLLM's CPU build runs it with AMX tiles; int8 or w4a16 are made for CPUs",
            )
        ]
    return [
        Finding(
            "unsupported",
            "vLLM's CPU kernels for FP8 blocks need AMX tiles; scheme fp8 runs on x86 without them",
        )
    ]


@hookimpl
def validate_shape(shape: tuple[int, int], cut: str | None, options: Options) -> Sequence[Finding]:
    """Ranks hold whole tiles."""
    if cut is None:
        return []
    axis = 1 if cut == "columns" else 0
    size, tile = shape[axis], options.block[axis]
    if size % tile == 0:
        return []
    return [
        Finding(
            "unsupported",
            f"vLLM refuses parts of {size} {cut}: a rank must hold whole tiles of {tile}",
        )
    ]
