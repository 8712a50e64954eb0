"""The attentions of a checkpoint that keep keys and values, and what is stored of their caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.model_config import ModelConfig
from bitpress.checkpoint.reader import DTYPES, NAMES, Checkpoint
from bitpress.checkpoint.safetensors import Entry, TensorSpec
from bitpress.errors import CheckpointError, SchemeError
from bitpress.schemes import attention_cache
from bitpress.schemes.attention_cache import CacheShape, StateStatistics
from bitpress.schemes.registry import Step
from bitpress.schemes.values import StoredLayer

# The layers that make keys, by name; of fused ones, only some of the rows.
KEY_LAYERS, FUSED_KEY_LAYERS = ("k_proj",), ("qkv_proj", "query_key_value", "Wqkv")

# A layer of attentions that keep one compressed vector of each token, and neither keys nor values.
LATENT_LAYERS = ("kv_a_proj_with_mqa", "kv_a_proj")

# What a module's name says of an attention that keeps a state, and no token.
LINEAR_ATTENTION = "linear_attn"


@frozen
class AttentionCache:
    """The keys and values that an engine keeps of one attention.

    Attributes:
        module: the attention's name.
        shape: its heads.
        dtype: what the model stores its weights in.
        step: how they are kept.
    """

    module: str
    shape: CacheShape
    dtype: torch.dtype
    step: Step

    def describe_stored(self) -> StoredLayer:
        """What is stored beside the attention's weights: right dtypes and shapes, and meaningless
        numbers; and the `kv_cache_scheme`.
        """
        return attention_cache.describe(self.shape, self.dtype, self.step)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The dtype and shape of what is stored, by the tensor's name."""
        specs = tensor_specs(self.describe_stored())
        return {f"{self.module}.{suffix}": spec for suffix, spec in specs.items()}

    def store(self, stats: StateStatistics) -> dict[str, Tensor]:
        """What is stored, by the tensor's name.

        Raises:
            SchemeError: it has other names, dtypes or shapes than were planned.
        """
        stored = attention_cache.serialize(self.step, stats, self.dtype)
        planned, actual = (tensor_specs(x) for x in (self.describe_stored(), stored))
        if actual != planned:
            raise SchemeError(
                f"{self.step.scheme}: {self.module} got {describe_specs(actual)}, planned was "
                f"{describe_specs(planned)}"
            )
        return {f"{self.module}.{suffix}": tensor for suffix, tensor in stored.tensors.items()}

    @property
    def token_bytes(self) -> tuple[int, int]:
        """Bytes of a token's keys and values as the model computes them, and as they are kept."""
        numbers = 2 * self.shape.num_heads * self.shape.channels
        bits = int((self.describe_stored().config or {}).get("num_bits", 16))
        return numbers * self.dtype.itemsize, numbers * bits // 8


def tensor_specs(stored: StoredLayer) -> dict[str, TensorSpec]:
    """The dtype and shape of what is stored, by suffix."""
    return {
        suffix: TensorSpec(str(NAMES.get(tensor.dtype)), tuple(tensor.shape))
        for suffix, tensor in stored.tensors.items()
    }


def describe_specs(specs: Mapping[str, TensorSpec]) -> str:
    """Dtypes and shapes in one line: `weight BF16 [8, 8], ...`."""
    return ", ".join(f"{name} {spec}" for name, spec in specs.items())


def find_caches(
    source: Checkpoint, layers: Mapping[str, Entry], step: Step | None
) -> tuple[AttentionCache, ...]:
    """Every attention of the decoder blocks that keeps keys and values; none without a step.

    Args:
        layers: the linear layers of the decoder blocks.

    Raises:
        CheckpointError: there is none, its heads are not known, or the source has scales itself.
    """
    if step is None:
        return ()
    caches = [
        AttentionCache(module, shape, dtype, step)
        for module, shape, dtype in _find_attentions(source, layers, step.scheme.name)
    ]
    for cache in caches:
        if names := cache.specs.keys() & source.entries.keys():
            raise CheckpointError(
                f"{source.folder}: it holds a tensor {min(names)} already: remove it, or leave "
                f"{step.scheme.name} out"
            )
    return tuple(caches)


def count_token_bytes(source: Checkpoint, layers: Mapping[str, Entry], asked_by: str) -> int:
    """Bytes of a token's keys and values in all attentions, as the model computes them.

    Args:
        layers: the linear layers of the decoder blocks.
        asked_by: what to leave out where they are not known, for the message.

    Raises:
        CheckpointError: no attention is found, or its heads are not known.
    """
    return sum(
        2 * shape.num_heads * shape.channels * dtype.itemsize
        for _, shape, dtype in _find_attentions(source, layers, asked_by)
    )


def _find_attentions(
    source: Checkpoint, layers: Mapping[str, Entry], asked_by: str
) -> list[tuple[str, CacheShape, torch.dtype]]:
    """Names, heads and dtypes of the attentions that keep keys and values: one at least."""
    attentions = []
    for module, entry in layers.items():
        parent, _, leaf = module.rpartition(".")
        if leaf in (*KEY_LAYERS, *FUSED_KEY_LAYERS) and LINEAR_ATTENTION not in parent:
            shape = _shape_of(source, entry, is_fused=leaf in FUSED_KEY_LAYERS)
            attentions.append((parent, shape, DTYPES[entry.dtype]))
    if not attentions:
        has_latents = any(module.endswith(LATENT_LAYERS) for module in layers)
        what = "its attentions keep a compressed vector of each token (MLA), and no keys and values"
        raise CheckpointError(
            f"{source.folder}: {what if has_latents else 'no attention with k_proj was found'}: "
            f"leave {asked_by} out"
        )
    return attentions


def describe_others(caches: Sequence[AttentionCache], layers: Mapping[str, Entry]) -> str | None:
    """A line for the user about blocks that keep no keys and values; None where all do."""
    if not caches:
        return None
    container = layer_names.container(next(iter(layers)))
    blocks = dict.fromkeys(layer_names.block_index(module, container) for module in layers)
    own = {layer_names.block_index(cache.module, container) for cache in caches}
    others = [block for block in blocks if block not in own]
    if not others:
        return None
    return (
        f"{len(others)} of {len(blocks)} blocks (first: {container}.{others[0]}) keep "
        "no keys and values: nothing is stored for them"
    )


def describe_caches(caches: Sequence[AttentionCache]) -> str:
    """How caches are kept and what a token takes, in a few words."""
    before, after = (sum(sizes) for sizes in zip(*(c.token_bytes for c in caches), strict=True))
    return (
        f"{caches[0].step.scheme.name}: {len(caches)} attentions keep {after:,} bytes of each "
        f"token instead of {before:,}"
    )


def cache_config(caches: Sequence[AttentionCache]) -> Mapping[str, Any] | None:
    """The `kv_cache_scheme` of a config; None without caches."""
    return caches[0].describe_stored().config if caches else None


def _shape_of(source: Checkpoint, entry: Entry, *, is_fused: bool) -> CacheShape:
    config: ModelConfig = source.model_config
    num_heads, channels = config.num_heads, config.head_dim
    if num_heads is None or channels is None:
        raise CheckpointError(
            f"{source.folder}: its config.json has no num_attention_heads or head_dim, by which "
            "keys and values are told apart"
        )
    own = None if is_fused else entry.shape[0] // channels
    return CacheShape(num_heads, own or config.num_kv_heads or num_heads, channels)
