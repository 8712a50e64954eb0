"""What a run will do, worked out from headers before a number is read: every stack's steps, every
stored byte's place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs
import torch

from bitpress import __version__, card, chain, manifest, stacks
from bitpress.checkpoint.header import Entry, index
from bitpress.checkpoint.reader import INDEX, Checkpoint
from bitpress.checkpoint.views import View
from bitpress.checkpoint.writer import json_text
from bitpress.errors import CheckpointError, RecipeError, SchemeError, ShapeError
from bitpress.hardware import Hardware, present
from bitpress.layer import Finding
from bitpress.quantization import KEY, quantised_already, quantization_config
from bitpress.recipe import Recipe
from bitpress.schemes import Step
from bitpress.shards import Shard, Stack, cut, nbytes
from bitpress.source import kept_fused, seen


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
        return stacks.container(next(iter(self.stacks[0].members)))

    @property
    def hidden(self) -> int:
        """The width of the hidden states: where the config does not say, the smallest input of a
        layer.
        """
        return stacks.hidden_size(self.source.config) or min(
            stack.shape[1] for stack in self.stacks
        )

    @property
    def dtype(self) -> torch.dtype:
        """What most weights are stored in."""
        return self.stacks[0].dtype

    @property
    def head(self) -> int | None:
        """Channels of an attention head, as far as the config says."""
        return stacks.head_size(self.source.config)

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
        return threads * (2 * largest + 10 * 4 * chain.TILE + 2 * turned)

    @cached_property
    def left_alone(self) -> list[tuple[Entry, str]]:
        """Every tensor that is copied, and why it is not compressed."""
        linear = stacks.linear_layers(self.source)
        copies = [entry for shard in self.shards for entry in shard.copies]
        modules = [entry.name.removesuffix(".weight") for entry in copies]
        return [
            (
                e,
                self.recipe.reason(m)
                if m in linear
                else stacks.why_plain(e, self.container, self.source.config),
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
            if name not in (manifest.NAME, card.NAME)
        }

    @property
    def files(self) -> list[str]:
        """Every file that the output will hold."""
        own = (
            [shard.name for shard in self.shards]
            + [manifest.NAME, card.NAME, "config.json"]
            + ([INDEX] if self.index else [])
        )
        return own + [name for name in self.copied if name not in own]

    @property
    def copied(self) -> dict[str, str]:
        """What the files are called in the source that the output has as they are; its card has
        another name there.
        """
        others = [name for name in self.source.others if name not in ("config.json", manifest.NAME)]
        return {card.kept(others) if name == card.NAME else name: name for name in others}


def make_plan(
    source: Checkpoint, recipe: Recipe, data: str = "", device: Hardware | None = None
) -> Plan:
    """The plan of a recipe on a checkpoint.

    Args:
        data: the digest of the calibration data, where the recipe needs some.
        device: on which it is to be served; None: the one present.

    Raises:
        CheckpointError: the source is quantised already or has no layers to compress.
        RecipeError: a pattern matches nothing, members of a fused stack get unlike steps, or a
            scheme needs what is not there.
        ShapeError: a scheme cannot take a layer; the message names the layer and how to leave it
            out.
    """
    source = seen(source)
    if method := quantised_already(source.config):
        raise CheckpointError(
            f"{source.folder} is already quantised ({method}): start from the original, or "
            "decompress it first"
        )
    linear = stacks.linear_layers(source)
    assigned = recipe.assign([*linear, *(fused.module for fused in source.left)])
    for fused in source.left:
        if assigned[fused.module]:
            raise CheckpointError(
                f"{source.folder}: the experts {fused.module} cannot be compressed: {fused.why}; "
                f"--ignore '*.{fused.module.rpartition('.')[2]}' copies them as they are (in a "
                "recipe: a rule with `steps = []`)"
            )
    # engines read the steps of all from those of the first
    for experts in stacks.experts(linear):
        _agreed(experts, assigned)
    # by the name of the first member
    built: dict[str, Stack] = {}
    for modules in stacks.stack(linear):
        steps = _agreed(modules, assigned)
        if steps:
            built[modules[0]] = _stack({m: linear[m] for m in modules}, steps)
    if not built:
        raise RecipeError("the recipe leaves every layer alone: there is nothing to do")
    compressed = {module for stack in built.values() for module in stack.members}
    digest = _digest(source, recipe, data)
    source, device = kept_fused(source, compressed), device or present()
    plain = tuple(stacks.left_alone(source, compressed))
    # or there is none
    quantization_config(
        {m: stack.stored(m)[1] for stack in built.values() for m in stack.members}, plain
    )
    return Plan(
        source,
        recipe,
        digest,
        tuple(cut(source, built, digest, recipe.calibrated)),
        plain,
        tuple(_warnings(source, recipe, list(linear))),
        device,
        tuple(dict.fromkeys(_findings(recipe, device))),
    )


def _agreed(modules: Sequence[str], assigned: Mapping[str, tuple[Step, ...]]) -> tuple[Step, ...]:
    """The one list of steps of a stack's members."""
    first = assigned[modules[0]]
    for module in modules:
        if [(s.scheme, s.options) for s in assigned[module]] != [
            (s.scheme, s.options) for s in first
        ]:
            raise RecipeError(
                f"layers {modules[0]} and {module} are one layer in serving engines and must get "
                "the same steps: "
                "let one pattern match all of them, or none"
            )
    return first


def _stack(members: Mapping[str, Entry], steps: tuple[Step, ...]) -> Stack:
    """A stack whose every member's shape the schemes take."""
    stack, block = Stack(members, steps), chain.row_block(steps)
    leaves = [m.rpartition(".")[2] for m in members]
    patterns = " ".join(f"--ignore '*.{leaf}'" for leaf in leaves)
    way_out = f"leave such layers out: {patterns} (in a recipe: a rule with `steps = []` before it)"
    for module, entry in members.items():
        if len(members) > 1 and entry.shape[0] % block:
            raise ShapeError(
                f"layer {module}: {entry.shape[0]} rows are not a multiple of {block}, and engines "
                "fuse "
                f"{', '.join(leaves)} into one layer, where a block of {block} rows would hold "
                f"rows of two; {way_out}"
            )
        try:
            stack.stored(module)
        except ShapeError as e:
            raise ShapeError(f"layer {module}: {e}; or {way_out}") from None
    return stack


def _digest(source: Checkpoint, recipe: Recipe, data: str) -> str:
    content = {
        "core": __version__,
        "schemes": sorted({str(step.scheme) for step in recipe.all_steps}),
        "recipe": recipe.as_json(),
        "data": data,
        "source": {
            name: hashlib.sha256(header.raw).hexdigest() for name, header in source.headers.items()
        },
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _warnings(source: Checkpoint, recipe: Recipe, modules: Sequence[str]) -> Iterable[str]:
    for pattern in recipe.idle(modules):
        yield (
            f"the rule for {pattern!r} comes too late: what is before it takes all layers that "
            "it matches"
        )
    experts = [
        e
        for e in source.entries.values()
        if len(e.shape) == 3 and ".experts." in e.name and e.dtype in stacks.FLOATS
    ]
    if experts:
        size = sum(e.nbytes for e in experts) / 1e9
        yield (
            f"{len(experts)} tensors hold fused experts ({size:.2f} GB, first: "
            f"{experts[0].name}); they are copied unchanged"
        )


def _findings(recipe: Recipe, device: Hardware) -> Iterable[tuple[str, Finding]]:
    for step in dict.fromkeys(recipe.all_steps):
        for finding in step.call("validate_hardware", hardware=device) or ():
            if not isinstance(finding, Finding):
                raise SchemeError(
                    f"{step.scheme}: validate_hardware returned {finding!r:.60}, not Findings"
                )
            yield step.scheme.name, finding
