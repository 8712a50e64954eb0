"""`quantization_config`: what tells transformers and vLLM how the stored tensors are to be read
(compressed-tensors).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitpress.checkpoint.model_config import METHOD
from bitpress.errors import RecipeError


def quantization_config(
    fragments: Mapping[str, Mapping[str, Any] | None], plain: Sequence[str]
) -> dict[str, Any] | None:
    """The smallest config that both loaders accept, or None where every tensor is plain.

    Args:
        fragments: by module, the group entry its scheme asked for; None for a plain weight.
        plain: modules that stay as they are, for `ignore`.

    Raises:
        RecipeError: layers are to be stored in several layouts of which a config can name one.
    """
    groups: dict[str, list[str]] = {}
    for module, fragment in fragments.items():
        if fragment is not None:
            groups.setdefault(json.dumps(fragment, sort_keys=True), []).append(module)
    sparse = {
        text: modules
        for text, modules in groups.items()
        if "sparsity_structure" in json.loads(text)
    }
    groups = {text: modules for text, modules in groups.items() if text not in sparse}
    if len(sparse) > 1:
        names = " and ".join(json.loads(text)["format"] for text in sparse)
        raise RecipeError(
            f"a model cannot be stored as {names} at once: a config has one sparsity_config; use "
            "one layout"
        )
    found: dict[str, Any] = {"quant_method": METHOD} if sparse else {}
    for text, modules in sparse.items():
        others = [*plain, *(module for module in fragments if module not in modules)]
        found["sparsity_config"] = {
            **json.loads(text),
            "targets": modules if groups else ["Linear"],
            "ignore": others,
        }
    if not groups:
        return found or None
    entries = [json.loads(text) for text in groups]
    formats = {entry["format"] for entry in entries}
    # one group may say "Linear", which also reaches layers that an engine has fused; several need
    # the names
    targets = [["Linear"]] if len(groups) == 1 else list(groups.values())
    left = [
        module
        for module, fragment in fragments.items()
        if fragment is None or "sparsity_structure" in fragment
    ]
    return found | {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        # without it transformers leaves random weights, without an error
        "quantization_status": "compressed",
        "ignore": [*plain, *left],
        "config_groups": {
            f"group_{i}": {"targets": t, **e}
            for i, (t, e) in enumerate(zip(targets, entries, strict=True))
        },
    }
