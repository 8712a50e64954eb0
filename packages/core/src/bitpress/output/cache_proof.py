"""Proof of what is stored of attentions' caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from bitpress.checkpoint.reader import Reader
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import BitpressError, Fault
from bitpress.planning.attention_caches import AttentionCache
from bitpress.schemes.attention_cache import cache_quantizer

# Keys and values that are tried: (tokens,).
PROBE = 2.0 ** torch.arange(-20, 21)


def find_cache_faults(
    caches: Sequence[AttentionCache], entries: Mapping[str, Entry], reader: Reader
) -> Iterator[Fault]:
    """Faults of numbers that engines round keys and values with: those that are not finite, and
    those that leave nothing of keys and values of any size.

    Args:
        entries: the tensors of the output, as they were planned.
    """
    for cache in caches:
        stored = cache.describe_stored()
        tensors = {
            suffix: reader.whole(entries[f"{cache.module}.{suffix}"]) for suffix in stored.tensors
        }
        for suffix, tensor in tensors.items():
            if not tensor.float().isfinite().all():
                yield Fault(cache.module, f"{suffix} is NaN or infinity")
        # (1, heads, tokens, channels)
        probe = PROBE.view(1, 1, -1, 1).expand(1, cache.shape.num_heads, -1, cache.shape.channels)
        try:
            quantize = cache_quantizer(cache.step, tensors, stored.config)
            rounded = quantize(probe, probe, probe)
        except BitpressError as e:
            yield Fault(cache.module, str(e))
            continue
        for name, states in zip(("keys", "values"), rounded, strict=True):
            if not states.isfinite().all():
                yield Fault(cache.module, f"{name} become NaN or infinity")
            # by head: the largest of all
            elif not states.abs().amax((0, 2, 3)).all():
                yield Fault(cache.module, f"all {name} of a head become 0")
