"""From a recipe and headers to a plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.model_config import quantised_already
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.source import kept_fused, seen
from bitpress.errors import CheckpointError, RecipeError, SchemeError, ShapeError
from bitpress.planning import linear_layers
from bitpress.planning.layout import Stack, cut
from bitpress.planning.plan import Plan
from bitpress.planning.quantization_config import quantization_config
from bitpress.planning.recipe import Recipe
from bitpress.runtime.version import __version__
from bitpress.schemes import stored_layout
from bitpress.schemes.hardware import Hardware, present
from bitpress.schemes.registry import Step
from bitpress.schemes.values import Finding


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
    linear = linear_layers.linear_layers(source)
    assigned = recipe.assign([*linear, *(fused.module for fused in source.left)])
    for fused in source.left:
        if assigned[fused.module]:
            raise CheckpointError(
                f"{source.folder}: the experts {fused.module} cannot be compressed: {fused.why}; "
                f"--ignore '*.{fused.module.rpartition('.')[2]}' copies them as they are (in a "
                "recipe: a rule with `steps = []`)"
            )
    # engines read the steps of all from those of the first
    for experts in layer_names.experts(linear):
        _agreed(experts, assigned)
    # by the name of the first member
    built: dict[str, Stack] = {}
    for modules in linear_layers.stack(linear):
        steps = _agreed(modules, assigned)
        if steps:
            built[modules[0]] = _stack({m: linear[m] for m in modules}, steps)
    if not built:
        raise RecipeError("the recipe leaves every layer alone: there is nothing to do")
    compressed = {module for stack in built.values() for module in stack.members}
    digest = _digest(source, recipe, data)
    source, device = kept_fused(source, compressed), device or present()
    plain = tuple(linear_layers.left_alone(source, compressed))
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
    stack, block = Stack(members, steps), stored_layout.row_block(steps)
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
        if len(e.shape) == 3 and ".experts." in e.name and e.dtype in linear_layers.FLOATS
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
