"""The grid of a source that holds integers in the same groups, on which its codes stay as they are:
AWQ, GPTQ, and packed integers of compressed-tensors.
"""

from __future__ import annotations

from bitpress import Layer, numerics


def source_grid(
    layer: Layer, bits: int, group_size: int, *, symmetric: bool
) -> numerics.IntegerGrid | None:
    """The grid of the source's very numbers; None where it is not known, or where such bits, groups
    and dtype of scales do not hold them.
    """
    import torch

    source = layer.quantized
    if source is None or source.group_index is not None or source.codes.is_floating_point():
        return None
    num_rows, width = layer.weight.shape
    half, scale = 1 << bits - 1, source.scale
    is_stored = torch.equal(scale.to(layer.dtype).float(), scale) and bool((scale > 0).all())
    if scale.shape != (num_rows, width // group_size) or not is_stored:
        return None
    # unsigned codes and zero points are those of signed ones, half their range higher
    shift = half if source.codes.dtype == torch.uint8 else 0
    codes = source.codes.short() - shift
    zero_point = torch.zeros_like(scale) if source.zero_point is None else source.zero_point.float()
    zero_point = zero_point - shift
    if symmetric and zero_point.any():
        return None
    if min(codes.min(), zero_point.min()) < -half or max(codes.max(), zero_point.max()) >= half:
        return None
    return numerics.IntegerGrid(scale, None if symmetric else zero_point, bits, group_size)
