"""What the names of tensors say: decoder blocks, experts, and the layers that engines fuse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

# What vLLM 0.32 loads into one weight (`packed_modules_mapping`), in its order of rows.
FUSED: Sequence[Sequence[str]] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)

# The layers of an expert with a gate, by the name that they have in different models: gate, up,
# down.
GATED_EXPERT: Sequence[Sequence[str]] = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))

# Those of any expert.
EXPERT: Sequence[Sequence[str]] = (*GATED_EXPERT, ("up_proj", "down_proj"))

# Layers that choose the experts of a token: engines read them unquantized.
ROUTERS = ("gate", "router", "shared_expert_gate")

# Parts of a name that stand for another model beside the decoder.
OUTSIDE = re.compile(
    r"visual|vision|image|audio|speech|mtp|nextn|projector|draft|eagle", re.IGNORECASE
)

# The number of a block, or of an expert.
NUMBER = re.compile(r"[0-9]{1,6}")

# A number that is a whole part of a name.
INDEX_PART = re.compile(r"(?<=\.)\d+(?=\.|$)")

# Runs of numbers that a name for people shows, `0-2,5`; of more it has a star.
MAX_RUNS = 4

# What stands for such a number.
STAR = re.compile(r"\*")

OF_EXPERT = re.compile(rf"(?P<experts>.+\.experts)\.(?P<number>{NUMBER.pattern})\.(?P<leaf>\w+)")

IN_BLOCK = re.compile(rf"\.{NUMBER.pattern}\.[^0-9].*")

T = TypeVar("T", bound=Hashable)

BLOCK = re.compile(rf"(?P<container>.+?)\.(?P<index>{NUMBER.pattern})\.(?P<inside>.+)\.weight")


def group_experts(names: Iterable[str]) -> list[list[str]]:
    """Module names of experts by block: engines compute the experts of a block in one kernel."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if match := OF_EXPERT.fullmatch(name):
            groups.setdefault(match["experts"], []).append(name)
    return list(groups.values())


def find_fused(
    names: Iterable[str], fused: Sequence[Sequence[str]] = FUSED
) -> list[tuple[str, ...]]:
    """Module names grouped by what engines fuse into one layer, as the names alone say.

    Args:
        fused: the last parts of the names of such layers.
    """
    return group_siblings(dict.fromkeys(names), lambda members: True, fused)


def group_siblings(
    names: Mapping[str, Any],
    can_fuse: Callable[[Sequence[str]], bool],
    fused: Sequence[Sequence[str]],
) -> list[tuple[str, ...]]:
    """Module names grouped by what engines fuse into one layer, in the order of the first members.

    Args:
        can_fuse: whether these modules, whose names would make them one layer, may be one.
        fused: the last parts of the names of such layers; the first that holds a name counts.
    """
    groups: list[tuple[str, ...]] = []
    grouped: set[str] = set()
    for module in names:
        if module in grouped:
            continue
        leaf = module.rpartition(".")[2]
        parent = module.removesuffix(leaf)
        siblings = next((leaves for leaves in fused if leaf in leaves), (leaf,))
        members = [parent + sibling for sibling in siblings if parent + sibling in names]
        groups.append(tuple(members) if can_fuse(members) else (module,))
        grouped.update(groups[-1])
    return groups


def container(module: str) -> str:
    """The name of the list of blocks that a layer lies in: `model.layers` for
    `model.layers.0.mlp.up_proj`.
    """
    match = BLOCK.fullmatch(f"{module}.weight")
    assert match is not None, module
    return match["container"]


def block_index(tensor: str, container: str) -> int | None:
    """The number of the block that a tensor lies in; None outside that list of blocks."""
    prefix = f"{container}."
    if not tensor.startswith(prefix):
        return None
    number = tensor.removeprefix(prefix).split(".")[0]
    return int(number) if NUMBER.fullmatch(number) else None


def star(name: str) -> str:
    """A name with stars for its numbers: `model.layers.*.mlp.up_proj`."""
    return INDEX_PART.sub("*", name)


def numbers(name: str) -> list[str]:
    """The numbers for which a starred name has stars."""
    return INDEX_PART.findall(name)


def fill(pattern: str, numbers: Sequence[str]) -> str:
    """A starred name with numbers for its stars, in their order; the last ones may be left over."""
    remaining = iter(numbers)
    return STAR.sub(lambda match: next(remaining, "*"), pattern)


def group_numbered(items: Iterable[tuple[str, T]]) -> list[tuple[str, T, int]]:
    """Items (name, value), of which those of one value whose names differ in numbers alone are one:
    its name, with stars for the numbers, its value, and how many they are.
    """
    return [
        (star(names[0]) if len(names) > 1 else names[0], value, len(names))
        for names, value in _group_alike(items)
    ]


def collapse_numbered(items: Iterable[tuple[str, T]]) -> list[tuple[str, T, list[str]]]:
    """The same for people: a name has ranges for the numbers and says how many they are, as in
    `model.layers.0-31.mlp.up_proj x32`; then the value, and all names.
    """
    return [
        (f"{_name_ranges(names)} x{len(names)}" if len(names) > 1 else names[0], value, names)
        for names, value in _group_alike(items)
    ]


def _group_alike(items: Iterable[tuple[str, T]]) -> list[tuple[list[str], T]]:
    """The names of items of one value that differ in numbers alone."""
    groups: dict[tuple[str, T], list[str]] = {}
    for name, value in items:
        groups.setdefault((star(name), value), []).append(name)
    return [(names, value) for (_, value), names in groups.items()]


def _name_ranges(names: Sequence[str]) -> str:
    """Names that differ in numbers alone as one; with stars where ranges would name others too, or
    would be many.
    """
    columns = [sorted(set(map(int, column))) for column in zip(*map(numbers, names), strict=True)]
    ranges = [_join_runs(column) for column in columns]
    num_named = math.prod(map(len, columns))
    if num_named != len(names) or any(text.count(",") >= MAX_RUNS for text in ranges):
        return star(names[0])
    return fill(star(names[0]), ranges)


def _join_runs(indices: Sequence[int]) -> str:
    """Ascending numbers as `0,2-5`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
