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

# The key, in a config and in a layer's fragment, of what is said of zeros.
SPARSITY = "sparsity_config"


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
    quantized = _group_by_fragment(fragments)
    config: dict[str, Any] = {}
    if sparsity := _sparsity_config(fragments, ignored):
        config |= {"quant_method": METHOD, SPARSITY: sparsity}
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
    fragments: Mapping[str, Mapping[str, Any] | None],
) -> dict[str, list[str]]:
    """The modules of each fragment that says how numbers are stored, by its JSON text."""
    groups: dict[str, list[str]] = {}
    for module, fragment in fragments.items():
        entry = {key: value for key, value in (fragment or {}).items() if key != SPARSITY}
        if entry:
            groups.setdefault(json.dumps(entry, sort_keys=True), []).append(module)
    return groups


def _sparsity_config(
    fragments: Mapping[str, Mapping[str, Any] | None], ignored: Sequence[str]
) -> dict[str, Any] | None:
    """What a config says of zeros; None where no layer says anything.

    Where zeros are stored like other numbers it names no layers: engines without a layout for them
    refuse a config that does.
    """
    of_zeros = {name: f[SPARSITY] for name, f in fragments.items() if f and SPARSITY in f}
    compact = {name: x for name, x in of_zeros.items() if x["format"] != NO_WEIGHTS}
    formats = {x["format"] for x in (compact or of_zeros).values()}
    if not formats:
        return None
    if len(formats) > 1:
        raise RecipeError(
            f"a model cannot be stored as {' and '.join(sorted(formats))} at once: a config has "
            "one sparsity_config; use one layout"
        )
    structures = sorted({x["sparsity_structure"] for x in (compact or of_zeros).values()})
    config = {"format": formats.pop(), "sparsity_structure": ", ".join(structures)}
    if not compact:
        return config
    others = [name for name in fragments if name not in compact]
    is_mixed = any(fragments[name] for name in others)
    return {
        **config,
        "targets": list(compact) if is_mixed else [EVERY_LINEAR],
        "ignore": [*ignored, *others],
    }
