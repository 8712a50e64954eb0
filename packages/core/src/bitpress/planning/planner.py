"""From a recipe and headers to a plan."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.engine_facts import (
    EngineFacts,
    architecture_of,
    engines_without,
    facts_of,
    is_embedding,
    is_head,
)
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.rotated_source import round_copies, unrotate
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.source import (
    Source,
    fuse_uncompressed_experts,
    require_readable,
    resolve_source,
)
from bitpress.checkpoint.source_formats import discover_formats
from bitpress.errors import CheckpointError, RecipeError, SchemeError, ShapeError
from bitpress.planning import linear_layers, outer_layers
from bitpress.planning.attention_caches import (
    AttentionCache,
    cache_config,
    describe_others,
    find_caches,
)
from bitpress.planning.engine_layers import explain_embedding_layout
from bitpress.planning.engine_names import require_names
from bitpress.planning.ignored_layers import ignored_layers
from bitpress.planning.kept_codes import keep_codes
from bitpress.planning.layout import Stack, cut_shards
from bitpress.planning.plan import Plan
from bitpress.planning.quantization_config import quantization_config
from bitpress.planning.recipe import Recipe
from bitpress.planning.rotation import rotate_source
from bitpress.planning.source_bits import describe_source, require_fewer_bits
from bitpress.runtime.version import __version__
from bitpress.schemes import stored_layout
from bitpress.schemes.hardware import Hardware, detect_device
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Finding


def make_plan(source: Checkpoint, recipe: Recipe, device: Hardware | None = None) -> Plan:
    """The plan of a recipe on a checkpoint; a calibrated run adds its data (`with_calibration`).

    Args:
        device: on which the result is to be served; None: that of this machine.

    Raises:
        CheckpointError: the source is quantized already or has no layers to compress.
        RecipeError: a pattern matches nothing, members of a fused stack get unlike steps, or a
            scheme needs what is not there.
        ShapeError: a scheme cannot take a layer; the message names the layer and how to leave it
            out.
    """
    source = resolve_source(source)
    require_readable(source)
    engines = facts_of(source.config)
    _require_head(source, engines)
    if recipe.rotates:
        source = rotate_source(source)
    layers = linear_layers.linear_layers(source)
    recipe = outer_layers.name_outer_layers(recipe, source, engines)
    outer = outer_layers.find_outer_layers(recipe, source, engines)
    steps_of = _assign_steps(source, recipe, layers, outer)
    caches = find_caches(source, layers, recipe.cache)

    stacks = _group_stacks(layers | outer, steps_of, engines)
    if not stacks and not caches:
        raise RecipeError("the recipe leaves every layer alone: there is nothing to do")
    _check_stacks(stacks.values(), source, recipe, engines)
    stacks = keep_codes(stacks)
    _check_shared_names(source, steps_of, engines)
    fragments = {
        module: stack.describe_stored(module)[1]
        for stack in stacks.values()
        for module in stack.members
    }

    _require_no_other_tensors(source, fragments)

    remarks = [describe_others(caches, layers), *describe_source(source, stacks.values())]
    # Experts of which none is compressed are copied as they lie in the files.
    source = round_copies(fuse_uncompressed_experts(source, fragments), fragments)
    ignored = tuple(ignored_layers(source, fragments))
    # Raises where one config cannot describe all of the layers.
    quantization_config(fragments, ignored, engines, cache_config(caches))

    digest = _digest(source, recipe, "")
    container = _block_container(source, layers, stacks.values(), caches)
    device = device or detect_device()
    return Plan(
        source=source,
        recipe=recipe,
        digest=digest,
        shards=tuple(cut_shards(source, stacks, digest, container, caches)),
        ignored=ignored,
        warnings=(
            *_warnings(source, recipe, [*layers, *outer], list(fragments)),
            *filter(None, remarks),
        ),
        device=device,
        findings=tuple(dict.fromkeys(_findings(recipe, device))),
    )


def with_calibration(plan: Plan, data: str) -> Plan:
    """The same plan for a run on calibration data: another digest, which every shard carries.

    Args:
        data: the digest of the calibration data.
    """
    digest = _digest(plan.source, plan.recipe, data)
    shards = tuple(shard.with_digest(digest) for shard in plan.shards)
    return attrs.evolve(plan, digest=digest, shards=shards)


def _require_no_other_tensors(source: Source, modules: Collection[str]) -> None:
    """Raise CheckpointError where a layer that is compressed has a tensor beside its weight and
    bias: loaders know none there but those of the format, and `verify` finds it out of place.
    """
    for name in source.entries:
        module, _, leaf = name.rpartition(".")
        if module in modules and leaf not in ("weight", "bias"):
            raise CheckpointError(
                f"{source.folder}: layer {module} has a tensor {leaf} beside its weight, which no "
                f"loader expects of a compressed layer: remove it, or --ignore {module}"
            )


def _require_head(source: Source, engines: Sequence[EngineFacts]) -> None:
    """Raise CheckpointError where a model has neither a head nor embeddings that it is tied to:
    transformers makes up a new one at every load.
    """
    if source.model_config.is_tied:
        return
    heads = sorted({head for facts in engines for head in facts.heads})
    if heads and not any(f"{head}.weight" in source.entries for head in heads):
        raise CheckpointError(
            f"{source.folder}: it has no {heads[0]}.weight, and its config says that the head is "
            "not tied to the embeddings: fetch the file that is missing, or set "
            "tie_word_embeddings in config.json"
        )


def _assign_steps(
    source: Source, recipe: Recipe, layers: Mapping[str, Entry], outer: Mapping[str, Entry]
) -> Mapping[str, tuple[Step, ...]]:
    """The steps of every layer; experts that stay in one tensor must get none."""
    # Recipes of other tools ignore what is left alone here in any case, tied or not.
    others = [*(name.rpartition(".")[0] for name in source.entries), "lm_head"]
    unsplit = [experts.module for experts in source.unsplit]
    steps_of = recipe.assign([*layers, *outer, *unsplit], others)
    for experts in source.unsplit:
        if steps_of[experts.module]:
            leaf = experts.module.rpartition(".")[2]
            copied = "stores them in 16 bits" if experts.is_quantized else "copies them as they are"
            raise CheckpointError(
                f"{source.folder}: the experts {experts.module} cannot be compressed: "
                f"{experts.reason}; --ignore '*.{leaf}' {copied} (in a recipe: a rule "
                "with `steps = []`)"
            )
    return steps_of


def _group_stacks(
    layers: Mapping[str, Entry],
    steps_of: Mapping[str, tuple[Step, ...]],
    engines: Sequence[EngineFacts],
) -> dict[str, Stack]:
    """The stacks that get steps, by the name of their first member."""
    # vLLM reads the config of all experts of a block from that of the first.
    for experts in layer_names.group_experts(layers):
        _common_steps(experts, steps_of)

    stacks = {}
    for modules in linear_layers.group_fused(layers, engines):
        steps = _common_steps(modules, steps_of)
        if steps:
            _require_one_dtype(modules, layers)
            members = {module: layers[module] for module in modules}
            stacks[modules[0]] = Stack(members, steps, is_head=is_head(modules[0], engines))
    return stacks


def _require_one_dtype(modules: Sequence[str], layers: Mapping[str, Entry]) -> None:
    """Raise CheckpointError where layers that engines fuse have unlike dtypes: the fused layer is
    stored with the scales of one dtype.
    """
    first = modules[0]
    for module in modules:
        if layers[module].dtype != layers[first].dtype:
            raise CheckpointError(
                f"layers {first} ({layers[first].dtype}) and {module} ({layers[module].dtype}) are "
                "one layer in serving engines: store both in one dtype, or leave them out with "
                "--ignore"
            )


def _check_shared_names(
    source: Checkpoint, steps_of: Mapping[str, tuple[Step, ...]], engines: Sequence[EngineFacts]
) -> None:
    """Raise RecipeError where layers of unlike steps have one name in an engine's config."""
    first_of: dict[tuple[str, str], str] = {}
    for facts, name in itertools.product(engines, source.entries):
        module = name.removesuffix(".weight")
        layer = facts.layer(module)
        if layer is None or not layer.is_quantizable:
            continue
        for asked_as in layer.asked_as:
            first = first_of.setdefault((facts.engine, asked_as), module)
            if _written_steps(steps_of.get(first, ())) != _written_steps(steps_of.get(module, ())):
                raise RecipeError(
                    f"layers {first} and {module} are one to {facts.engine} (it looks for both as "
                    f"{asked_as}) and must get the same steps: let one pattern match all of them, "
                    "or none"
                )


def _written_steps(steps: Sequence[Step]) -> list[tuple[Any, Any]]:
    """What two layers must have in common to be stored alike."""
    return [(step.scheme, step.options) for step in steps]


def _common_steps(
    modules: Sequence[str], steps_of: Mapping[str, tuple[Step, ...]]
) -> tuple[Step, ...]:
    """The steps that all modules get; raises RecipeError where they differ."""
    first = steps_of[modules[0]]
    for module in modules:
        if _written_steps(steps_of[module]) != _written_steps(first):
            raise RecipeError(
                f"layers {modules[0]} and {module} are one layer in serving engines and must get "
                "the same steps: let one pattern match all of them, or none"
            )
    return first


def _check_stacks(
    stacks: Collection[Stack], source: Source, recipe: Recipe, engines: Sequence[EngineFacts]
) -> None:
    """Raise where schemes or engines do not take a layer's shape, or a layer would grow."""
    for stack in stacks:
        _check_shapes(stack, engines)
    if not recipe.more_bits:
        require_fewer_bits(source, stacks)


def _check_shapes(stack: Stack, engines: Sequence[EngineFacts]) -> None:
    """Raise ShapeError unless the schemes take the shape of every member."""
    row_block = stored_layout.row_block(stack.steps)
    leaves = [module.rpartition(".")[2] for module in stack.members]
    patterns = " ".join(f"--ignore '*.{leaf}'" for leaf in leaves)
    fix = f"leave such layers out: {patterns} (in a recipe: a rule with `steps = []` before it)"
    for module, entry in stack.members.items():
        if len(stack.members) > 1 and entry.shape[0] % row_block:
            raise ShapeError(
                f"layer {module}: {entry.shape[0]} rows are not a multiple of {row_block}, and "
                f"engines fuse {', '.join(leaves)} into one layer, where a block of {row_block} "
                f"rows would hold rows of two; {fix}"
            )
        try:
            stored, fragment = stack.describe_stored(module)
        except ShapeError as e:
            raise ShapeError(f"layer {module}: {e}; or {fix}") from None
        if is_embedding(module, engines) and (reason := explain_embedding_layout(fragment)):
            raise RecipeError(f"{module} cannot be compressed: {reason}")
        for facts, (suffix, spec) in itertools.product(engines, stored.items()):
            if reason := facts.why_unreadable(module, suffix, spec, entry.shape[0]):
                raise ShapeError(
                    f"layer {module}: {reason}, and {suffix} would be {spec}; use another scheme, "
                    f"or {fix}"
                )


def _block_container(
    source: Checkpoint,
    layers: Mapping[str, Entry],
    stacks: Iterable[Stack],
    caches: Collection[AttentionCache],
) -> str | None:
    """The list of decoder blocks, each of which a calibrated run writes by itself; None where the
    run needs no data.

    Raises:
        CheckpointError: it needs data, and the blocks cannot be run.
    """
    needs_data = any(stack.calibrated for stack in stacks) or any(
        cache.step.calibrated for cache in caches
    )
    if not needs_data:
        return None
    require_names(source, layers)
    return layer_names.container(next(iter(layers)))


def _digest(source: Checkpoint, recipe: Recipe, data: str) -> str:
    """SHA-256 of all that the bytes of the shards follow from."""
    content = {
        "core": __version__,
        "schemes": sorted({str(step.scheme) for step in recipe.all_steps}),
        "recipe": recipe.as_json(),
        "data": data,
        "source": {
            name: hashlib.sha256(header.raw).hexdigest() for name, header in source.headers.items()
        },
    }
    if isinstance(source, Source) and source.method:
        content["source formats"] = discover_formats().packages
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _warnings(
    source: Checkpoint, recipe: Recipe, modules: Sequence[str], compressed: Sequence[str]
) -> Iterator[str]:
    for pattern in recipe.idle_patterns(modules):
        yield (
            f"the rule for {pattern!r} comes too late: what is before it takes all layers that it "
            "matches"
        )
    yield from _unchecked(source, compressed)
    stored = unrotate(source).entries
    if added := [entry for name, entry in source.entries.items() if name not in stored]:
        size = sum(entry.nbytes for entry in added) / 1e9
        yield (
            f"{added[0].name} is stored beside the embeddings, to which it was tied ({size:.2f} GB "
            "more): rotated, they differ"
        )
    experts = [
        entry
        for entry in source.entries.values()
        if len(entry.shape) == 3
        and ".experts." in entry.name
        and entry.dtype in linear_layers.FLOAT_DTYPES
    ]
    if experts:
        size = sum(entry.nbytes for entry in experts) / 1e9
        yield (
            f"{len(experts)} tensors hold fused experts ({size:.2f} GB, first: "
            f"{experts[0].name}); they are copied unchanged"
        )


def _unchecked(source: Checkpoint, compressed: Sequence[str]) -> Iterator[str]:
    """What no facts of an engine say of the layers that are to be compressed."""
    architecture = architecture_of(source.config)
    if engines := engines_without(source.config):
        yield (
            f"{architecture}: it is not known what {' and '.join(engines)} would quantize; names "
            "and shapes decide, and verify cannot check it"
        )
    for facts in facts_of(source.config):
        if others := [name for name in facts.unnamed if not layer_names.OUTSIDE.search(name)]:
            yield (
                f"{architecture}: {facts.engine} makes {others[0]} of other tensors while it loads "
                "them; it is not known whether it can where these are compressed"
            )
        unknown = [module for module in compressed if facts.layer(module) is None]
        if unknown:
            yield (
                f"{architecture}: it is not known whether {facts.engine} would quantize "
                f"{len(unknown)} of the layers (first: {unknown[0]}); names and shapes decide"
            )


def _findings(recipe: Recipe, device: Hardware) -> Iterator[tuple[str, Finding]]:
    """What every scheme says of the device."""
    for step in dict.fromkeys(recipe.all_steps):
        for finding in step.call("validate_hardware", hardware=device) or ():
            if not isinstance(finding, Finding):
                raise SchemeError(
                    f"{step.scheme}: validate_hardware returned {finding!r:.60}, not Findings"
                )
            yield step.scheme.name, finding
