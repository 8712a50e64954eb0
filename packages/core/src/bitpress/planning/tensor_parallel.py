"""What an engine will make of a plan's layers: the shapes that its ranks hold, told before anything
is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from bitpress.checkpoint import layer_names, model_config
from bitpress.errors import RecipeError
from bitpress.planning import engine_rules
from bitpress.planning.layout import Stack
from bitpress.planning.plan import Plan
from bitpress.schemes.hardware import Hardware
from bitpress.schemes.values import Finding

ROWS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "query_key_value",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "w1",
    "w3",
    "dense_h_to_4h",
)

# how vLLM cuts layers for tensor parallelism
COLUMNS = ("o_proj", "down_proj", "w2", "dense_4h_to_h")

# of which a rank holds at least one head
KEYS = ("k_proj", "v_proj")


@frozen
class Remark:
    """What is to be said of layers.

    Attributes:
        layers: their name, with stars for numbers where it holds for several.
        count: how many they are.
    """

    layers: str
    count: int
    finding: Finding


def remarks(plan: Plan, ranks: int = 1) -> list[Remark]:
    """What an engine with so many tensor-parallel ranks refuses or does badly, alike layers
    together.

    Raises:
        RecipeError: there is no such number of ranks.
    """
    if ranks < 1:
        raise RecipeError(f"--tensor-parallel {ranks}: an engine has at least one rank")
    return [
        Remark(name, count, finding)
        for name, finding, count in layer_names.alike(_all(plan, ranks))
    ]


def _all(plan: Plan, ranks: int) -> Iterator[tuple[str, Finding]]:
    entries = {entry.name: entry for shard in plan.shards for entry in shard.header.entries}
    for fault in engine_rules.find_faults(plan.config, entries):
        yield fault.subject, Finding("unsupported", fault.text)
    heads = _count(plan.source.config, "num_attention_heads")
    if heads and heads % ranks:
        yield (
            "the model",
            Finding("unsupported", f"{heads} attention heads cannot be shared by {ranks} ranks"),
        )
    keys, size = (
        _count(plan.source.config, "num_key_value_heads"),
        model_config.head_size(plan.source.config),
    )
    for stack in plan.stacks:
        for module, entry in stack.members.items():
            if layer_names.OF_EXPERT.fullmatch(module) and (
                why := engine_rules.explain_expert_layout(stack.describe_stored(module)[1])
            ):
                yield module, Finding("unsupported", why)
            leaf = module.rpartition(".")[2]
            rows, width = entry.shape
            if leaf in KEYS and keys and size and rows == keys * size and keys < ranks:
                # a head for every rank, some of them the same
                rows = size * ranks
            cut = (
                None
                if ranks == 1
                else "rows"
                if leaf in ROWS
                else "columns"
                if leaf in COLUMNS
                else None
            )
            whole = {"rows": rows, "columns": width}.get(cut or "", ranks)
            if whole % ranks:
                yield (
                    module,
                    Finding("unsupported", f"{whole} {cut} cannot be shared by {ranks} ranks"),
                )
                continue
            shape = (
                rows // ranks if cut == "rows" else rows,
                width // ranks if cut == "columns" else width,
            )
            yield from ((module, finding) for finding in _said(stack, shape, cut, plan.device))


def _said(
    stack: Stack, shape: tuple[int, int], cut: str | None, device: Hardware
) -> Iterator[Finding]:
    for step in stack.steps:
        yield from step.call("validate_shape", shape=shape, cut=cut, hardware=device) or ()


def _count(config: Mapping[str, Any], key: str) -> int | None:
    for table in (config, config.get("text_config")):
        if isinstance(table, dict) and isinstance(table.get(key), int):
            return int(table[key])
    return None
