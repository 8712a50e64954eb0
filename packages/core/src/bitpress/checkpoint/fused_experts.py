"""Models that keep all experts of a block in one tensor, read as the layers that schemes and
engines know: one for each expert.

Only this module names architectures, because which of them an engine reads expert by expert is a
fact about the engine. How a tensor is split follows from its shape and from the config. Where these
leave a doubt it is not split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.model_config import ModelConfig
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.views import View, select_matrix

# Model types of which vLLM 0.32 also reads one layer for each expert: experts.0.gate_proj,
# experts.0.up_proj, experts.0.down_proj.
READ_BY_EXPERT = (
    "llama4",
    "llama4_text",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
)

# Model types, by what they begin with, of which vLLM 0.32 does not.
REFUSED: Mapping[str, str] = {
    "gpt_oss": "vLLM reads gpt-oss's experts in one tensor, gate and up interleaved, and not in "
    "this format",
    "granitemoe": "vLLM reads Granite's experts in one tensor, and not in this format",
}

PAIR = ("gate_up_proj", "down_proj")


@frozen
class UnsplitExperts:
    """Experts of a block that stay in one tensor, and why."""

    module: str
    reason: str


def split_experts(checkpoint: Checkpoint) -> tuple[dict[str, list[View]], list[UnsplitExperts]]:
    """The layers in each fused tensor by its name, and the experts that cannot be split."""
    config = checkpoint.model_config
    views: dict[str, list[View]] = {}
    unsplit = []
    for module, tensors in _find_fused_tensors(checkpoint, config.num_experts or 0).items():
        reason = _refusal(str(config.model_type), tensors)
        if reason is None:
            gate_up, down = (tensors[leaf] for leaf in PAIR)
            layers = _split(module, gate_up, down, config)
            views |= layers
            reason = None if layers else _explain_shapes(gate_up, down, config)
        if reason is not None:
            unsplit.append(UnsplitExperts(module, reason))
    return views, unsplit


def _find_fused_tensors(checkpoint: Checkpoint, num_experts: int) -> dict[str, dict[str, Entry]]:
    """Tensors (experts, ., .) in decoder blocks, by module and by their own names in it."""
    tensors: dict[str, dict[str, Entry]] = {}
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        is_fused = len(entry.shape) == 3 and entry.shape[0] == num_experts
        if is_fused and _is_in_decoder(f"{module}.{leaf}.weight"):
            tensors.setdefault(module, {})[leaf] = entry
    return tensors


def _is_in_decoder(name: str) -> bool:
    return bool(layer_names.BLOCK.fullmatch(name)) and not layer_names.OUTSIDE.search(name)


def _refusal(model_type: str, tensors: Mapping[str, Entry]) -> str | None:
    """Why engines do not read these experts one by one; None where they do."""
    for prefix, reason in REFUSED.items():
        if model_type.startswith(prefix):
            return reason
    if model_type in READ_BY_EXPERT and set(tensors) == set(PAIR):
        return None
    return (
        f"no engine is known to read {', '.join(sorted(tensors))} of a {model_type!r} model in "
        "this format"
    )


def _split(module: str, gate_up: Entry, down: Entry, config: ModelConfig) -> dict[str, list[View]]:
    """The layers in a pair of tensors by the tensor's name; empty where their shapes are neither
    (experts, out, in) nor (experts, in, out).

    Both tensors lie one way, and gate's rows come before up's.
    """
    hidden, inner = config.hidden_size or 0, config.expert_size or 0
    if (gate_up.shape[1:], down.shape[1:]) == ((2 * inner, hidden), (hidden, inner)):
        transposed = False
    elif (gate_up.shape[1:], down.shape[1:]) == ((hidden, 2 * inner), (inner, hidden)):
        transposed = True
    else:
        return {}
    gate_up_layers = [("gate_proj", 0, (inner, hidden)), ("up_proj", inner, (inner, hidden))]
    down_layers = [("down_proj", 0, (hidden, inner))]
    return {
        gate_up.name: list(_views(module, gate_up, gate_up_layers, transposed)),
        down.name: list(_views(module, down, down_layers, transposed)),
    }


def _explain_shapes(gate_up: Entry, down: Entry, config: ModelConfig) -> str:
    hidden, inner = config.hidden_size or 0, config.expert_size or 0
    return (
        f"{gate_up.name} is {list(gate_up.shape)} and {down.name} {list(down.shape)}, which with "
        f"{hidden} channels, and {inner} of an expert, lie neither (out, in) nor (in, out), and "
        "experts are not cut by guess"
    )


def _views(
    module: str,
    fused: Entry,
    layers: Sequence[tuple[str, int, tuple[int, int]]],
    transposed: bool,
) -> Iterator[View]:
    """A view of every layer of every expert.

    Args:
        layers: name, first row in the expert's matrix, and shape (out, in).
    """
    for number in range(fused.shape[0]):
        matrix = select_matrix(fused, number)
        for leaf, first, shape in layers:
            yield View(
                f"{module}.{number}.{leaf}.weight",
                fused.dtype,
                shape,
                fused.file,
                matrix.start,
                matrix,
                first,
                transposed,
                fused,
            )
