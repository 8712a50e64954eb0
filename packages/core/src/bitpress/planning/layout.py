"""What a plan is made of: stacks of layers, and the files that they and everything else go into."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.filenames import WEIGHTS
from bitpress.checkpoint.reader import DTYPES, Checkpoint
from bitpress.checkpoint.safetensors import Entry, Header, TensorSpec, lay_out
from bitpress.errors import CheckpointError, SchemeError
from bitpress.planning.attention_caches import (
    AttentionCache,
    describe_specs,
    tensor_specs,
)
from bitpress.runtime.progress import copy_work
from bitpress.schemes import stored_layout
from bitpress.schemes.registry import Step
from bitpress.schemes.values import StoredLayer

# Where tensors outside the blocks go in a calibrated run, beside the blocks' numbers.
_BEFORE, _AFTER = "before", "after"


@frozen(eq=False)
class Stack:
    """Linear layers that read the same input and get the same steps; alone, a stack of one.

    Engines stack their rows into one matrix (vLLM: `stacked_params_mapping`), so that numbers for a
    whole matrix must be the same for all of them.

    Attributes:
        members: the source's weights (out, in), by module name.
        steps: in order.
        is_head: whether its outputs are logits.
        keeps_codes: whether the codes that the source holds are stored as they are; then its step
            has the options for that, whatever the recipe says.
    """

    members: Mapping[str, Entry]
    steps: tuple[Step, ...]
    keeps_codes: bool = False
    is_head: bool = False

    @property
    def name(self) -> str:
        """The common parent and the members' own names: `model.layers.0.self_attn.[q_proj, k_proj,
        v_proj]`.
        """
        names = list(self.members)
        if len(names) == 1:
            return names[0]
        parent = names[0].rpartition(".")[0]
        return f"{parent}.[{', '.join(name.rpartition('.')[2] for name in names)}]"

    @property
    def short_name(self) -> str:
        """The first member's name, and how many others there are: `q_proj +2`."""
        first, *others = self.members
        return f"{first} +{len(others)}" if others else first

    @property
    def source_bytes(self) -> int:
        """Bytes of the source's weights."""
        return sum(entry.nbytes for entry in self.members.values())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of all members together."""
        entries = list(self.members.values())
        return sum(entry.shape[0] for entry in entries), entries[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What the source stores the weights in."""
        return DTYPES[next(iter(self.members.values())).dtype]

    @property
    def is_of_expert(self) -> bool:
        """Whether its layers are one expert's."""
        return layer_names.OF_EXPERT.fullmatch(next(iter(self.members))) is not None

    @property
    def calibrated(self) -> bool:
        """Whether a step must see the layers' inputs."""
        return any(step.calibrated for step in self.steps)

    def describe_stored(
        self, module: str
    ) -> tuple[dict[str, TensorSpec], Mapping[str, Any] | None]:
        """What is stored of a member: the dtype and shape of its tensors, by suffix, and its config
        fragment.
        """
        entry = self.members[module]
        stored = stored_layout.describe(*entry.shape, DTYPES[entry.dtype], self.steps)
        return tensor_specs(stored), stored.config

    def check_stored(self, module: str, stored: StoredLayer) -> None:
        """Raise SchemeError unless a member's tensors have the names, dtypes and shapes that were
        planned.
        """
        (planned, _), actual = self.describe_stored(module), tensor_specs(stored)
        if actual != planned:
            raise SchemeError(
                f"{self.steps[-1].scheme}: layer {module} became {describe_specs(actual)}, planned "
                f"was {describe_specs(planned)}"
            )

    def stored_bytes(self, module: str) -> int:
        """Bytes of what is stored of a member."""
        specs, _ = self.describe_stored(module)
        return sum(spec.nbytes for spec in specs.values())

    def bits(self, module: str) -> float:
        """Stored bits per weight of a member, scales included."""
        return 8 * self.stored_bytes(module) / self.members[module].numel


@frozen(eq=False, slots=False)
class Shard:
    """One file of the output: the stacks and plain tensors whose numbers go into it, and its
    header.

    Attributes:
        name: of the file.
        stacks: what is compressed into it.
        copies: the source's tensors that it holds as they are.
        block: in a calibrated run the decoder block that it holds; None for what lies outside the
            blocks.
        caches: of the block, for which something is stored.
    """

    name: str
    stacks: tuple[Stack, ...]
    copies: tuple[Entry, ...]
    header: Header
    block: int | None = None
    caches: tuple[AttentionCache, ...] = ()

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The source's tensors that go into it."""
        return (*(entry for stack in self.stacks for entry in stack.members.values()), *self.copies)

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of the source's tensors."""
        return sum(entry.nbytes for entry in self.entries)

    @cached_property
    def has_fitted_head(self) -> bool:
        """Whether it holds the head, fitted to data: alone, since it comes after the blocks."""
        return any(stack.is_head and stack.calibrated for stack in self.stacks)

    @cached_property
    def work_bytes(self) -> int:
        """What writing it reports as progress."""
        return sum(stack.source_bytes for stack in self.stacks) + sum(
            copy_work(entry.nbytes) for entry in self.copies
        )

    def with_digest(self, digest: str) -> Shard:
        """The same file, of a plan with this digest."""
        file = self.header.entries[0].file
        specs = {entry.name: entry.spec for entry in self.header.entries}
        return evolve(self, header=_lay_out(file, specs, digest))


def cut_shards(
    source: Checkpoint,
    stacks: Mapping[str, Stack],
    digest: str,
    block_container: str | None,
    caches: Sequence[AttentionCache] = (),
) -> list[Shard]:
    """The output's weight files: they mirror the source's, or are one for every decoder block.

    Args:
        source: whose tensors go into them, all of them.
        stacks: by the name of the first member; a stack goes whole into the file of that one.
        digest: of the plan, for the headers.
        block_container: the name of the list of decoder blocks, each of which gets a file of its
            own, which is then written when the block is done, and is what a calibrated run resumes
            from, and so does a head that is fitted to data; None mirrors the source's files.
        caches: of decoder blocks.
    """
    first_members = {f"{module}.weight": module for module in stacks}
    compressed = {entry.name for stack in stacks.values() for entry in stack.members.values()}
    heads = {f"{n}.weight" for n, stack in stacks.items() if stack.is_head and stack.calibrated}
    contents = []
    for part, entries in _partition(source, block_container, heads).items():
        file_stacks = [stacks[first_members[e.name]] for e in entries if e.name in first_members]
        copies = [entry for entry in entries if entry.name not in compressed]
        if file_stacks or copies:
            block = part if isinstance(part, int) else None
            contents.append((block, file_stacks, copies))

    shards = []
    for number, (block, file_stacks, copies) in enumerate(contents, 1):
        name = WEIGHTS
        if len(contents) > 1:
            name = f"model-{number:05d}-of-{len(contents):05d}.safetensors"
        specs = {entry.name: entry.spec for entry in copies}
        for stack in file_stacks:
            for module in stack.members:
                planned, _ = stack.describe_stored(module)
                stored = {f"{module}.{suffix}": spec for suffix, spec in planned.items()}
                if duplicates := sorted((stored.keys() & source.entries.keys()) - compressed):
                    raise CheckpointError(
                        f"{source.folder}: it holds a tensor {duplicates[0]}, and layer {module} "
                        "would store another of that name; remove it from the source"
                    )
                specs |= stored
        file_caches = tuple(
            cache
            for cache in caches
            if block_container and layer_names.block_index(cache.module, block_container) == block
        )
        specs |= {name: spec for cache in file_caches for name, spec in cache.specs.items()}
        header = _lay_out(source.folder / name, specs, digest)
        shards.append(Shard(name, tuple(file_stacks), tuple(copies), header, block, file_caches))
    return shards


def _partition(
    source: Checkpoint, container: str | None, heads: Collection[str]
) -> dict[int | str, list[Entry]]:
    """The source's tensors by decoder block, with what lies outside before them, or by file.

    Args:
        heads: tensors that come after the blocks.
    """
    parts: dict[int | str, list[Entry]] = {}
    for entry in source.entries.values():
        block = layer_names.block_index(entry.name, container) if container else None
        place = entry.file.name if not container else _AFTER if entry.name in heads else _BEFORE
        parts.setdefault(place if block is None else block, []).append(entry)
    if not container:
        return parts
    blocks = sorted(part for part in parts if isinstance(part, int))
    return {part: parts[part] for part in (_BEFORE, *blocks, _AFTER) if part in parts}


def _lay_out(file: Path, specs: Mapping[str, TensorSpec], digest: str) -> Header:
    return lay_out(file, specs, {"format": "pt", "bitpress": digest})
