"""The source with its cache rounded, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from bitpress.checkpoint.layer_names import block_index
from bitpress.compression.calibration.activation_streams import ActivationStreams
from bitpress.compression.calibration.cache_statistics import CacheObserver
from bitpress.compression.calibration.layer_groups import BlockPlan
from bitpress.modeling.attention import watch
from bitpress.modeling.block_runner import BlockRunner
from bitpress.modeling.capture import BlockCall
from bitpress.planning.attention_caches import AttentionCache
from bitpress.planning.plan import Plan
from bitpress.schemes.attention_cache import CacheQuantizer, cache_quantizer


class CacheTrial:
    """Judged batches on their way through the source's blocks, whose keys and values are rounded.

    Args:
        caches: of all blocks.
        plan: of the source.

    Attributes:
        states: numbers of the batches' hidden states; none before the first block with a cache,
            which are the source's.
    """

    def __init__(self, caches: Sequence[AttentionCache], plan: Plan) -> None:
        self._caches, self._plan = caches, plan
        self.states: Sequence[int] = ()

    def of_block(self, index: int) -> list[AttentionCache]:
        """The caches of a block."""
        container = self._plan.container
        return [cache for cache in self._caches if block_index(cache.module, container) == index]

    def fit(self, index: int, streams: ActivationStreams) -> Mapping[str, CacheQuantizer]:
        """How a block's caches are rounded: by attention, fitted to what these keep of batches that
        stand before the block, and stand after it then.
        """
        prefix, source = f"{self._plan.container}.{index}.", self._plan.source
        caches = self.of_block(index)
        block_plan = BlockPlan(prefix, (), self._plan.head_dim, source.entries, caches=caches)
        stored = CacheObserver(block_plan, streams).finish()
        quantizers = {}
        for cache in caches:
            planned = cache.describe_stored()
            tensors = {suffix: stored[f"{cache.module}.{suffix}"] for suffix in planned.tensors}
            quantizer = cache_quantizer(cache.step, tensors, planned.config)
            quantizers[cache.module.removeprefix(prefix)] = quantizer
        return quantizers

    def run_block(
        self,
        block: nn.Module,
        quantizers: Mapping[str, CacheQuantizer],
        runner: BlockRunner,
        calls: Sequence[BlockCall],
        source_states: Sequence[int],
    ) -> None:
        """Run the batches through a block, its keys and values rounded.

        Args:
            calls: of the batches.
            source_states: numbers of the hidden states that the source has of them.
        """
        for module, quantizer in quantizers.items():
            watch(block.get_submodule(module), quantizer)
        if self.states:
            runner.run(block, calls, self.states)
        elif quantizers:
            self.states = runner.fork(block, calls, source_states)
        for module in quantizers:
            watch(block.get_submodule(module), None)
