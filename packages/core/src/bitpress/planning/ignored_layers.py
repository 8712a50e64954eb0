"""The layers that are left alone, under the names by which loaders look for them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from bitpress.checkpoint.engine_facts import (
    EngineFacts,
    NamePatterns,
    engines_without,
    facts_of,
    is_embedding,
)
from bitpress.checkpoint.fused_experts import holds_experts
from bitpress.checkpoint.layer_names import IN_BLOCK, OUTSIDE
from bitpress.checkpoint.reader import Checkpoint
from bitpress.planning import draft_blocks
from bitpress.planning.engine_names import names_to_ignore


def ignored_layers(checkpoint: Checkpoint, compressed: Iterable[str]) -> list[str]:
    """What `ignore` lists in the config: every layer that a loader would take for quantized and
    that stays as it is, in file order, then what engines call it, then heads that are tied.

    Args:
        compressed: module names.
    """
    compressed = list(compressed)
    engines = facts_of(checkpoint.config)
    plain = _plain_layers(checkpoint, compressed, engines)
    names = dict.fromkeys(name for layer in plain for name in plain[layer])

    # Where an engine does not know a layer, its name is guessed.
    if isinstance(checkpoint.config.get("text_config"), dict):
        has_unknown_engine = bool(engines_without(checkpoint.config))
        unknown = [
            module
            for layer, modules in plain.items()
            for module in modules
            if has_unknown_engine or any(facts.layer(layer) is None for facts in engines)
        ]
        patterns = dict.fromkeys(filter(None, map(_pattern_anywhere, unknown)))
        # Another tower may have the names of the decoder.
        names |= {
            p: None for p in patterns if not any(map(NamePatterns.parse([p]).match, compressed))
        }
    drafts = draft_blocks.names_in_vllm(checkpoint.entries, checkpoint.model_config.num_layers)
    names |= dict.fromkeys(draft_blocks.patterns_to_ignore(drafts.values()))
    for facts in engines:
        names |= dict.fromkeys(names_to_ignore(facts, list(names), plain, compressed))

    if not any(facts.tied for facts in engines):
        is_stored = any(name.endswith("lm_head") for name in (*names, *compressed))
        return list(names if is_stored else names | {"lm_head": None})
    heads = [head for facts in engines for head in facts.tied]
    is_tied = {head: f"{head}.weight" not in checkpoint.entries for head in heads}
    return list(names | dict.fromkeys(head for head in heads if is_tied[head]))


def _plain_layers(
    checkpoint: Checkpoint, compressed: Iterable[str], engines: Sequence[EngineFacts]
) -> dict[str, list[str]]:
    """What a loader might take for linear layers, and what the files call them for `ignore`."""
    compressed = set(compressed)
    layers: dict[str, list[str]] = {}
    for name, entry in checkpoint.entries.items():
        module, _, leaf = name.rpartition(".")
        layer = name.removesuffix(".weight")
        is_matrix = leaf == "weight" and len(entry.shape) == 2
        are_experts = len(entry.shape) == 3 and holds_experts(layer, entry, engines)
        is_linear = is_matrix and not is_embedding(layer, engines)
        if (is_linear or are_experts) and module not in compressed:
            modules = layers.setdefault(layer, [module])
            # Fused expert weights are parameters of the experts' module, not modules of their own.
            # Engines ask for the experts by names of their own.
            if leaf != "weight" and (match := IN_BLOCK.search(module)):
                modules.append(rf"re:.*{re.escape(match[0])}(\..+)?$")
    return layers


def _pattern_anywhere(module: str) -> str | None:
    """A pattern for a module of a model with several parts, whose names begin otherwise in files,
    transformers and engines: of a part that is not the decoder it names all, and of others what
    follows from the list of blocks on.
    """
    if module.startswith("re:"):
        return None
    names = module.split(".")
    if part := next((name for name in names[:-1] if OUTSIDE.search(name)), None):
        return rf"re:(.*\.)?{re.escape(part)}\..*"
    match = IN_BLOCK.search(module)
    start = module.rfind(".", 0, match.start()) + 1 if match else len(module) - len(names[-1])
    return rf"re:(.*\.)?{re.escape(module[start:])}$"
