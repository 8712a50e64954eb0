"""Models that keep all experts of a block in one tensor, seen as the layers that schemes and
engines know: one for each expert.

The only place where architectures are named. What is here are facts about engines; how a tensor is
cut is read from its shape and from the config, and where these leave a doubt it is not cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from bitpress.checkpoint import layer_names
from bitpress.checkpoint.model_config import ModelConfig
from bitpress.checkpoint.reader import Checkpoint
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.views import View, part

# vLLM 0.32 reads layers for each expert too: experts.0.gate_proj, experts.0.up_proj,
# experts.0.down_proj
READ = (
    "llama4",
    "llama4_text",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
)

REFUSED: Mapping[str, str] = {
    "gpt_oss": "vLLM reads gpt-oss's experts in one tensor, gate and up interleaved, and not in "
    "this format",
    "granitemoe": "vLLM reads Granite's experts in one tensor, and not in this format",
}

PAIR = ("gate_up_proj", "down_proj")


@frozen
class Fused:
    """Experts of a block that stay fused, and why."""

    module: str
    why: str


def unfolded(checkpoint: Checkpoint) -> tuple[dict[str, list[View]], list[Fused]]:
    """By the name of each fused tensor the layers in it, and what cannot be cut."""
    config = checkpoint.model_config
    kind = str(config.model_type)
    fused: dict[str, dict[str, Entry]] = {}
    for name, entry in checkpoint.entries.items():
        place = layer_names.BLOCK.fullmatch(f"{name.removesuffix('.weight')}.weight")
        if (
            place
            and len(entry.shape) == 3
            and entry.shape[0] == (config.num_experts or 0)
            and not layer_names.OUTSIDE.search(name)
        ):
            module, _, leaf = name.removesuffix(".weight").rpartition(".")
            fused.setdefault(module, {})[leaf] = entry
    found: dict[str, list[View]] = {}
    left = []
    for module, tensors in fused.items():
        why = next((why for key, why in REFUSED.items() if kind.startswith(key)), None)
        if why is None and not (kind in READ and set(tensors) == set(PAIR)):
            why = (
                f"no engine is known to read {', '.join(sorted(tensors))} of a {kind!r} model in "
                "this format"
            )
        if why is None:
            both, down = (tensors[leaf] for leaf in PAIR)
            views = _cut(module, both, down, config)
            found |= views
            why = None if views else _neither(both, down, config)
        if why is not None:
            left.append(Fused(module, why))
    return found, left


def _cut(module: str, both: Entry, down: Entry, config: ModelConfig) -> dict[str, list[View]]:
    """The layers in a pair of tensors, which lie one way in both, and with gate before up; nothing
    where they lie in neither.
    """
    hidden, width = config.hidden_size or 0, config.expert_size or 0
    ways = {
        # each (out, in)
        False: ((2 * width, hidden), (hidden, width)),
        True: ((hidden, 2 * width), (width, hidden)),
    }
    turned = next(
        (turned for turned, shapes in ways.items() if (both.shape[1:], down.shape[1:]) == shapes),
        None,
    )
    if turned is None:
        return {}
    shape = (width, hidden)
    return {
        both.name: list(
            _views(module, both, (("gate_proj", 0, shape), ("up_proj", width, shape)), turned)
        ),
        down.name: list(_views(module, down, (("down_proj", 0, (hidden, width)),), turned)),
    }


def _neither(both: Entry, down: Entry, config: ModelConfig) -> str:
    hidden, width = config.hidden_size or 0, config.expert_size or 0
    return (
        f"{both.name} is {list(both.shape)} and {down.name} {list(down.shape)}, which with "
        f"{hidden} channels, and {width} of an expert, lie neither (out, in) nor (in, out), and "
        "experts are not cut by guess"
    )


def _views(
    module: str, entry: Entry, layers: Sequence[tuple[str, int, tuple[int, int]]], turned: bool
) -> Iterator[View]:
    for number in range(entry.shape[0]):
        stored = part(entry, number)
        for leaf, first, shape in layers:
            name = f"{module}.{number}.{leaf}.weight"
            yield View(
                name, entry.dtype, shape, entry.file, stored.start, stored, first, turned, entry
            )
