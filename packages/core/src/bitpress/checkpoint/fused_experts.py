"""Models that keep all experts of a block in one tensor, read as the layers that schemes and
engines know: one for each expert.

Which architectures an engine reads expert by expert, and under which names, is among its facts. How
a tensor is split follows from its shape and from the config. Where these leave a doubt it is not
split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.engine_facts import EngineFacts, architecture_of, facts_of
from bitpress.checkpoint.model_config import ModelConfig
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.views import View, select_matrix

# What the tensors of gate and up, and of down, are called.
PAIRS = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"))


@frozen
class UnsplitExperts:
    """Experts of a block that stay in one tensor, and why.

    Attributes:
        is_quantized: whether the files hold fewer bits of them than a copy has.
    """

    module: str
    reason: str
    is_quantized: bool


def split_experts(checkpoint: Checkpoint) -> tuple[dict[str, list[View]], list[UnsplitExperts]]:
    """The layers in each fused tensor by its name, and the experts that cannot be split."""
    config = checkpoint.model_config
    engines = facts_of(checkpoint.config)
    views: dict[str, list[View]] = {}
    unsplit = []
    for module, tensors in _find_fused_tensors(
        checkpoint, config.num_experts or 0, engines
    ).items():
        is_quantized = any(isinstance(tensor, View) for tensor in tensors.values())
        pair = next((pair for pair in PAIRS if set(pair) == set(tensors)), None)
        names = next(filter(None, (facts.expert_names(module) for facts in engines)), None)
        layers: dict[str, list[View]] = {}
        if pair is None or names is None:
            known = next(filter(None, (facts.why_whole(module) for facts in engines)), None)
            leaves, architecture = ", ".join(sorted(tensors)), architecture_of(checkpoint.config)
            unknown = f"no engine is known to read {leaves} of {architecture} expert by expert"
            reason = known or unknown
        elif is_quantized:
            # a matrix of them is no run of bytes in a file
            tensor_names = " and ".join(tensors[leaf].name for leaf in pair)
            reason = f"{tensor_names} are quantized in one tensor for all experts"
        else:
            gate_up, down = (tensors[leaf] for leaf in pair)
            layers = _split(names, gate_up, down, config)
            reason = _explain_shapes(gate_up, down, config)
        views |= layers
        if not layers:
            unsplit.append(UnsplitExperts(module, reason, is_quantized))
    return views, unsplit


def _find_fused_tensors(
    checkpoint: Checkpoint, num_experts: int, engines: Sequence[EngineFacts]
) -> dict[str, dict[str, Entry]]:
    """Tensors (experts, ., .) in decoder blocks, by module and by their own names in it."""
    tensors: dict[str, dict[str, Entry]] = {}
    for name, entry in checkpoint.entries.items():
        layer = name.removesuffix(".weight")
        module, _, leaf = layer.rpartition(".")
        is_fused = len(entry.shape) == 3 and entry.shape[0] == num_experts
        if is_fused and _is_in_decoder(f"{layer}.weight") and holds_experts(layer, entry, engines):
            tensors.setdefault(module, {})[leaf] = entry
    return tensors


def holds_experts(layer: str, entry: Entry, engines: Sequence[EngineFacts]) -> bool:
    """Whether a stack of as many matrices as there are experts is one of experts: there may be as
    many heads of attention.
    """
    if "expert" in layer or layer.rpartition(".")[2] in itertools.chain(*PAIRS):
        return True
    kinds = {fact.kind for facts in engines if (fact := facts.layer(layer))}
    return "experts" in kinds or (not kinds and min(entry.shape[1:]) > 1)


def _is_in_decoder(name: str) -> bool:
    return bool(layer_names.BLOCK.fullmatch(name)) and not layer_names.OUTSIDE.search(name)


def _split(
    names: tuple[str, Sequence[str]], gate_up: Entry, down: Entry, config: ModelConfig
) -> dict[str, list[View]]:
    """The layers in a pair of tensors by the tensor's name; empty where their shapes are neither
    (experts, out, in) nor (experts, in, out).

    Both tensors lie one way, and gate's rows come before up's.

    Args:
        names: what stands before an expert's number, and what its layers are called.
    """
    parent, (gate_leaf, up_leaf, down_leaf) = names
    hidden, inner = config.hidden_size or 0, config.expert_size or 0
    if (gate_up.shape[1:], down.shape[1:]) == ((2 * inner, hidden), (hidden, inner)):
        transposed = False
    elif (gate_up.shape[1:], down.shape[1:]) == ((hidden, 2 * inner), (inner, hidden)):
        transposed = True
    else:
        return {}
    gate_up_layers = [(gate_leaf, 0, (inner, hidden)), (up_leaf, inner, (inner, hidden))]
    down_layers = [(down_leaf, 0, (hidden, inner))]
    return {
        gate_up.name: list(_views(parent, gate_up, gate_up_layers, transposed)),
        down.name: list(_views(parent, down, down_layers, transposed)),
    }


def _explain_shapes(gate_up: Entry, down: Entry, config: ModelConfig) -> str:
    hidden, inner = config.hidden_size or 0, config.expert_size or 0
    return (
        f"{gate_up.name} is {list(gate_up.shape)} and {down.name} {list(down.shape)}, which with "
        f"{hidden} channels, and {inner} of an expert, lie neither (out, in) nor (in, out), and "
        "experts are not cut by guess"
    )


def _views(
    parent: str,
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
                f"{parent}.{number}.{leaf}.weight",
                fused.dtype,
                shape,
                fused.file,
                matrix.start,
                matrix,
                first,
                transposed,
                fused,
            )
