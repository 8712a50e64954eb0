"""What an engine will make of a plan's layers: the shapes that its ranks hold, checked before
anything is written.
"""

from __future__ import annotations

from collections.abc import Iterator

from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.safetensors import Entry
from bitpress.errors import RecipeError
from bitpress.planning import engine_rules
from bitpress.planning.layout import Stack
from bitpress.planning.plan import Plan
from bitpress.schemes.values import Finding

# How vLLM 0.32 cuts layers for tensor parallelism: these by rows (its ColumnParallelLinear and
# QKVParallelLinear) ...
CUT_BY_ROWS = (
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

# ... and these by columns (its RowParallelLinear).
CUT_BY_COLUMNS = ("o_proj", "down_proj", "w2", "dense_4h_to_h")

# Layers of which a rank holds at least one head.
KEY_VALUE = ("k_proj", "v_proj")


@frozen
class Remark:
    """A finding about layers.

    Attributes:
        layers: their name, with stars for numbers where it holds for several.
        count: how many they are.
    """

    layers: str
    count: int
    finding: Finding


def remarks(plan: Plan, num_ranks: int = 1) -> list[Remark]:
    """What an engine with so many tensor-parallel ranks refuses or does badly, alike layers
    together.

    Raises:
        RecipeError: there is no such number of ranks.
    """
    if num_ranks < 1:
        raise RecipeError(f"--tensor-parallel {num_ranks}: an engine has at least one rank")
    findings = layer_names.group_numbered(_find_all(plan, num_ranks))
    return [Remark(name, count, finding) for name, finding, count in findings]


def explain_refusal(plan: Plan) -> str | None:
    """Why no engine takes a plan's result; None where nothing is known against it."""
    for remark in remarks(plan):
        if remark.finding.level == "unsupported":
            return f"{remark.layers}: {remark.finding.text}"
    return None


def _find_all(plan: Plan, num_ranks: int) -> Iterator[tuple[str, Finding]]:
    """What engines make of the plan, by the name of a layer, tensor or file."""
    entries = {entry.name: entry for shard in plan.shards for entry in shard.header.entries}
    for fault in engine_rules.find_faults(plan.config, entries):
        yield fault.subject, Finding("unsupported", fault.text)

    num_heads = plan.source.model_config.num_heads
    if num_heads and num_heads % num_ranks:
        text = f"{num_heads} attention heads cannot be shared by {num_ranks} ranks"
        yield "the model", Finding("unsupported", text)

    for stack in plan.stacks:
        for module in stack.members:
            if layer_names.OF_EXPERT.fullmatch(module):
                fragment = stack.describe_stored(module)[1]
                if reason := engine_rules.explain_expert_layout(fragment):
                    yield module, Finding("unsupported", reason)
            for finding in _check_cut(plan, stack, module, num_ranks):
                yield module, finding


def _check_cut(plan: Plan, stack: Stack, module: str, num_ranks: int) -> Iterator[Finding]:
    """Whether a layer can be cut for the ranks, and what its schemes say of a rank's part."""
    rows, columns = _replicated_shape(plan, stack.members[module], module, num_ranks)
    leaf = module.rpartition(".")[2]
    cut = None
    if num_ranks > 1 and leaf in CUT_BY_ROWS:
        cut, size = "rows", rows
        rows //= num_ranks
    elif num_ranks > 1 and leaf in CUT_BY_COLUMNS:
        cut, size = "columns", columns
        columns //= num_ranks

    if cut and size % num_ranks:
        yield Finding("unsupported", f"{size} {cut} cannot be shared by {num_ranks} ranks")
        return
    for step in stack.steps:
        yield from (
            step.call("validate_shape", shape=(rows, columns), cut=cut, hardware=plan.device) or ()
        )


def _replicated_shape(plan: Plan, entry: Entry, module: str, num_ranks: int) -> tuple[int, int]:
    """(out, in) of a layer as all ranks hold it together: where there are fewer heads of keys and
    values than ranks, several ranks hold the same head.
    """
    rows, columns = entry.shape
    num_heads = plan.source.model_config.num_kv_heads
    head_dim = plan.head_dim
    is_key_value = module.rpartition(".")[2] in KEY_VALUE
    if is_key_value and num_heads and head_dim and rows == num_heads * head_dim:
        rows = max(num_heads, num_ranks) * head_dim
    return rows, columns
