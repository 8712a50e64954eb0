"""FP8 (E4M3) keys and values in an engine's cache, with scales from data per tensor or head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

import bitpress
from bitpress import (
    Finding,
    Hardware,
    MeasuredLoss,
    Statistic,
    StoredLayer,
    hookimpl,
    numerics,
    option,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "MEASURED_LOSSES",
    "Options",
    "observe_cache",
    "quantize_cache",
    "serialize_cache",
    "validate_hardware",
]

# The names of the stored scales.
SCALES: Mapping[str, str] = {"query": "q_scale", "key": "k_scale", "value": "v_scale"}

# From which CUDA capability vLLM 0.32 has attention over a cache in FP8 (FlashInfer).
LEAST_CAPABILITY = (8, 0)

# The major ones for which it has attention with scales per head (FlashAttention 3 and 4).
HEADS_CAPABILITIES = (9, 10)

# AMD GPUs that compute with the FP8 numbers of OCP, and those whose numbers have half their range.
OCP_ARCHITECTURES, FNUZ_ARCHITECTURES = ("gfx950", "gfx1201"), ("gfx942",)


# On weights that stay as they are, 16,384 tokens of wikitext2.
MEASURED_LOSSES: Sequence[MeasuredLoss] = (
    MeasuredLoss("tiny-llama (11M)", 0.00054),
    MeasuredLoss("tiny-llama (11M)", 0.00052, {"strategy": "attn_head"}),
)


@frozen
class Options(bitpress.Options):
    """Options of `kv-fp8`."""

    strategy: Literal["tensor", "attn_head"] = option(
        "tensor", "a scale for all heads of an attention, or one for each"
    )


@hookimpl
def observe_cache(states: Tensor, options: Options) -> Mapping[str, Statistic]:
    """The largest magnitude and a histogram of all, of each head or of all heads together: (heads,)
    and (heads, bins).
    """
    import torch

    heads = states.unbind(1) if options.strategy == "attn_head" else [states]
    amax = torch.stack([numerics.absmax(head.float()) for head in heads])
    counts = torch.stack([numerics.magnitude_histogram(head) for head in heads])
    return {"amax": Statistic(amax, "max"), "counts": Statistic(counts, "sum")}


@hookimpl
def serialize_cache(
    stats: Mapping[str, Mapping[str, Statistic]], dtype: torch.dtype, options: Options
) -> StoredLayer:
    """`q_scale`, `k_scale` and `v_scale` in the model's dtype, [1] or [heads, 1, 1]: 1 / 448 of the
    clip with the least squared error.
    """
    import torch

    # In float16, smaller scales lose bits; 448 times a larger one may round to infinity.
    least, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).max / 512
    shape = (-1, 1, 1) if options.strategy == "attn_head" else (1,)
    tensors = {
        SCALES[name]: numerics.e4m3_scale(_clips(of_states))
        .clamp(least, largest)
        .to(dtype)
        .reshape(shape)
        for name, of_states in stats.items()
    }
    config = {
        "num_bits": 8,
        "type": "float",
        "strategy": options.strategy,
        "symmetric": True,
        "dynamic": False,
    }
    return StoredLayer(tensors, config)


def _clips(stats: Mapping[str, Statistic]) -> Tensor:
    """The largest magnitude that is kept, of each head or of all: (heads,)."""
    import torch

    pairs = zip(stats["counts"].value, stats["amax"].value, strict=True)
    clips = [numerics.clip_range(counts, amax, "mse", numerics.e4m3_step) for counts, amax in pairs]
    return torch.stack(clips)


@hookimpl
def quantize_cache(
    states: Tensor, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None
) -> Tensor:
    """The nearest E4M3 number, times the scale."""
    # (1, 1, 1) or (1, heads, 1)
    scale = tensors[SCALES[name]].float().reshape(1, -1, 1)
    return numerics.round_e4m3(states, scale)


@hookimpl
def validate_hardware(hardware: Hardware, options: Options) -> Sequence[Finding]:
    """Where vLLM has attention over a cache in FP8."""
    if options.strategy == "attn_head":
        if hardware.capability is not None and hardware.capability[0] in HEADS_CAPABILITIES:
            return [Finding("recommended", "FlashAttention computes with scales per head")]
        return [
            Finding(
                "unsupported",
                "vLLM has attention with scales per head on CUDA capability 9 and 10 alone; "
                "strategy=tensor runs elsewhere",
            )
        ]
    if hardware.vendor == "nvidia":
        if hardware.capability is not None and hardware.capability >= LEAST_CAPABILITY:
            return [Finding("recommended", "the cache holds twice as many tokens")]
        return [Finding("unsupported", "vLLM has no attention over FP8 below CUDA capability 8.0")]
    if hardware.architecture in FNUZ_ARCHITECTURES:
        return [
            Finding(
                "unsupported",
                "its FP8 numbers end at 240, and vLLM does not adapt the scales of this format: "
                "larger keys and values are cut off",
            )
        ]
    if hardware.architecture in OCP_ARCHITECTURES or hardware.vendor == "cpu":
        return [Finding("supported", "the cache holds twice as many tokens")]
    return [Finding("unsupported", "vLLM's attention for it is not known to read FP8")]
