"""Which tensors of a model a rotation of its hidden states changes, and how: R1 and R2 of SpinQuant
(arXiv:2405.16406).

R1 rotates the hidden states: what writes them (embeddings, o_proj, down_proj) is rotated, and what
reads them (q_proj, ..., the head) is rotated back. A norm that only divides by the root mean square
does not see it once its weight is folded into what reads it. R2 rotates the values of every head:
v_proj, and back in o_proj.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import attrs
from attrs import frozen

from bitpress.checkpoint.engine_facts import architecture_of
from bitpress.checkpoint.rotated_source import FoldedNorm, RotatedView
from bitpress.checkpoint.safetensors import Entry
from bitpress.checkpoint.source import Source
from bitpress.checkpoint.views import View
from bitpress.errors import RecipeError
from bitpress.numerics.hadamard import Rotation

# Models whose blocks read the hidden states through RMSNorms alone, and add to them what they
# compute, as it is or times a number.
ARCHITECTURES = (
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "SmolLM3ForCausalLM",
)

EMBEDDINGS, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

HIDDEN, HEADS = "hidden states", "heads"


@frozen
class _Role:
    """What becomes of a tensor.

    Attributes:
        norm: the norm in its block that is folded into it.
        inputs: what its columns read that is rotated.
        outputs: what its rows write that is rotated.
        is_norm: whether it is a norm that is folded into others.
    """

    norm: str = ""
    inputs: str = ""
    outputs: str = ""
    is_norm: bool = False


_ATTENTION_NORM, _MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
_EXPERTS = r"(mlp|block_sparse_moe)\.experts\.\d+\."
_MLP = rf"(mlp\.|mlp\.shared_expert\.|{_EXPERTS})"

# By a pattern of names within a block.
_ROLES: Mapping[str, _Role] = {
    r"(input|post_attention)_layernorm\.weight": _Role(is_norm=True),
    r"self_attn\.[qk]_proj\.weight": _Role(_ATTENTION_NORM, HIDDEN),
    r"self_attn\.v_proj\.weight": _Role(_ATTENTION_NORM, HIDDEN, HEADS),
    r"self_attn\.v_proj\.bias": _Role(outputs=HEADS),
    r"self_attn\.o_proj\.weight": _Role(inputs=HEADS, outputs=HIDDEN),
    rf"{_MLP}(gate_proj|up_proj|w1|w3)\.weight": _Role(_MLP_NORM, HIDDEN),
    rf"{_MLP}(down_proj|w2)\.weight": _Role(outputs=HIDDEN),
    rf"(self_attn\.o_proj|{_MLP}(down_proj|w2))\.bias": _Role(outputs=HIDDEN),
    # routers, and the gate of a shared expert
    r"(mlp|block_sparse_moe)\.(gate|shared_expert_gate)\.weight": _Role(_MLP_NORM, HIDDEN),
    # heads' queries and keys stay as they are
    rf"(self_attn\.[qk]_proj|{_MLP}(gate_proj|up_proj|w1|w3))\.bias": _Role(),
    r"self_attn\.([qk]_norm\.weight|rotary_emb\.inv_freq)": _Role(),
}

_OUTER_ROLES: Mapping[str, _Role] = {
    EMBEDDINGS: _Role(inputs=HIDDEN),
    FINAL_NORM: _Role(is_norm=True),
    HEAD: _Role(FINAL_NORM, HIDDEN),
}

# Tensors that no rotation can be folded around, by a pattern of their names.
_OBSTACLES: Mapping[str, str] = {
    r".*norm\.bias": "the bias of a norm, which subtracts a mean as well",
    r".*\.post_(?!attention_layernorm)\w*norm\.weight": (
        "a norm whose output is added to them, and no layer after it takes its weight over"
    ),
}

_IN_BLOCK = re.compile(r"(?P<prefix>model\.layers\.\d+\.)(?P<inside>.+)")


def rotate_source(source: Source) -> Source:
    """The same function with hidden states and heads rotated, its embeddings and head untied; a
    rotated source as it is.

    Nothing is read: every tensor is computed when it is read.

    Raises:
        RecipeError: the function of such a model would change, or may.
    """
    if source.original is not None:
        return source
    _require_known(source)
    original = source
    source = _untie(source)
    rotations = _rotations(source)
    entries = {}
    for name, entry in source.entries.items():
        role, prefix = _find_role(source, name)
        entries[name] = _view(source, entry, role, prefix, rotations)
    return attrs.evolve(source, entries=entries, original=original)


def _refuse(source: Source, fact: str) -> RecipeError:
    return RecipeError(
        f"{source.folder}: the hidden states of {architecture_of(source.config)} cannot be "
        f"rotated: {fact}; set rotate=none"
    )


def _require_known(source: Source) -> None:
    """Raise RecipeError where the names of tensors, or the architecture, forbid a rotation."""
    for name, (pattern, fact) in itertools.product(source.entries, _OBSTACLES.items()):
        if re.fullmatch(pattern, name):
            raise _refuse(source, f"{name} is {fact}")
    if (architecture := architecture_of(source.config)) not in ARCHITECTURES:
        names = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
        raise _refuse(source, f"it is not known whether {architecture} allows it, as {names} do")

    views = [entry for entry in source.entries.values() if isinstance(entry, View)]
    fused = [view.whole.name for view in views if view.whole is not None]
    if fused := [*fused, *(experts.module for experts in source.unsplit)]:
        raise _refuse(source, f"{fused[0]} holds all experts of a block in one tensor")


def _untie(source: Source) -> Source:
    """The source with a head of its own: the final norm is folded into the head alone."""
    entries = dict(source.entries)
    if EMBEDDINGS not in entries:
        raise _refuse(source, f"it has no {EMBEDDINGS}")
    if HEAD not in entries or source.config.get("tie_word_embeddings"):
        entries[HEAD] = attrs.evolve(entries[EMBEDDINGS], name=HEAD)
    config = {**source.config, "tie_word_embeddings": False}
    return attrs.evolve(source, entries=entries, config=config)


def _rotations(source: Source) -> Mapping[str, Rotation]:
    """What hidden states and heads are rotated by."""
    hidden_size, head_dim = source.entries[EMBEDDINGS].shape[-1], source.model_config.head_dim
    if head_dim is None:
        raise _refuse(source, "its config does not say what size its heads are")
    return {HIDDEN: Rotation(hidden_size), HEADS: Rotation(head_dim)}


def _find_role(source: Source, name: str) -> tuple[_Role, str]:
    """What becomes of a tensor, and the prefix of its block."""
    if name in _OUTER_ROLES:
        return _OUTER_ROLES[name], ""
    match = _IN_BLOCK.fullmatch(name)
    inside = match["inside"] if match else ""
    for pattern, role in _ROLES.items():
        if match and re.fullmatch(pattern, inside):
            return role, match["prefix"]
    raise _refuse(source, f"it is not known what {name} does with them")


def _view(
    source: Source, entry: Entry, role: _Role, prefix: str, rotations: Mapping[str, Rotation]
) -> Entry:
    """The tensor after rotation; the same where it is not changed."""
    if role == _Role():
        return entry
    place = (entry.name, entry.dtype, entry.shape, entry.file, entry.start, entry)
    inputs, outputs = rotations.get(role.inputs), rotations.get(role.outputs)
    norm = None
    if role.norm:
        norm = source.entries.get(prefix + role.norm)
        if norm is None or norm.shape != entry.shape[-1:]:
            raise _refuse(source, f"{prefix + role.norm} is no norm for {entry.name}")
    for what, num_channels in ((role.inputs, entry.shape[-1]), (role.outputs, entry.shape[0])):
        if what and not _fits(what, num_channels, rotations[what]):
            raise _refuse(source, f"{entry.name} {list(entry.shape)} does not fit its {what}")
    if role.is_norm:
        return FoldedNorm(*place)
    return RotatedView(*place, norm=norm, inputs=inputs, outputs=outputs)


def _fits(what: str, num_channels: int, rotation: Rotation) -> bool:
    """Whether so many channels are all hidden states, or those of some heads."""
    if what == HIDDEN:
        return num_channels == rotation.period
    return num_channels % rotation.period == 0
