"""What `sparse-2of4` and `sparse` share: their hooks, which ask the options how many weights of how
many are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import attrs
from attrs import frozen

import bitpress
from bitpress import Finding, Layer, Statistic, StoredLayer, hookimpl, numerics, option
from bitpress_sparse import bitmask, masks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALGORITHM = (
    "sparsegpt: dropped weights made up for one by one; wanda: after all are chosen; magnitude: no "
    "data"
)
# pruned at a time: they bound what is made of them on the way
ROWS = 2048
LAYOUT = "dense: zeros among the other weights; bitmask: for engines that still read it"


@frozen
class PruningOptions(bitpress.Options):
    """Options of both schemes."""

    algorithm: Literal["sparsegpt", "wanda", "magnitude"] = option("sparsegpt", ALGORITHM)
    layout: Literal["dense", "bitmask"] = option("dense", LAYOUT)

    @property
    def calibrated(self) -> bool:
        """Magnitude is that of the weights alone."""
        return self.algorithm != "magnitude"

    def group(self, width: int) -> int:
        """Columns of which so many are kept; raises ShapeError where they do not divide the
        width.
        """
        raise NotImplementedError

    def kept(self, width: int) -> int:
        """How many weights of a group are kept."""
        raise NotImplementedError

    @property
    def stored_as(self) -> Mapping[str, str]:
        """What the config says of the bitmask layout."""
        raise NotImplementedError


@hookimpl
def observe(
    inputs: Tensor | None,
    reference: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    options: PruningOptions,
) -> Mapping[str, Statistic] | None:
    """What error feedback needs of inputs."""
    return (
        numerics.gptq_statistics(inputs, weight, reference, residual)
        if inputs is not None and options.calibrated
        else None
    )


@hookimpl
def quantize(layer: Layer, stats: Mapping[str, Statistic], options: PruningOptions) -> Layer:
    """The kept weights, in numbers of the model's dtype, and in `mask` where they are.

    Which are kept is decided on the weight that makes up for what the layers before it have moved.
    With data, those that are kept are then fitted to it: conjugate gradients find the best numbers
    for a given mask.
    """
    import torch

    width = layer.weight.shape[1]
    allowed = layer.weight != 0 if layer.mask is None else layer.mask & (layer.weight != 0)
    factored = _factor(stats, options.group(width), options)
    wanted = layer.weight if factored is None else numerics.gptq_target(layer, stats, factored)
    tiles = zip(torch.split(wanted, ROWS), torch.split(allowed, ROWS), strict=True)
    weight, mask = map(
        torch.cat,
        zip(*(_prune(*tile, factored, layer.dtype, options) for tile in tiles), strict=True),
    )
    keep = mask & allowed
    if options.layout == "dense":
        return attrs.evolve(layer, weight=weight, mask=keep)
    codes = bitmask.values(weight.to(layer.dtype), mask)
    return attrs.evolve(
        layer, weight=weight, mask=keep, codes=codes, qparams={"bitmask": bitmask.bits(mask)}
    )


@hookimpl
def pack(layer: Layer, options: PruningOptions) -> Layer:
    """Where no other step has made codes of them, weights in the model's dtype."""
    return (
        layer
        if layer.codes is not None
        else attrs.evolve(layer, codes=layer.weight.to(layer.dtype))
    )


@hookimpl
def serialize(layer: Layer, options: PruningOptions) -> StoredLayer:
    """`weight` (out, in); or as a bitmask `compressed`, `bitmask` U8 (out, ceil(in / 8)), `shape`
    I64 and, where groups are rows, `row_offsets` I64 (out,).
    """
    import torch

    assert layer.codes is not None
    if options.layout == "dense":
        return StoredLayer({"weight": layer.codes})
    (rows, width), kept = layer.weight.shape, layer.codes.shape[1]
    tensors = {"bitmask": layer.qparams["bitmask"], "shape": torch.tensor([rows, width])}
    if options.group(width) == width:
        tensors |= {"compressed": layer.codes.flatten(), "row_offsets": torch.arange(rows) * kept}
    else:
        tensors |= {"compressed": layer.codes, "shape": tensors["shape"].unsqueeze(1)}
    return StoredLayer(tensors, dict(options.stored_as))


@hookimpl
def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight, zeros included."""
    if "weight" in tensors:
        return tensors["weight"].float()
    return bitmask.dense(
        tensors["compressed"], tensors["bitmask"], int(tensors["shape"].flatten()[1])
    ).float()


@hookimpl
def validate_weight(weight: Tensor, options: PruningOptions) -> str | None:
    """No group holds more numbers than are kept."""
    width = weight.shape[1]
    group, kept = options.group(width), options.kept(width)
    most = int((weight != 0).view(-1, group).sum(1).amax())
    return (
        f"{most} of {group} neighbors are not zero, where at most {kept} may be"
        if most > kept
        else None
    )


def _prune(
    wanted: Tensor,
    allowed: Tensor,
    factored: numerics.Factor | None,
    dtype: torch.dtype,
    options: PruningOptions,
) -> tuple[Tensor, Tensor]:
    """Some rows as they will be, and the mask of what is stored, which may hold weights that are
    zero.
    """
    import torch

    width = wanted.shape[1]
    group, kept = options.group(width), options.kept(width)
    power = -wanted.abs().amax(1, keepdim=True).frexp().exponent.clamp(-126, 126)  # (rows, 1)
    # near 1, where no square is too large or too small for float32
    near = wanted.ldexp(power)
    if factored is None:
        mask, found = masks.largest(near.abs(), allowed, kept, group), near
    elif options.algorithm == "wanda":
        mask, found = masks.wanda(near, factored.diagonal, allowed, kept, group), near
    else:
        mask, found = masks.sparsegpt(near, factored, allowed, kept, group)
    if factored is not None:
        found = numerics.masked_least_squares(found, near, factored, mask & allowed)
    limit = torch.finfo(dtype).max
    found = (
        torch.where(mask & allowed, found.ldexp(-power), 0.0)
        .clamp_(-limit, limit)
        .to(dtype)
        .float()
    )
    # no zero has a sign: kernels for sparse weights have stumbled on it
    return torch.where(found == 0, 0.0, found), mask


def _factor(
    stats: Mapping[str, Statistic], group: int, options: PruningOptions
) -> numerics.Factor | None:
    if not options.calibrated or "hessian" not in stats:
        return None
    found = numerics.factorize_hessian(stats["hessian"].value, stats["tokens"].value.item(), group)
    if found is None:
        warnings.warn(
            "its calibration statistics are not finite or singular: pruned by magnitude",
            stacklevel=2,
        )
    return found


def findings(options: PruningOptions, text: str) -> Sequence[Finding]:
    """What holds for both schemes, on any device.

    Args:
        text: what is to be said of the layout for older engines.
    """
    if options.layout == "bitmask":
        return [Finding("unsupported", f"{text}; layout=dense loads everywhere")]
    plain = (
        "vLLM has no sparse layout: zeros are stored like other weights, and neither size nor "
        "speed changes there"
    )
    return [
        Finding(
            "supported", "loads and runs wherever the model itself does, or the scheme that follows"
        ),
        Finding("degraded", plain),
    ]
