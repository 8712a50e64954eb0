"""`quantization_config`, which says to transformers and vLLM how the tensors are stored
(compressed-tensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.checkpoint.engine_facts import EVERY_LINEAR, EngineFacts, is_embedding, is_head
from bitpress.checkpoint.model_config import METHOD
from bitpress.errors import RecipeError
from bitpress.planning.engine_names import names_to_ignore, names_to_target

# compressed-tensors' name for the format of plain weights.
NO_WEIGHTS = "dense"


def quantization_config(
    fragments: Mapping[str, Mapping[str, Any] | None],
    ignored: Sequence[str],
    engines: Sequence[EngineFacts] = (),
    cache: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """The smallest config that both loaders accept; None where every tensor is plain.

    Args:
        fragments: by compressed module, the config group that its scheme wrote; None for a plain
            weight.
        ignored: modules that are not compressed, for `ignore`.
        engines: the facts of engines for the model.
        cache: the `kv_cache_scheme`; None where keys and values are kept as they are computed.

    Raises:
        RecipeError: layers are to be stored in several sparsity layouts, and a config has one.
    """
    quantized = _group_by_fragment(fragments, is_sparse=False)
    sparse = _group_by_fragment(fragments, is_sparse=True)
    config: dict[str, Any] = {}
    if sparse:
        config["quant_method"] = METHOD
        config["sparsity_config"] = _sparsity_config(sparse, fragments, ignored, bool(quantized))
    if cache is not None:
        config["kv_cache_scheme"] = dict(cache)
    if not quantized and cache is None:
        return config or None

    entries = [json.loads(text) for text in quantized]
    formats = {entry["format"] for entry in entries}
    # The target of a single group is "Linear", which also matches layers that an engine has fused.
    # Several groups need the names.
    targets = list(quantized.values())
    if len(quantized) == 1:
        # that of all linear layers does not stand for a head or embeddings
        by_name = [m for m in targets[0] if is_head(m, engines) or is_embedding(m, engines)]
        targets = [[EVERY_LINEAR, *by_name]]
    compressed = {module for modules in quantized.values() for module in modules}
    plain = [module for module in fragments if module not in compressed]
    ignored = [*ignored, *plain]
    for facts in engines:
        ignored += names_to_ignore(facts, ignored, plain, compressed)
        if targets != [[EVERY_LINEAR]]:
            targets = [[*names, *names_to_target(facts, names)] for names in targets]
    return config | {
        "quant_method": METHOD,
        "format": _global_format(formats),
        # transformers 5.17 initializes the layers at random under any other status.
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            f"group_{number}": {"targets": target, **entry}
            for number, (target, entry) in enumerate(zip(targets, entries, strict=True))
        },
    }


def _global_format(formats: set[str]) -> str:
    """The format that a config names beside those of its groups."""
    if not formats:
        return NO_WEIGHTS
    return next(iter(formats)) if len(formats) == 1 else "mixed-precision"


def _group_by_fragment(
    fragments: Mapping[str, Mapping[str, Any] | None], is_sparse: bool
) -> dict[str, list[str]]:
    """The modules of each fragment, by its JSON text: of those about sparsity, or of all others."""
    groups: dict[str, list[str]] = {}
    for module, fragment in fragments.items():
        if fragment is not None and ("sparsity_structure" in fragment) == is_sparse:
            groups.setdefault(json.dumps(fragment, sort_keys=True), []).append(module)
    return groups


def _sparsity_config(
    groups: Mapping[str, Sequence[str]],
    fragments: Mapping[str, Mapping[str, Any] | None],
    ignored: Sequence[str],
    has_quantized: bool,
) -> dict[str, Any]:
    if len(groups) > 1:
        names = " and ".join(json.loads(text)["format"] for text in groups)
        raise RecipeError(
            f"a model cannot be stored as {names} at once: a config has one sparsity_config; use "
            "one layout"
        )
    ((text, modules),) = groups.items()
    return {
        **json.loads(text),
        "targets": modules if has_quantized else [EVERY_LINEAR],
        "ignore": [*ignored, *(module for module in fragments if module not in modules)],
    }
