"""Write what transformers calls the layers of every architecture that generates text.

python tools/engine_facts/ask_transformers.py [PATTERN OF ARCHITECTURES]
"""

from __future__ import annotations

import warnings

import torch
import transformers
from configs import (
    Json,
    build_model,
    file_tensors,
    layer_name,
    make_config,
    skip_timm,
    star_like,
    write_facts,
)

from bitpress.checkpoint.layer_names import star
from bitpress.modeling.parameter_names import find_names


def ask(architecture: str) -> Json:
    """The layers of an architecture's files, and the linear layers that have none of their own."""
    model = build_model(architecture, make_config(architecture))
    modules = dict(model.named_modules())
    tensors = file_tensors(model)
    names = find_names(model, tensors)
    kinds: dict[str, str] = {}
    renamed: dict[str, list[str]] = {}
    for name, name_in_model in names.items():
        if tensors[name].dim() < 2:
            continue
        layer, layer_in_model = layer_name(name), layer_name(name_in_model)
        kinds[star(layer)] = _kind(layer_in_model, modules)
        found = renamed.setdefault(star(layer), [])
        if (pattern := star_like(layer, layer_in_model)) not in found:
            found.append(pattern)
    linear = {name for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    tied = {
        layer_name(name): layer_name(target)
        for name, target in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if layer_name(name) in linear
    }
    unnamed = linear - set(map(layer_name, names.values())) - tied.keys()
    answer = {
        "model_type": model.config.model_type,
        "layers": {name: _shorten(name, kinds[name], renamed[name]) for name in sorted(kinds)},
        "tied": tied,
    }
    return answer | ({"unnamed": sorted(set(map(star, unnamed)))} if unnamed else {})


def _shorten(name: str, kind: str, names_in_model: list[str]) -> Json | str:
    """A layer's kind, with its names in the model where they differ from that in the files."""
    # Embeddings without names are such as an engine does not look for.
    if names_in_model == [name] and kind != "embedding":
        return kind
    return {kind: names_in_model[0] if len(names_in_model) == 1 else names_in_model}


def _kind(name: str, modules: dict[str, torch.nn.Module]) -> str:
    module = modules.get(name)
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    return "experts" if ".experts." in name else "other"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    skip_timm()
    write_facts("transformers", transformers.__version__, ask)
