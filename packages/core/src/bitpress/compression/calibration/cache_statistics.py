"""What the attentions of a block give to their caches, over all batches and all ranks."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from bitpress.compression.calibration.activation_streams import ActivationStreams
from bitpress.compression.calibration.layer_groups import BlockPlan
from bitpress.compression.calibration.resumable_forward import current_batch
from bitpress.compression.calibration.statistics import StepStatistics, reduce_statistics
from bitpress.errors import CheckpointError
from bitpress.modeling import attention
from bitpress.planning.attention_caches import AttentionCache
from bitpress.schemes import attention_cache, pipeline
from bitpress.schemes.attention_cache import STATES
from bitpress.schemes.values import Statistic

# Of each of STATES, what a step has observed of one batch.
_BatchStatistics = tuple[Mapping[str, Statistic], ...]


class CacheObserver:
    """Observes what the caches of a block are given, from now until `finish`.

    A forward pass may come to an attention several times: it starts anew for layers that are
    compressed later. The last time counts, when all layers before the attention have been
    compressed.
    """

    def __init__(self, block_plan: BlockPlan, streams: ActivationStreams) -> None:
        self._streams, self._caches = streams, block_plan.caches
        self._by_batch: dict[tuple[str, int], _BatchStatistics] = {}
        self._attentions = {
            cache.module: streams.block.get_submodule(cache.module.removeprefix(block_plan.prefix))
            for cache in block_plan.caches
        }
        for cache in block_plan.caches:
            observe = functools.partial(self._observe, cache)
            attention.watch(self._attentions[cache.module], observe)

    def _observe(
        self, cache: AttentionCache, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch = current_batch()
        if batch is not None:
            self._by_batch[cache.module, batch] = tuple(
                attention_cache.observe(cache.step, states) for states in (query, key, value)
            )
        return key, value

    def finish(self) -> dict[str, Tensor]:
        """Run all batches to the end of the block; returns what is to be stored, by name of the
        tensor: empty on all ranks but the first.

        Raises:
            CheckpointError: an attention does not call transformers' interface, or is given NaN.
        """
        stored: dict[str, Tensor] = {}
        if self._caches:
            self._streams.finish_block()
        for cache in self._caches:
            attention.watch(self._attentions[cache.module], None)
            stored |= self._store(cache)
        return stored

    def _store(self, cache: AttentionCache) -> dict[str, Tensor]:
        merged: list[StepStatistics] = [{} for _ in STATES]
        for batch in range(len(self._streams.states)):
            of_batch = self._by_batch.get((cache.module, batch), ())
            for statistics, observed in zip(merged, of_batch, strict=False):
                pipeline.merge(statistics, observed)

        process_group = self._streams.process_group
        reduced = reduce_statistics(process_group, merged, 0, self._streams.device)
        if not process_group.is_rank_zero:
            return {}
        if not any(reduced):
            raise CheckpointError(
                f"{cache.module}: its class in transformers does not compute attention through "
                f"transformers' interface, so that its cache cannot be observed: leave "
                f"{cache.step.scheme.name} out"
            )
        if not all(s.value.isfinite().all() for statistics in reduced for s in statistics.values()):
            raise CheckpointError(
                f"{cache.module}: its queries, keys or values are NaN or infinity on the "
                "calibration data: check that the model runs in this precision"
            )
        return cache.store(dict(zip(STATES, reduced, strict=True)))
