"""What a run will do, worked out from headers before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs
import torch

from bitpress.checkpoint import filenames, layer_names
from bitpress.checkpoint.engine_facts import facts_of
from bitpress.checkpoint.filenames import INDEX
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import DTYPES, Checkpoint
from bitpress.checkpoint.safetensors import Entry, make_index
from bitpress.checkpoint.writer import format_json
from bitpress.numerics.rows import ROWS_PER_BATCH
from bitpress.planning import linear_layers
from bitpress.planning.attention_caches import AttentionCache, cache_config
from bitpress.planning.layout import Shard, Stack
from bitpress.planning.quantization_config import quantization_config
from bitpress.planning.recipe import Recipe
from bitpress.planning.routing import token_shares
from bitpress.schemes import pipeline
from bitpress.schemes.hardware import DEVICES, Hardware
from bitpress.schemes.registry import Step
from bitpress.schemes.values import USABLE, Finding


@attrs.frozen(eq=False, slots=False)
class Plan:
    """A run, before it starts.

    Attributes:
        source: the checkpoint, experts that are not compressed fused again.
        recipe: of every layer's steps.
        digest: of versions, recipe, calibration data and the source's headers; the same digest
            means the same bytes.
        shards: the weight files to write, in order.
        ignored: modules left alone, as the config's `ignore` lists them.
        warnings: what the user should know before starting.
        device: on which it is to be served, the one present unless another was named.
        findings: per scheme, what it says of that device.
    """

    source: Checkpoint
    recipe: Recipe
    digest: str
    shards: tuple[Shard, ...]
    ignored: tuple[str, ...]
    warnings: tuple[str, ...]
    device: Hardware
    findings: tuple[tuple[str, Finding], ...]

    @property
    def device_remarks(self) -> tuple[str, ...]:
        """What the device makes of the schemes, where it is not good news."""
        device = self.device.name if self.device in DEVICES else "this machine's device"
        return tuple(
            f"{name} is {finding.level} on {device}: {finding.text}"
            for name, finding in self.findings
            if finding.level not in USABLE
        )

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """All stacks, in the order of their shards."""
        return tuple(stack for shard in self.shards for stack in shard.stacks)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Every step that is taken: of layers, and that of the cache."""
        of_layers = [step for stack in self.stacks for step in stack.steps]
        return tuple(dict.fromkeys([*of_layers, *(cache.step for cache in self.caches)]))

    @cached_property
    def calibrated(self) -> bool:
        """Whether any step must see the model run on data."""
        return any(step.calibrated for step in self.steps)

    @cached_property
    def full_reference(self) -> bool:
        """Whether any step asks for all texts to be run through the source too."""
        return any(step.options.full_reference for step in self.steps)

    @cached_property
    def needs_reference(self) -> bool:
        """Whether any step must see a layer's inputs in the source model too, or its gradients."""
        return self.needs_gradients or any(map(pipeline.takes_reference, self.steps))

    @cached_property
    def needs_gradients(self) -> bool:
        """Whether any step takes statistics of the gradients of a block's layers' outputs."""
        return any(pipeline.takes_gradient(s) for stack in self.block_stacks for s in stack.steps)

    @cached_property
    def kept_codes(self) -> frozenset[str]:
        """The modules whose codes in the source are stored as they are."""
        kept = [stack for stack in self.stacks if stack.keeps_codes]
        return frozenset(module for stack in kept for module in stack.members)

    @property
    def block_stacks(self) -> list[Stack]:
        """Those of decoder blocks that are compressed one after the other, in a calibrated run."""
        blocks = [shard for shard in self.shards if shard.block is not None]
        return [stack for shard in blocks for stack in shard.stacks]

    @cached_property
    def caches(self) -> tuple[AttentionCache, ...]:
        """All caches for which something is stored."""
        return tuple(cache for shard in self.shards for cache in shard.caches)

    @cached_property
    def tokens_per_channel(self) -> float:
        """The part of a token that each input channel of a layer gets, in the layer that gets the
        fewest: the widest one, or an expert; 1 where none is compressed.
        """
        experts_per_token = self.source.model_config.experts_per_token
        parts = []
        for shard in self.shards:
            share_of = token_shares(shard.entries, experts_per_token)
            for stack in shard.stacks:
                entry = next(iter(stack.members.values()))
                parts.append(share_of(entry) / stack.shape[1])
        return min(parts, default=1.0)

    @property
    def expert_stacks(self) -> list[Stack]:
        """Those of experts."""
        return [stack for stack in self.stacks if stack.is_of_expert]

    @cached_property
    def max_experts_together(self) -> int:
        """How many experts are sent each token once, all together, on average: what so many of them
        make of a batch is no more than an MLP makes; 1 where none is compressed.
        """
        experts_per_token = self.source.model_config.experts_per_token
        shares = [1.0]
        for shard in self.shards:
            share_of = token_shares(shard.entries, experts_per_token)
            for stack in shard.stacks:
                if stack.is_of_expert:
                    shares += map(share_of, stack.members.values())
        # 3 of 1 / (1 / 3)
        return int(1 / min(shares) + 1e-6)

    @cached_property
    def experts_per_batch(self) -> int:
        """How many experts a thread of a CPU solves with a batch axis."""
        num_rows = max((stack.shape[0] for stack in self.expert_stacks), default=ROWS_PER_BATCH)
        return min(max(ROWS_PER_BATCH // num_rows, 1), self.max_experts_together)

    @cached_property
    def fragments(self) -> dict[str, Mapping[str, Any] | None]:
        """Every compressed module's config fragment."""
        return {
            module: stack.describe_stored(module)[1]
            for stack in self.stacks
            for module in stack.members
        }

    @cached_property
    def config(self) -> dict[str, Any]:
        """The output's `config.json`."""
        engines = facts_of(self.source.config)
        table = quantization_config(
            self.fragments, self.ignored, engines, cache_config(self.caches)
        )
        return dict(self.source.config) | ({KEY: table} if table else {})

    @property
    def index(self) -> dict[str, Any] | None:
        """The output's index; None for a single file."""
        if len(self.shards) == 1:
            return None
        return make_index({shard.name: shard.header.entries for shard in self.shards})

    @property
    def source_bytes(self) -> int:
        """Size of the source's weight files."""
        return sum(header.nbytes for header in self.source.headers.values())

    @property
    def output_bytes(self) -> int:
        """Size of the output's weight files, exact."""
        return sum(shard.header.nbytes for shard in self.shards)

    @property
    def container(self) -> str:
        """The name of the list of decoder blocks."""
        return layer_names.container(next(iter(self.layers)))

    @property
    def hidden_size(self) -> int:
        """The width of the hidden states: where the config does not say, the smallest input of a
        layer.
        """
        return self.source.model_config.hidden_size or min(
            entry.shape[1] for entry in self.layers.values()
        )

    @property
    def width(self) -> int:
        """The widest input of a layer that is compressed, or of any where none is."""
        if not self.stacks:
            return max(entry.shape[1] for entry in self.layers.values())
        return max(stack.shape[1] for stack in self.stacks)

    @property
    def head_dim(self) -> int | None:
        """Channels of an attention head, as far as the config says."""
        return self.source.model_config.head_dim

    @property
    def dtype(self) -> torch.dtype:
        """What most weights are stored in."""
        return DTYPES[next(iter(self.layers.values())).dtype]

    @cached_property
    def layers(self) -> dict[str, Entry]:
        """The linear layers of the decoder blocks, compressed or not, those first that are."""
        layers = linear_layers.linear_layers(self.source)
        members = {module for stack in self.stacks for module in stack.members}
        return dict(sorted(layers.items(), key=lambda item: item[0] not in members))

    @cached_property
    def uncompressed(self) -> list[tuple[Entry, str]]:
        """Every tensor that is copied, and why it is not compressed."""
        layers = self.layers
        reasons = []
        for entry in (entry for shard in self.shards for entry in shard.copies):
            module = entry.name.removesuffix(".weight")
            if module in layers:
                reason = self.recipe.reason(module)
            else:
                reason = linear_layers.explain_plain(entry, self.container, self.source)
            reasons.append((entry, reason))
        return reasons

    @property
    def files(self) -> list[str]:
        """Every file that the output will hold."""
        written = [shard.name for shard in self.shards]
        written += [filenames.MANIFEST, filenames.MODEL_CARD, filenames.CONFIG]
        written += [INDEX] if self.index else []
        return written + [name for name in self.side_files if name not in written]

    @property
    def side_files(self) -> dict[str, str]:
        """Files that are copied as they are: the name in the output, and that in the source, which
        differ for the source's model card.
        """
        others = [
            name
            for name in self.source.side_files
            if name not in (filenames.CONFIG, filenames.MANIFEST)
        ]
        return {filenames.copied_name(name, others): name for name in others}

    @cached_property
    def file_sizes(self) -> dict[str, int]:
        """The bytes of every file of the output, exact, but for manifest and model card: these hold
        what the run measures.
        """
        sizes = {shard.name: shard.header.nbytes for shard in self.shards}
        texts = {filenames.CONFIG: self.config} | ({INDEX: self.index} if self.index else {})
        sizes |= {name: len(format_json(value).encode()) for name, value in texts.items()}
        for name, source_name in self.side_files.items():
            if name not in sizes:
                sizes[name] = (self.source.folder / source_name).stat().st_size
        return {
            name: sizes[name]
            for name in self.files
            if name not in (filenames.MANIFEST, filenames.MODEL_CARD)
        }
