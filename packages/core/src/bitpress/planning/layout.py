"""What a plan is made of: stacks of layers, and the files that they and everything else go into."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.reader import DTYPES, NAMES, Checkpoint
from bitpress.checkpoint.safetensors import BITS, Entry, Header, lay_out
from bitpress.errors import SchemeError
from bitpress.schemes import stored_layout
from bitpress.schemes.registry import Step
from bitpress.schemes.values import StoredLayer


@frozen(eq=False)
class Stack:
    """Linear layers that read the same input and get the same steps; alone, a stack of one."""

    members: Mapping[str, Entry]
    steps: tuple[Step, ...]

    @property
    def name(self) -> str:
        """The common parent and the members' own names: `model.layers.0.self_attn.[q_proj, k_proj,
        v_proj]`.
        """
        names = list(self.members)
        if len(names) == 1:
            return names[0]
        parent = names[0].rpartition(".")[0]
        return f"{parent}.[{', '.join(n.rpartition('.')[2] for n in names)}]"

    @property
    def reads(self) -> int:
        """Bytes of the source's weights."""
        return sum(entry.nbytes for entry in self.members.values())

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of all members together."""
        return sum(e.shape[0] for e in self.members.values()), next(
            iter(self.members.values())
        ).shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What the source stores the weights in."""
        return DTYPES[next(iter(self.members.values())).dtype]

    @property
    def calibrated(self) -> bool:
        """Whether a step must see the layers' inputs."""
        return any(step.calibrated for step in self.steps)

    def stored(
        self, module: str
    ) -> tuple[dict[str, tuple[str, tuple[int, ...]]], Mapping[str, Any] | None]:
        """Dtype and shape of what is stored of a member, by tensor name, and its config
        fragment.
        """
        entry = self.members[module]
        record = stored_layout.describe(*entry.shape, DTYPES[entry.dtype], self.steps)
        return {
            f"{module}.{suffix}": (NAMES[t.dtype], tuple(t.shape))
            for suffix, t in record.tensors.items()
        }, record.config

    def check(self, module: str, record: StoredLayer) -> None:
        """Raise SchemeError unless a member's tensors have the names, dtypes and shapes that were
        planned.
        """
        planned, _ = self.stored(module)
        found = {
            f"{module}.{suffix}": (NAMES.get(t.dtype), tuple(t.shape))
            for suffix, t in record.tensors.items()
        }
        if found != planned:
            raise SchemeError(
                f"{self.steps[-1].scheme}: layer {module} became {found}, planned was {planned}"
            )

    def bits(self, module: str) -> float:
        """Stored bits per weight of a member, scales included."""
        return (
            8
            * sum(nbytes(*t) for t in self.stored(module)[0].values())
            / self.members[module].numel
        )


@frozen(eq=False, slots=False)
class Shard:
    """One file of the output: the stacks and plain tensors whose numbers go into it, and its
    header.

    Attributes:
        block: in a calibrated run the decoder block that it holds; None for what lies outside the
            blocks.
    """

    name: str
    stacks: tuple[Stack, ...]
    copies: tuple[Entry, ...]
    header: Header
    block: int | None = None

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The source's tensors that go into it."""
        return (*(entry for stack in self.stacks for entry in stack.members.values()), *self.copies)

    @cached_property
    def reads(self) -> int:
        """Their bytes."""
        return sum(entry.nbytes for entry in self.entries)


def cut(
    source: Checkpoint, built: Mapping[str, Stack], digest: str, by_block: bool
) -> Iterable[Shard]:
    """Output files that mirror the input's, or one for every decoder block; a stack goes whole into
    that of its first member.
    """
    members = {
        entry.name: module for stack in built.values() for module, entry in stack.members.items()
    }
    container = layer_names.container(next(iter(built)))
    parts: dict[Any, list[Entry]] = {}
    for entry in source.entries.values():
        part = layer_names.block_index(entry.name, container) if by_block else entry.file.name
        parts.setdefault(part, []).append(entry)
    if by_block:
        parts = dict(sorted(parts.items(), key=lambda item: -1 if item[0] is None else item[0]))
    contents = []
    for part, entries in parts.items():
        own = [built[module] for e in entries if (module := members.get(e.name, "")) in built]
        copies = [e for e in entries if e.name not in members]
        if own or copies:
            contents.append((part if by_block else None, own, copies))
    for i, (block, own, copies) in enumerate(contents, 1):
        name = (
            "model.safetensors"
            if len(contents) == 1
            else f"model-{i:05d}-of-{len(contents):05d}.safetensors"
        )
        tensors = [(entry.name, entry.dtype, entry.shape) for entry in copies]
        for stack in own:
            tensors += [
                (n, *t) for module in stack.members for n, t in stack.stored(module)[0].items()
            ]
        header = lay_out(source.folder / name, tensors, {"format": "pt", "bitpress": digest})
        yield Shard(name, tuple(own), tuple(copies), header, block)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a stored tensor."""
    return math.prod(shape) * BITS[dtype] // 8
