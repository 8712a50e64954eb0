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
    star,
    star_like,
    write_facts,
)

from bitpress.modeling.parameter_names import find_names


def ask(architecture: str) -> Json:
    """The layers of an architecture's files, and the linear layers that have none of their own."""
    model = build_model(architecture, make_config(architecture))
    modules = dict(model.named_modules())
    tensors = file_tensors(model)
    layers: Json = {}
    for name, name_in_model in find_names(model, tensors).items():
        if tensors[name].dim() < 2:
            continue
        layer, layer_in_model = layer_name(name), layer_name(name_in_model)
        kind = _kind(layer_in_model, modules)
        renamed = {kind: star_like(layer, layer_in_model)}
        layers[star(layer)] = kind if layer == layer_in_model else renamed
    tied = {
        layer_name(name): layer_name(target)
        for name, target in (getattr(model, "all_tied_weights_keys", None) or {}).items()
        if isinstance(modules.get(layer_name(name)), torch.nn.Linear)
    }
    return {
        "model_type": model.config.model_type,
        "layers": dict(sorted(layers.items())),
        "tied": tied,
    }


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
