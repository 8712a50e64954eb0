"""What `sparse-2of4` and `sparse` share: their hooks, which ask the options how many weights of how
many are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import frozen

import bitpress
from bitpress import Finding, Hardware, Layer, Statistic, StoredLayer, hookimpl, numerics, option
from bitpress_sparse import bitmask, masks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALGORITHM = (
    "sparsegpt: dropped weights made up for one by one; wanda: after all are chosen; magnitude: no "
    "data"
)
# The package that teaches vLLM to read bitmasks, and to compute without zeros.
PLUGIN = "bitpress-vllm-sparse"

ZEROS_STAY = "without a plugin, vLLM stores zeros like other weights"
ZEROS_RETURN = "files are smaller, and zeros come back while they are loaded"

# compressed-tensors' name for no pattern.
UNSTRUCTURED = "unstructured"

# What a config says of weights in a model's dtype. Loaders know no floats of 16 bits: over one they
# would fail before they come to the `sparsity_config`, and say why.
PLAIN_WEIGHTS: Mapping[str, Any] = {
    "num_bits": 16,
    "type": "int",
    "symmetric": True,
    "dynamic": False,
    "strategy": "channel",
}

LAYOUT = f"dense: zeros among the other weights; bitmask: none, for vLLM with {PLUGIN}"


@frozen
class PruningOptions(bitpress.ReferenceOptions):
    """Options of both schemes."""

    algorithm: Literal["sparsegpt", "wanda", "magnitude"] = option("sparsegpt", ALGORITHM)
    layout: Literal["dense", "bitmask"] = option("dense", LAYOUT)

    @property
    def calibrated(self) -> bool:
        """Magnitude is that of the weights alone."""
        return self.algorithm != "magnitude"

    @property
    def transformers_reason(self) -> str | None:
        """It reads no bitmasks."""
        if self.layout == "bitmask":
            return "it reads no weights without their zeros (layout=bitmask)"
        return None

    @property
    def vllm_plugin(self) -> str | None:
        """Bitmasks are read by the plugin alone."""
        return PLUGIN if self.layout == "bitmask" else None

    def group_size(self, width: int) -> int:
        """Columns of a group, in a layer of that width.

        Raises:
            ShapeError: the width is not a multiple of them.
        """
        raise NotImplementedError

    def num_kept(self, width: int) -> int:
        """How many weights of a group are kept, in a layer of that width."""
        raise NotImplementedError

    @property
    def structure(self) -> str:
        """The pattern of zeros, as compressed-tensors names it."""
        raise NotImplementedError

    @property
    def sparsity_config(self) -> Mapping[str, str]:
        """What the config says of zeros. compressed-tensors has a layout of its own for 2:4, where
        rows are not chained.
        """
        if self.layout == "dense":
            layout = "dense"
        else:
            layout = bitmask.QUADS if self.structure == "2:4" else bitmask.CHAINED
        return {"format": layout, "sparsity_structure": self.structure}


# As many arguments as the hook has.
@hookimpl
def observe(  # noqa: PLR0913, PLR0917
    inputs: Tensor | None,
    reference: Tensor | None,
    residual: Tensor | None,
    output_gradient: Tensor | None,
    weight: Tensor,
    options: PruningOptions,
) -> Mapping[str, Statistic] | None:
    """The Hessian of inputs, what makes up for their drift, and the Hessian of outputs."""
    if output_gradient is not None:
        return numerics.output_statistics(output_gradient) if options.calibrated else None
    if inputs is None or not options.calibrated:
        return None
    return numerics.gptq_statistics(inputs, weight, reference, residual)


@hookimpl
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: PruningOptions) -> Layer:
    """The weight, in numbers of the model's dtype, with zeros where `mask` is False.

    With data, the mask is chosen on the weight that makes up for the drift of the layer's inputs,
    and the weights under it are then fitted to that: conjugate gradients find the best numbers for
    a given mask.
    """
    import torch

    width = layer.weight.shape[1]
    candidates = layer.weight != 0
    if layer.mask is not None:
        candidates = layer.mask & candidates
    factor = _factorize(stats, options.group_size(width), options)
    target = layer.weight if factor is None else numerics.gptq_target(layer, stats, factor)

    row_factor = None if factor is None else numerics.factorize_output_hessian(stats)
    mask = torch.empty_like(candidates)

    def prune(row_targets: Tensor, rows: slice) -> Tensor:
        pruned, kept = _prune(row_targets, candidates[rows], factor, layer.dtype, options)
        mask[rows] = kept & candidates[rows]
        return pruned

    weight = numerics.decide_rows(target, row_factor, prune)
    output_hessian = numerics.damped_output_hessian(stats)
    if factor is not None and output_hessian is not None:
        # rows decided early have not made up for the errors of those after them
        weight = numerics.masked_least_squares(weight, target, factor, mask, output_hessian)
        weight = _round_to(layer.dtype, weight)
    return attrs.evolve(layer, weight=weight, mask=mask)


@hookimpl
def pack(layer: Layer, options: PruningOptions) -> Layer:
    """Where no other step has made codes of them, weights in the model's dtype; of a bitmask's, as
    many of every row as are kept.
    """
    codes = layer.weight.to(layer.dtype) if layer.codes is None else layer.codes
    if options.layout == "dense":
        return attrs.evolve(layer, codes=codes)
    width = codes.shape[1]
    mask = masks.fill(layer.weight != 0, options.num_kept(width), options.group_size(width))
    qparams = {**layer.qparams, bitmask.MASK: bitmask.pack_mask(mask)}
    return attrs.evolve(layer, codes=bitmask.compress(codes, mask), qparams=qparams)


@hookimpl
def serialize(layer: Layer, stored: StoredLayer | None, options: PruningOptions) -> StoredLayer:
    """`weight` (out, in), or what a later step stores; as a bitmask, in place of their numbers,
    `compressed`, `bitmask` U8 (out, ceil(in / 8)), `shape` I64 and, but for 2:4, `row_offsets` I64
    (out,).
    """
    if stored is None:
        assert layer.codes is not None
        stored = StoredLayer({"weight": layer.codes})
    of_zeros = dict(options.sparsity_config)
    if options.layout == "bitmask":
        is_chained = of_zeros["format"] == bitmask.CHAINED
        shape = (layer.weight.shape[0], layer.weight.shape[1])
        tensors = bitmask.lay_out(stored, layer.qparams[bitmask.MASK], shape, is_chained)
        # transformers reads no `sparsity_config`: but for a format that it does not know, it would
        # take layers for missing, and give them random weights.
        config = stored.config or {"weights": dict(PLAIN_WEIGHTS)}
        config = {**config, "format": of_zeros["format"], "sparsity_config": of_zeros}
        return StoredLayer(tensors, config)
    # Of plain weights loaders want no config; of other patterns nobody would make anything.
    if stored.config is None or options.structure == UNSTRUCTURED:
        return stored
    return StoredLayer(stored.tensors, {**stored.config, "sparsity_config": of_zeros})


@hookimpl
def expand(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Mapping[str, Tensor] | None:
    """The numbers of all columns, zeros included, as the step that made them lays them out."""
    return bitmask.expand(tensors, config) if bitmask.MASK in tensors else None


@hookimpl
def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight, zeros included."""
    return tensors["weight"].float()


@hookimpl
def validate_weight(weight: Tensor, options: PruningOptions) -> str | None:
    """No group holds more numbers than are kept."""
    width = weight.shape[1]
    group_size, num_kept = options.group_size(width), options.num_kept(width)
    num_nonzero = int((weight != 0).view(-1, group_size).sum(1).amax())
    if num_nonzero <= num_kept:
        return None
    return f"{num_nonzero} of {group_size} neighbors are not zero, where at most {num_kept} may be"


@hookimpl
def error_bound(weight: Tensor, bound: Tensor | None, options: PruningOptions) -> Tensor | None:
    """What steps after this one may have moved; for weights that are not kept, the least of those
    that are, in their group. With data, weights are moved on purpose.
    """
    import torch

    if options.calibrated:
        return None
    width = weight.shape[1]
    moved = torch.zeros_like(weight) if bound is None else bound.expand(weight.shape)
    groups, moved_groups = (x.reshape(-1, options.group_size(width)) for x in (weight.abs(), moved))
    is_kept = groups != 0
    smallest = (groups + moved_groups).masked_fill(~is_kept, torch.inf).amin(1, keepdim=True)
    # Where fewer are not zero than are kept, some were so small that a later step made zeros of
    # them: what was not kept is smaller still.
    is_full = is_kept.sum(1, keepdim=True) == options.num_kept(width)
    moved_zeros = moved_groups.masked_fill(is_kept, 0.0).amax(1, keepdim=True)
    smallest = torch.where(is_full, smallest, moved_zeros)
    return torch.where(is_kept, moved_groups, smallest.maximum(moved_groups)).view_as(weight)


def _prune(
    target: Tensor,
    candidates: Tensor,
    factor: numerics.Factor | None,
    dtype: torch.dtype,
    options: PruningOptions,
) -> tuple[Tensor, Tensor]:
    """Some rows' weight, and the mask of what is stored of them, zeros among it."""
    import torch

    width = target.shape[1]
    group_size, num_kept = options.group_size(width), options.num_kept(width)
    # By a power of two rows are brought near 1, where no square over- or underflows float32.
    power = -target.abs().amax(1, keepdim=True).frexp().exponent.clamp(-126, 126)  # (rows, 1)
    target = target * numerics.power_of_two(power)

    weight = target
    if factor is None:
        mask = masks.select_largest(target.abs(), candidates, num_kept, group_size)
    elif options.algorithm == "wanda":
        mask = masks.wanda(target, factor.diagonal, candidates, num_kept, group_size)
    else:
        mask, weight = masks.sparsegpt(target, factor, candidates, num_kept, group_size)
    if factor is not None:
        weight = numerics.masked_least_squares(weight, target, factor, mask & candidates)

    weight = torch.where(mask & candidates, weight * numerics.power_of_two(-power), 0.0)
    return _round_to(dtype, weight), mask


def _round_to(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """The nearest finite numbers of the model's dtype, in float32."""
    import torch

    # weights come in float32, whatever the model stores them in
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    weight = weight.clamp(-largest, largest).to(dtype).float()
    # Old kernels for 2:4 weights broke on -0.0.
    return torch.where(weight == 0, 0.0, weight)


def _factorize(
    stats: Mapping[str, Statistic], group_size: int, options: PruningOptions
) -> numerics.Factor | None:
    if not options.calibrated or "hessian" not in stats:
        return None
    tokens = stats["tokens"].value.item()
    factor = numerics.factorize_hessian(stats["hessian"].value, tokens, group_size)
    if factor is None:
        warnings.warn(
            "its calibration statistics are not finite or singular: pruned by magnitude",
            stacklevel=2,
        )
    return factor


def findings(options: PruningOptions, hardware: Hardware) -> Sequence[Finding]:
    """What vLLM makes of both schemes on a device, with its plugin and without."""
    cores = (
        f"with {PLUGIN}, vLLM computes it on sparse tensor cores (8-bit floats from capability 9.0 "
        "on); how fast is not measured"
    )
    is_sparse = options.structure != UNSTRUCTURED and (hardware.capability or (0, 0)) >= (8, 0)
    found = [Finding("supported", cores)] if is_sparse else []
    if options.layout == "bitmask":
        return [
            Finding("supported", f"vLLM reads these files with {PLUGIN}, and refuses them without"),
            *(found or [Finding("degraded", f"{ZEROS_RETURN}: neither memory nor speed changes")]),
        ]
    return [
        Finding(
            "supported", "loads and runs wherever the model itself does, or the scheme that follows"
        ),
        *found,
        Finding("degraded", f"{ZEROS_STAY}, and neither size nor speed changes there"),
    ]
