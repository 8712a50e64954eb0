"""What a run will do, worked out from headers before a weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import attrs
import torch

from bitpress.checkpoint import filenames, layer_names, model_config
from bitpress.checkpoint.filenames import INDEX
from bitpress.checkpoint.model_config import KEY
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry, index
from bitpress.checkpoint.views import View
from bitpress.checkpoint.writer import json_text
from bitpress.planning import linear_layers
from bitpress.planning.layout import Shard, Stack, nbytes
from bitpress.planning.quantization_config import quantization_config
from bitpress.planning.recipe import Recipe
from bitpress.schemes import stored_layout
from bitpress.schemes.hardware import Hardware
from bitpress.schemes.values import Finding


@attrs.frozen(eq=False, slots=False)
class Plan:
    """A run, before it starts.

    Attributes:
        digest: of versions, recipe and the source's headers; the same digest means the same work.
        plain: modules left alone, as the config's `ignore` lists them.
        warnings: what the user should know before starting.
        device: on which it is to be served, the one present unless another was named.
        findings: per scheme, what it says of that device.
    """

    source: Checkpoint
    recipe: Recipe
    digest: str
    shards: tuple[Shard, ...]
    plain: tuple[str, ...]
    warnings: tuple[str, ...]
    device: Hardware
    findings: tuple[tuple[str, Finding], ...]

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """All stacks, in the order of their shards."""
        return tuple(stack for shard in self.shards for stack in shard.stacks)

    @cached_property
    def fragments(self) -> dict[str, Mapping[str, Any] | None]:
        """Every compressed module's config fragment."""
        return {
            module: stack.stored(module)[1] for stack in self.stacks for module in stack.members
        }

    @property
    def config(self) -> dict[str, Any]:
        """The output's `config.json`."""
        quantised = quantization_config(self.fragments, self.plain)
        return dict(self.source.config) | ({KEY: quantised} if quantised else {})

    @property
    def index(self) -> dict[str, Any] | None:
        """The output's index; None for a single file."""
        if len(self.shards) == 1:
            return None
        return index({shard.name: shard.header.entries for shard in self.shards})

    @property
    def bytes_before(self) -> int:
        """Size of the source's weight files."""
        return sum(header.nbytes for header in self.source.headers.values())

    @property
    def bytes_after(self) -> int:
        """Size of the output's weight files, exact."""
        return sum(shard.header.nbytes for shard in self.shards)

    @property
    def container(self) -> str:
        """The name of the list of decoder blocks."""
        return layer_names.container(next(iter(self.stacks[0].members)))

    @property
    def hidden(self) -> int:
        """The width of the hidden states: where the config does not say, the smallest input of a
        layer.
        """
        return model_config.hidden_size(self.source.config) or min(
            stack.shape[1] for stack in self.stacks
        )

    @property
    def dtype(self) -> torch.dtype:
        """What most weights are stored in."""
        return self.stacks[0].dtype

    @property
    def head(self) -> int | None:
        """Channels of an attention head, as far as the config says."""
        return model_config.head_size(self.source.config)

    def memory(self, threads: int) -> int:
        """Bytes held at most while running, beyond what the interpreter and torch take."""
        largest = max(
            (
                sum(nbytes(*t) for t in s.stored(m)[0].values())
                for s in self.stacks
                for m in s.members
            ),
            default=0,
        )
        turned = max(
            (
                e.stored.nbytes
                for e in self.source.entries.values()
                if isinstance(e, View) and e.transposed
            ),
            default=0,
        )
        return threads * (2 * largest + 10 * 4 * stored_layout.TILE + 2 * turned)

    @cached_property
    def left_alone(self) -> list[tuple[Entry, str]]:
        """Every tensor that is copied, and why it is not compressed."""
        linear = linear_layers.linear_layers(self.source)
        copies = [entry for shard in self.shards for entry in shard.copies]
        modules = [entry.name.removesuffix(".weight") for entry in copies]
        return [
            (
                e,
                self.recipe.reason(m)
                if m in linear
                else linear_layers.why_plain(e, self.container, self.source.config),
            )
            for e, m in zip(copies, modules, strict=True)
        ]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The bytes of every file of the output, exact, but for those that hold what is found on
        the way: manifest and card.
        """
        texts = {"config.json": self.config} | ({INDEX: self.index} if self.index else {})
        sizes = {shard.name: shard.header.nbytes for shard in self.shards}
        sizes |= {name: len(json_text(value).encode()) for name, value in texts.items()}
        return {
            name: sizes[name]
            if name in sizes
            else (self.source.folder / self.copied[name]).stat().st_size
            for name in self.files
            if name not in (filenames.MANIFEST, filenames.MODEL_CARD)
        }

    @property
    def files(self) -> list[str]:
        """Every file that the output will hold."""
        own = (
            [shard.name for shard in self.shards]
            + [filenames.MANIFEST, filenames.MODEL_CARD, "config.json"]
            + ([INDEX] if self.index else [])
        )
        return own + [name for name in self.copied if name not in own]

    @property
    def copied(self) -> dict[str, str]:
        """What the files are called in the source that the output has as they are; its card has
        another name there.
        """
        others = [
            name for name in self.source.others if name not in ("config.json", filenames.MANIFEST)
        ]
        return {
            filenames.kept(others) if name == filenames.MODEL_CARD else name: name
            for name in others
        }
