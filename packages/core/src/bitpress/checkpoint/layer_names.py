"""What the names of tensors say: decoder blocks, experts, and layers that engines fuse."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

# what vLLM loads into one weight, in its order of rows
FUSED: Sequence[Sequence[str]] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)

EXPERT: Sequence[Sequence[str]] = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("up_proj", "down_proj"),
)

ROUTERS = ("gate", "router", "shared_expert_gate")

OUTSIDE = re.compile(
    r"visual|vision|image|audio|speech|mtp|nextn|projector|draft|eagle", re.IGNORECASE
)

# of a block, or an expert
NUMBER = re.compile(r"[0-9]{1,6}")

PLACE = re.compile(r"(?<=\.)\d+(?=\.)")

OF_EXPERT = re.compile(rf"(?P<experts>.+\.experts)\.(?P<number>{NUMBER.pattern})\.(?P<leaf>\w+)")

IN_BLOCK = re.compile(rf"\.{NUMBER.pattern}\.[^0-9].*")

T = TypeVar("T", bound=Hashable)

BLOCK = re.compile(rf"(?P<container>.+?)\.(?P<index>{NUMBER.pattern})\.(?P<inside>.+)\.weight")


def experts(names: Iterable[str]) -> list[list[str]]:
    """Module names of the experts of a block together, which engines compute in one kernel."""
    found: dict[str, list[str]] = {}
    for name in names:
        if place := OF_EXPERT.fullmatch(name):
            found.setdefault(place["experts"], []).append(name)
    return list(found.values())


def fused(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Module names grouped by what engines make one layer of, told from the names alone."""
    return _grouped(dict.fromkeys(names), lambda members: True)


def _grouped(
    names: Mapping[str, Any], fit: Callable[[Sequence[str]], bool]
) -> list[tuple[str, ...]]:
    groups: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for module in names:
        if module in taken:
            continue
        leaf = module.rpartition(".")[2]
        parent = module.removesuffix(leaf)
        members = [
            parent + n
            for n in next((f for f in FUSED if leaf in f), (leaf,))
            if parent + n in names
        ]
        groups.append(tuple(members) if fit(members) else (module,))
        taken.update(groups[-1])
    return groups


def container(module: str) -> str:
    """The name of the list of blocks that a layer lies in: `model.layers` for
    `model.layers.0.mlp.up_proj`.
    """
    place = BLOCK.fullmatch(f"{module}.weight")
    assert place is not None, module
    return place["container"]


def block_index(tensor: str, container: str) -> int | None:
    """The number of the block that a tensor lies in; None outside that list of blocks."""
    number = (
        tensor.removeprefix(f"{container}.").split(".")[0]
        if tensor.startswith(f"{container}.")
        else ""
    )
    return int(number) if NUMBER.fullmatch(number) else None


def alike(names: Iterable[tuple[str, T]]) -> list[tuple[str, T, int]]:
    """Names with what is said of them, those that differ in numbers alone put together with stars
    for these, and how many.
    """
    found: dict[tuple[str, T], list[str]] = {}
    for name, what in names:
        found.setdefault((PLACE.sub("*", name), what), []).append(name)
    return [
        (star if len(same) > 1 else same[0], what, len(same))
        for (star, what), same in found.items()
    ]
